"""Compiles C for the running machine, once, into the user's cache; says why where that cannot be."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock

import torch

log = logging.getLogger(__name__)

SWITCH = "LLMQ_NATIVE"  # the environment variable; 0: nothing is compiled, and nothing that was is loaded
_SOURCES = (
    *("product.c", "unpack.h", "levels.h", "rows.h", "few.h", "grouped.h", "undefine.h"),
    *("w8a8.c", "vectors.c", "lookup.h"),
)
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120  # for a compiler that hangs; it takes one or two
_lock = Lock()


class BuildError(Exception):
    """There are no native kernels here; the message says why."""


class Weight(ctypes.Structure):
    """A packed weight, as product.c has it."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scale_type", ctypes.c_int64),
        ("zero_type", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("table_type", ctypes.c_int64),
        ("own", ctypes.c_int64),
    )


def library(bits: int, table: bool = False) -> ctypes.CDLL:
    """Return the kernels for codes of `bits` bits, compiled if this machine has not yet.

    table: whether the codes are places in a table of levels.

    Raises:
        BuildError: they are switched off, or cannot be compiled, stored or loaded.
    """
    found = _library(bits, table)
    if isinstance(found, BuildError):
        raise found
    return found


def unavailable(bits: int, table: bool = False) -> str | None:
    """Return why `library` has no kernels for codes of `bits` bits, or None."""
    found = _library(bits, table)
    return str(found) if isinstance(found, BuildError) else None


@cache
def parallel() -> ctypes.c_void_p:
    """Return the function that starts threads of the pool that PyTorch itself uses.

    libgomp and the runtimes of LLVM and Intel all have it under one name. So our threads are PyTorch's, as many as
    `torch.set_num_threads` says, and no second OpenMP is linked to.

    Raises:
        BuildError: PyTorch was built without OpenMP.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        raise BuildError("PyTorch was built without OpenMP, whose threads the kernels share") from error


@cache
def _library(bits: int, table: bool) -> ctypes.CDLL | BuildError:
    return attempt(f"{bits} bits", lambda: load(bits, ("-DTABLE",) if table else ()))


def attempt(what: str, load: Callable[[], ctypes.CDLL]) -> ctypes.CDLL | BuildError:
    """Return what `load` does, one thread at a time, or why there are no native kernels for `what`."""
    with _lock:
        try:
            if os.environ.get(SWITCH) == "0":
                raise BuildError(f"switched off by {SWITCH}=0")
            parallel()
            return load()
        except BuildError as error:
            log.info("no native kernels for %s: %s", what, error)
            return error


def load(bits: int, extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the kernels for `bits`, compiled with `extra` options after our own.

    Raises:
        BuildError: as in `library`.
    """
    return make("product", (f"-DBITS={bits}", *extra), _declared)


def make(name: str, extra: tuple[str, ...], declared: Callable[[ctypes.CDLL], ctypes.CDLL]) -> ctypes.CDLL:
    """Return `declared` of the library that `name`.c is compiled to, with `extra` options after our own.

    Raises:
        BuildError: as in `library`.
    """
    compiler, options = _compiler(), (*_FLAGS, _processor_flag(), *extra)
    path = _cache() / f"{name}-{_key(compiler, options)}.so"
    if path.exists():
        try:
            return declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            log.info("%s is damaged, and compiled again", path)
    _compile(compiler, options, Path(__file__).with_name(f"{name}.c"), path)
    try:
        return declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def _compiler() -> list[str]:
    """Return the command of the C compiler: $CC, or the first that is there."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    wanted = f"$CC is {chosen[0]!r}, which is not there" if chosen else "there is no C compiler (cc, gcc or clang)"
    raise BuildError(f"{wanted}; install one, or set CC to it")


def _processor_flag() -> str:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _NATIVE:
        raise BuildError(f"compiled on Linux for {' and '.join(_NATIVE)} only, not on {sys.platform} for {machine}")
    return _NATIVE[machine]


def _cache() -> Path:
    """Return the folder of compiled kernels, which is there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "llmq"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder for it"
        ) from error
    return folder


def _key(compiler: list[str], options: tuple[str, ...]) -> str:
    """Return a name for what the compiler would make: it changes with everything that this depends on."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    # a compiler's size and time stand for its version: to ask it takes as long as loading a small model
    binary = os.stat(compiler[0])
    parts = [*compiler, *options, binary.st_size, binary.st_mtime_ns, torch.__version__, _processor()]
    digest.update("\0".join(map(str, parts)).encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return what tells kinds of processors apart: a cache may be shared by machines."""
    kept = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    first = text.partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))


def _compile(compiler: list[str], options: tuple[str, ...], source: Path, path: Path) -> None:
    """Make the library `path` of `source`, which is there whole or not at all, whoever else is at it."""
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".partial")
    except OSError as error:
        reason = f"{path.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder for it"
        raise BuildError(reason) from error
    os.close(handle)
    try:
        command = [*compiler, *options, str(source), "-o", partial]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[0]
            raise BuildError(f"{compiler[0]} failed: {said}")
        with open(partial, "rb") as whole:
            os.fsync(whole.fileno())  # a library that a crash cut short could end the process that loads it
        os.replace(partial, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} failed: {error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the types of its functions declared; AttributeError: it lacks one."""
    weight, pointer, number = ctypes.POINTER(Weight), ctypes.c_void_p, ctypes.c_int64
    kernels.llmq_dequantize.argtypes = [weight, number, number, pointer, ctypes.c_int, pointer, number]
    for name in ("llmq_float", "llmq_pairs") if has_pairs(kernels) else ("llmq_float",):
        getattr(kernels, name).argtypes = [weight, pointer, number, pointer, pointer, number, pointer, number]
        grouped = getattr(kernels, name.replace("_", "_grouped_"))
        grouped.argtypes = [weight, *[number] * 2, pointer, *[number] * 2, pointer, number, *[pointer] * 3, number]
    return kernels


def has_pairs(kernels: ctypes.CDLL) -> bool:
    """Return whether the processor that the library was compiled for has dot products of bfloat16."""
    return hasattr(kernels, "llmq_pairs")


def is_wide(kernels: ctypes.CDLL) -> bool:
    """Return whether it has AVX-512: registers for all sums of a tile."""
    return bool(ctypes.c_int.in_dll(kernels, "llmq_wide").value)
