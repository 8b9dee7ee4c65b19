"""How the native kernels are compiled, kept and found, and what is said where they cannot be."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from native_cases import needs_compiler

from llmq_kernels import native
from llmq_kernels.native import build

QUICK = ("-O0",)  # what is compiled here is not measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmq"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let nothing that was loaded, or could not be, outlive a test."""
    build._library.cache_clear()
    yield
    build._library.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes $CC a shell script."""

    def make(script: str) -> Path:
        path = tmp_path / "my-cc"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return make


def refused() -> str:
    with pytest.raises(build.BuildError) as error:
        build.load(4, QUICK)
    return str(error.value)


@needs_compiler
def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load(4, QUICK).llmq_dequantize
    (made,) = cache.iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert build.load(4, QUICK)._name == str(made)


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"not a library"], ids=["empty", "cut", "other"])
def test_a_damaged_library_is_compiled_again(damage: bytes, cache: Path) -> None:
    cache.mkdir(parents=True)
    options = (*build._FLAGS, build._processor_flag(), "-DBITS=3", *QUICK)
    path = cache / f"product-{build._key(build._compiler(), options)}.so"
    path.write_bytes(damage)
    assert build.load(3, QUICK)._name == str(path)
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert path.stat().st_size > 10000


RACE = "from llmq_kernels.native import build; build.load(8, ('-O0',)).llmq_float; print('loaded')"


@needs_compiler
def test_processes_at_once_all_get_a_whole_library(cache: Path) -> None:
    folder = Path(native.__file__).parents[2]
    command = [sys.executable, "-c", RACE]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) for _ in range(2)]
    assert [process.communicate()[0] for process in started] == ["loaded\n"] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_what_a_library_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1", encoding="utf-8")
    other.write_text("1", encoding="utf-8")
    names = {build._key([str(one)], ("-O3",)), build._key([str(one)], ("-O2",)), build._key([str(other)], ("-O3",))}
    names.add(build._key([str(one), "-m64"], ("-O3",)))
    one.write_text("22", encoding="utf-8")  # another version of the compiler
    names.add(build._key([str(one)], ("-O3",)))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    names.add(build._key([str(one)], ("-O3",)))
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.add(build._key([str(one)], ("-O3",)))
    monkeypatch.setattr(build, "_SOURCES", ("product.c",))
    names.add(build._key([str(one)], ("-O3",)))
    assert len(names) == 8


def test_every_source_is_in_the_name_and_in_the_package() -> None:
    folder = Path(native.__file__).parent
    assert set(build._SOURCES) == {path.name for path in folder.iterdir() if path.suffix in (".c", ".h")}


@pytest.mark.usefixtures("forgetful")
def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_NATIVE", "0")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled"))
    assert native.refuses(4, 64, 32, torch.bfloat16) == "switched off by LLMQ_NATIVE=0"
    with pytest.raises(build.BuildError, match="switched off by LLMQ_NATIVE=0"):
        build.library(4)


@pytest.mark.usefixtures("forgetful", "cache")
def test_a_failure_is_remembered(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(f"echo once >> {tmp_path}/log; exit 1")
    reasons = [build.unavailable(5) for _ in range(3)]
    assert reasons[0] is not None
    assert len(set(reasons)) == 1
    assert (tmp_path / "log").read_text(encoding="utf-8") == "once\n"


@pytest.mark.usefixtures("cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert refused() == "there is no C compiler (cc, gcc or clang); install one, or set CC to it"
    monkeypatch.setenv("CC", "my-cc -m64")
    assert refused() == "$CC is 'my-cc', which is not there; install one, or set CC to it"


def test_a_compiler_that_fails(cache: Path, compiler: Callable[[str], Path]) -> None:
    path = compiler("echo first line >&2; echo second line >&2; exit 3")
    assert refused() == f"{path} failed: first line"
    path = compiler("exit 3")
    assert refused() == f"{path} failed: nothing was said"
    assert not list(cache.iterdir())


def test_a_compiler_that_makes_something_else(cache: Path, compiler: Callable[[str], Path]) -> None:
    compiler('for last; do :; done; echo junk > "$last"')
    assert "cannot be loaded" in refused()
    compiler("exit 0")
    assert "cannot be loaded" in refused()


def test_a_compiler_that_hangs(cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    compiler("exec sleep 60")
    assert "timed out" in refused()
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_made_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[[str], Path]
) -> None:
    compiler("exit 0")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    expected = f"{tmp_path}/file/llmq cannot be made (Not a directory); set XDG_CACHE_HOME to a folder for it"
    assert refused() == expected

    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "mkstemp", read_only)
    expected = f"{tmp_path}/llmq cannot be written (Read-only file system); set XDG_CACHE_HOME to a folder for it"
    assert refused() == expected


def test_the_cache_is_where_the_user_has_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build._cache() == tmp_path / ".cache" / "llmq"


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compiler", lambda: ["cc"])
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert refused() == "compiled on Linux for x86_64 and aarch64 only, not on linux for riscv64"
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert refused() == "compiled on Linux for x86_64 and aarch64 only, not on darwin for x86_64"


@pytest.mark.usefixtures("forgetful")
def test_a_pytorch_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    build.parallel.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    reason = build.unavailable(4)
    build.parallel.cache_clear()
    assert reason == "PyTorch was built without OpenMP, whose threads the kernels share"


@needs_compiler
def test_threads_are_those_of_pytorch() -> None:
    """One pool: after a product of PyTorch's and one of ours there are no more threads than after the first."""
    program = """
import os, torch
from llmq_kernels import native
torch.set_num_threads(2)
torch.randn(2048, 2048) @ torch.randn(2048, 2048)
before = len(os.listdir("/proc/self/task"))
words, scales = torch.zeros(2048, 256, dtype=torch.int32), torch.ones(2048, 1)
native.matmul(torch.ones(8, 2048), (words, scales, None), None, 4, 2048)
assert native._threads(2048 * 2048 * 12) == 2
print(len(os.listdir("/proc/self/task")) - before)
"""
    folder = Path(native.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout == "0\n"
