"""Feeds readers damaged folders of every format and grid: each must be read, or refused with a named error, quickly.

    python scripts/fuzz_readers.py --cases 100000

A case is a sound tiny folder with one to four of the changes in `mutations.py`, drawn by its number alone; `--only N`
repeats one. Cases run in processes that may take `--memory` MiB of address space more than they start with and
`--seconds` each; a process that dies is replaced behind the case that killed it. Ends with 1 if there was a crash or a
hang.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from mutations import SINGLE, Folder, mutated

from llmq.doctor import diagnose
from llmq.errors import LlmqError
from llmq.formats import FORMATS
from llmq.grids import ALL_GRIDS, make_grid
from llmq.grids.uniform import UniformGrid
from llmq.grids.vq import MAX_ENTRY, VectorGrid, VectorWeight
from llmq.packed import PackedCheckpoint
from llmq.shards import write_tensors
from llmq.solvers.rtn import rtn
from llmq.types import QuantizedWeight, QuantSpec

_CASES = (
    *(("gptq", bits, True) for bits in (2, 3, 4, 8)),
    *(("gptq_v2", 4, False), ("awq", 4, True), ("awq", 4, False)),
    *(("compressed-tensors", bits, sym) for bits in (3, 4, 5, 8) for sym in (True, False)),
    ("compressed-tensors-padded", 3, False),
    *(("llmq", bits, sym) for bits in (3, 5, 8) for sym in (True, False)),
    *(("auto-round", 4, True), ("auto-round-v2", 3, False)),
)
GRIDS = (
    *(("codebook", bits, True) for bits in (2, 3, 4)),
    *(("vq2", 3, True), ("vq4", 2, True), ("vq8", 1, True)),
    *(("nf4", 4, True), ("mxfp4", 4, True), ("nvfp4", 4, True), ("pwlq", 3, False)),
)
_N, _K, _GROUP = 32, 64, 32
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
_INDEX = "model.safetensors.index.json"
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def sound_folders() -> Iterator[Folder]:
    """Yield one sound folder per format, bits and symmetry, then one per grid, of one shard and of two."""
    generator = torch.Generator().manual_seed(0)
    specs = [QuantSpec(bits, _GROUP, symmetric, name) for name, bits, symmetric in _CASES]
    for number, spec in enumerate(specs + [_on_grid(*case) for case in GRIDS]):
        tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(_K)}
        for module in _MODULES:
            packed = FORMATS[spec.format].pack(_weight(spec, generator), spec)
            tensors |= {f"{module}.{local}": tensor for local, tensor in packed.items()}
        quantization = FORMATS[spec.format].config(dict.fromkeys(_MODULES, spec), ["lm_head"])
        folder = {"config.json": json.dumps({**_LLAMA, "quantization_config": quantization}).encode()}
        yield folder | (_two_shards(tensors) if number % 2 else {SINGLE: _shard(tensors)})


def _on_grid(grid: str, bits: int, symmetric: bool) -> QuantSpec:
    row = ALL_GRIDS[grid]
    return QuantSpec(bits, row.group_size or _GROUP, symmetric, "llmq", scale_dtype=row.scale_dtype, grid=grid)


def _weight(spec: QuantSpec, generator: torch.Generator) -> QuantizedWeight:
    """Return a random weight: any codes on a uniform grid and on vectors, rounded ones where levels are to fit."""
    grid, groups = make_grid(spec.grid, spec.bits, spec.symmetric), spec.groups(_K)
    if not isinstance(grid, UniformGrid | VectorGrid):
        w = torch.randn(_N, _K, generator=generator)
        return rtn(w, None, grid.adapted(w), spec.group_size).weight
    scales = (torch.rand(_N, groups, generator=generator) + 0.1).half().float()
    if isinstance(grid, VectorGrid):
        codes = torch.randint(0, grid.entries, (_N, grid.codes_in(_K)), generator=generator, dtype=torch.uint8)
        book = torch.randint(-MAX_ENTRY, MAX_ENTRY + 1, (grid.entries, grid.columns), generator=generator).float()
        zeros = torch.zeros_like(scales)
        return VectorWeight(codes, scales, zeros, grid, spec.group_size, codebook=book, in_features=_K)
    zeros = torch.full_like(scales, 2.0 ** (spec.bits - 1))
    if not spec.symmetric:
        zeros = torch.randint(0, 2**spec.bits, zeros.shape, generator=generator).float()
    codes = torch.randint(0, 2**spec.bits, (_N, _K), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, grid, spec.group_size)


def _shard(tensors: dict[str, torch.Tensor]) -> bytes:
    handle = os.memfd_create("shard")
    try:
        write_tensors(handle, tensors)
        return os.pread(handle, os.fstat(handle).st_size, 0)
    finally:
        os.close(handle)


def _two_shards(tensors: dict[str, torch.Tensor]) -> Folder:
    half = len(tensors) // 2
    parts = (dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:]))
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    return {_INDEX: json.dumps(index).encode()} | {n: _shard(p) for n, p in zip(names, parts, strict=True)}


def read_all(path: Path) -> None:
    """Read everything in a packed folder, and dequantize it.

    Raises:
        LlmqError: it is damaged.
    """
    with PackedCheckpoint(path) as packed:
        for module in packed.layers:
            packed.take(module)[0].dequantize()
        for key in packed.dense:
            for _ in packed.pieces(key):
                pass


def outcome(number: int, sound: list[Folder], path: Path, *, doctor: bool = True) -> str:
    """Return what came of a case: read, refused, or an error that nobody should see, with where it was raised."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in mutated(number, sound).items():
        (path / name).write_bytes(content)
    found = _tried(read_all, path)
    seen = _tried(diagnose, path) if doctor else "read"
    return seen if seen not in ("read", "refused") else found


def _tried(reader: Callable[[Path], object], path: Path) -> str:
    """Return what came of one reader."""
    try:
        reader(path)
    except LlmqError as error:
        named = any(part in str(error) for part in (str(path), ".json", ".safetensors"))
        return "refused" if named else f"refused, unnamed: {error}"[:100]
    except Exception as error:  # that is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(place.filename).name}:{place.lineno})"
    return "read"


def _work(numbers: range, speak: Connection, options: argparse.Namespace) -> None:
    """Run the cases `numbers` one after the other, each announced before it begins."""
    torch.set_num_threads(1)
    sound = list(sound_folders())
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    outcome(-1, sound, folder / "case", doctor=options.doctor)  # imports what is imported late
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + options.memory * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _peak()
    try:
        for number in numbers:
            speak.send((number, None, 0))
            signal.setitimer(signal.ITIMER_REAL, options.seconds)  # nobody handles it: the process ends
            found = outcome(number, sound, folder / "case", doctor=options.doctor)
            signal.setitimer(signal.ITIMER_REAL, 0)
            speak.send((number, found, _peak() - before))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """A process with its share of the cases, started again behind a case that ended it."""

    def __init__(self, numbers: range, options: argparse.Namespace) -> None:
        self._left, self._options, self.ended = numbers, options, False
        self._start()

    def _start(self) -> None:
        self.hear, speak = os_pipe()
        self._at = self._left.start
        self.process = os.fork()
        if self.process == 0:
            self.hear.close()
            try:
                _work(self._left, speak, self._options)
            finally:
                os._exit(0)
        speak.close()

    def next(self) -> tuple[int, str, int] | None:
        """Return a case, what came of it and the peak of memory, or None after the last."""
        while not self.ended:
            try:
                number, found, peak = self.hear.recv()
            except EOFError:  # the process has ended
                status = os.waitpid(self.process, 0)[1]
                if self._at >= self._left.stop - 1 and os.WIFEXITED(status):
                    return None
                number, name = self._at, signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"
                self._left = range(number + 1, self._left.stop)
                found = "hang" if name == "SIGALRM" else f"killed by {name}"
                if self._left:
                    self._start()
                else:
                    self.ended = True
                return number, found, 0
            self._at = number
            if found is not None:
                return number, found, peak
        return None


def os_pipe() -> tuple[Connection, Connection]:
    """Return the ends of a pipe to read from and to write to."""
    read, write = os.pipe()
    return Connection(read, writable=False), Connection(write, readable=False)


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run one case in this process and show its folder")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--memory", type=int, default=1024, help="MiB above what a process has at its start")
    parser.add_argument("--seconds", type=float, default=20, help="for one case")
    parser.add_argument("--no-doctor", dest="doctor", action="store_false", help="leave llmq doctor out")
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    options = parser.parse_args()
    if options.only is not None:
        folder = Path(tempfile.mkdtemp(dir=options.folder)) / "case"
        print(folder, outcome(options.only, list(sound_folders()), folder, doctor=options.doctor))
        return 0
    cuts = [options.first + options.cases * i // options.processes for i in range(options.processes + 1)]
    workers = {w.hear: w for w in (Worker(range(a, b), options) for a, b in pairwise(cuts) if a < b)}
    counts: Counter[str] = Counter()
    examples: dict[str, int] = {}
    peak, begun = 0, time.monotonic()
    while workers:
        for hear in wait(list(workers)):
            worker = workers.pop(hear)  # type: ignore[arg-type]
            case = worker.next()
            if case is None:
                continue
            workers[worker.hear] = worker
            counts[case[1]] += 1
            examples.setdefault(case[1], case[0])
            peak = max(peak, case[2])
            if sum(counts.values()) % 5000 == 0:
                print(
                    sum(counts.values()), dict(counts), f"{time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True
                )
    for found, count in counts.most_common():
        print(f"{count:8d}  {found}  (first: case {examples[found]})")
    bad = sum(count for found, count in counts.items() if found not in ("read", "refused"))
    print(f"{sum(counts.values())} cases, {bad} bad, peak {peak / 2**20:.0f} MiB above the start of a process, "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
