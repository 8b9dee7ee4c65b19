"""How fast a machine is at what llmq does: measured in a few seconds, kept for later plans."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmq.disk import disk_errors
from llmq.errors import SpecError
from llmq.planning.counting import Amounts, Counting, Work, side

_PATIENCE = 5.0  # seconds that all tries but the disk's take together
_LONG = 0.1  # seconds of a try that is not repeated, and beyond which no larger one is made
_SIDES = (16, 64, 256, 1024)  # of products
_OTHER = 1024  # their other sides
_FACTOR_SIDES = (128, 1024)
_AROUND = 3.0  # times an operation's least time: what Python does around it in solvers
_SLOW = 1e9  # flops per second that are assumed of a kind that was not measured
_BIG = 2**26  # bytes of what does not fit a cache
_SHORT = 16  # entries of rows whose length does not matter
_FILE = 2**26  # bytes written to find out how fast the disk is


@dataclass(frozen=True)
class Machine:
    """Speeds, each the best of several tries."""

    name: str
    products: dict[str, dict[int, float]]  # flops per second by dtype and log2 of the least side
    factors: dict[str, dict[int, float]]
    solves: dict[str, dict[int, float]]
    near: float  # bytes of small results per second
    far: float  # bytes of large results per second
    call: float  # seconds that an operation takes at least
    hash: float  # bytes per second of sha256
    read: float  # bytes per second of a disk whose cache is cold
    write: float  # bytes per second, until they are safe
    sync: float  # seconds that a small file takes until it is safe

    def seconds(self, work: Work) -> float:
        """Return the time that `work` takes."""
        kinds = ((work.products, self.products), (work.factors, self.factors), (work.solves, self.solves))
        flops = sum(_seconds(amounts, speeds) for amounts, speeds in kinds)
        return flops + work.near / self.near + work.far / self.far + _AROUND * work.calls * self.call


def _seconds(amounts: Amounts, speeds: dict[str, dict[int, float]]) -> float:
    return sum(flops / _speed(speeds, dtype, at) for (dtype, at), flops in amounts.items())


def _speed(speeds: dict[str, dict[int, float]], dtype: str, at: int) -> float:
    """Return the speed at a side, between the measured ones along a straight line of logarithms."""
    known = sorted(speeds.get(dtype, {}).items())
    if not known:
        return _SLOW
    for (low, slow), (high, fast) in pairwise(known):
        if low <= at <= high:
            share = (at - low) / (high - low)
            return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
    return known[0][1] if at < known[0][0] else known[-1][1]


def machine_name(device: torch.device) -> str:
    """Return what decides on speeds, as far as a name can: processor, threads, torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def machine_of(device: torch.device, file: Path | None = None, folder: Path | None = None) -> tuple[Machine, str]:
    """Return the speeds of this machine, or of the one that `file` tells of, and where they come from.

    What is measured is kept: in `file` if it does not exist yet, else in the user's cache.

    Args:
        device: what is computed on.
        file: JSON of an earlier measurement, perhaps on another machine.
        folder: whose disk is measured; None: that for temporary files.

    Raises:
        SpecError: `file` is no measurement of a machine.
    """
    path = file or _cache() / f"{_plain(machine_name(device))}.json"
    if path.exists():
        try:
            return _read(path), f"measured before ({path})"
        except SpecError:
            if file is not None:
                raise
    found = measure(device, folder)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found, f"measured now, kept in {path}"


def measure(device: torch.device, folder: Path | None = None) -> Machine:
    """Return the speeds of `device`, and of the disk of `folder`; takes some seconds."""
    probes = _probes(device)
    best: dict[tuple[str, str, int], float] = {}
    for key, probe in probes.items():  # rising sizes
        if all(best[other] < _LONG for other in best if other[:2] == key[:2]):
            best[key] = min(probe.once(device), probe.once(device))
    end = time.perf_counter() + _PATIENCE
    # round and round, not one after the other: what else runs here disturbs some tries of each, not all tries of one
    while time.perf_counter() < end:
        for key in best:
            if best[key] < _LONG:
                best[key] = min(best[key], probes[key].once(device))
    speeds = {key: probes[key].amount / best[key] for key in best}
    tables: dict[str, dict[str, dict[int, float]]] = {"products": {}, "factors": {}, "solves": {}}
    for (kind, dtype, at), speed in speeds.items():
        if kind in tables:
            tables[kind].setdefault(dtype, {})[at] = speed
    short, long = probes["rows", "", _SHORT], probes["rows", "", _SHORT * 1024]
    call = best["rows", "", _SHORT] / short.calls
    beyond = best["rows", "", _SHORT * 1024] - best["rows", "", _SHORT]
    far, hashing = speeds["stream", "", 0], speeds["hash", "", 0]
    near = max((long.amount - short.amount) / max(beyond, 1e-9), far)
    products, factors, solves = tables.values()
    return Machine(machine_name(device), products, factors, solves, near, far, call, hashing, *_disk(folder))


@dataclass
class _Probe:
    """Something whose time is measured."""

    run: Callable[[], object]
    amount: float  # of work that one run does
    calls: float = 1.0  # operations of one run

    def once(self, device: torch.device) -> float:
        """Return the seconds of one run."""
        start = time.perf_counter()
        self.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start


def _probes(device: torch.device) -> dict[tuple[str, str, int], _Probe]:
    """Return all that is measured but the disk, by kind, dtype and log2 of a size."""
    found: dict[tuple[str, str, int], _Probe] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n in _SIDES:
            a, b = torch.randn(_OTHER, n, device=device).to(dtype), torch.randn(n, _OTHER, device=device).to(dtype)
            run = partial(torch.mm, a, b)
            found["products", _label(dtype), side(n)] = _Probe(run, 2.0 * a.numel() * _OTHER)
    for dtype in (torch.float32, torch.float64):
        for n in _FACTOR_SIDES:
            h = torch.eye(n, dtype=dtype, device=device) + 1.0 / n
            x = torch.randn(n, n, dtype=dtype, device=device)
            found["factors", _label(dtype), side(n)] = _Probe(partial(torch.linalg.cholesky_ex, h), n**3 / 3)
            found["solves", _label(dtype), side(n)] = _Probe(partial(torch.cholesky_solve, x, h), 2.0 * n**3)
    for size in (_SHORT, _SHORT * 1024):
        found["rows", "", size] = _rows(size, device)
    big, data = torch.rand(_BIG // 4, device=device), bytes(2**22)
    found["stream", "", 0] = _Probe(lambda: torch.add(big, big), float(_BIG))
    found["hash", "", 0] = _Probe(lambda: hashlib.sha256(data), float(len(data)))
    return found


def _rows(size: int, device: torch.device) -> _Probe:
    """Return operations as the column loops of solvers have them, on rows of `size` entries."""
    y, w, scale = (torch.rand(size, device=device) + 1 for _ in range(3))
    errors, factor = torch.rand(8, size, device=device).T, torch.rand(8, device=device)

    def run() -> None:
        for _ in range(10):
            y.addmv_(errors, factor)
            torch.add(w, y, alpha=0.5, out=y)
            torch.clamp(y.div_(scale).round_(), scale, w, out=y)
            torch.addcmul(w, y, scale, value=-1, out=y)

    with Counting() as counting:
        run()
    return _Probe(run, counting.work.near + counting.work.far, counting.work.calls)


def _disk(folder: Path | None) -> tuple[float, float, float]:
    """Return bytes per second of reading and of writing, and seconds until a small file is safe."""
    there = folder.absolute() if folder is not None else None
    while there is not None and not there.exists():
        there = there.parent
    with disk_errors(there or Path("/tmp")), TemporaryDirectory(dir=there) as temporary:
        path = Path(temporary) / "probe"
        start = time.perf_counter()
        _write(path, os.urandom(2**20) * (_FILE // 2**20))
        write = _FILE / (time.perf_counter() - start)
        small = min(_timed(lambda: _write(Path(temporary) / "small", b"x" * 4096)) for _ in range(5))
        handle = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            read = _FILE / _timed(lambda: [os.pread(handle, 2**22, at) for at in range(0, _FILE, 2**22)])
        finally:
            os.close(handle)
    return read, write, small


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Machine:
    """Return the machine that a file tells of."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for kind in ("products", "factors", "solves"):
            content[kind] = {dtype: {int(k): float(v) for k, v in t.items()} for dtype, t in content[kind].items()}
        return Machine(**content)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SpecError(
            f"--machine {path}: is no measurement of a machine ({' '.join(str(error).split())[:100]}); name a file "
            "that does not exist, and it will be made"
        ) from error


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "llmq" / "machines"


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
