"""Feeds readers damaged folders of every format: each must be read, or refused with a named error, quickly.

    python scripts/fuzz_readers.py --cases 100000

A case is a sound tiny folder with one to four random mutations, made from its number alone; `--only N` repeats one.
Cases run in processes that may take `--memory` MiB of address space more than they start with and `--seconds` each;
a process that dies is replaced behind the case that killed it. Ends with 1 if there was a crash or a hang.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from llmq.doctor import diagnose
from llmq.errors import LlmqError
from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.packed import PackedCheckpoint
from llmq.shards import write_tensors
from llmq.types import QuantizedWeight, QuantSpec

Folder = dict[str, bytes]  # content by file name

_CASES = (
    *(("gptq", bits, True) for bits in (2, 3, 4, 8)),
    *(("gptq_v2", 4, False), ("awq", 4, True), ("awq", 4, False)),
    *(("compressed-tensors", bits, sym) for bits in (3, 4, 5, 8) for sym in (True, False)),
    ("compressed-tensors-padded", 3, False),
    *(("llmq", bits, sym) for bits in (3, 5, 8) for sym in (True, False)),
    *(("auto-round", 4, True), ("auto-round-v2", 3, False)),
)
_N, _K, _GROUP = 32, 64, 32
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
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
    """Yield one sound folder per format, bits and symmetry, of one shard and of two."""
    generator = torch.Generator().manual_seed(0)
    for number, (name, bits, symmetric) in enumerate(_CASES):
        spec = QuantSpec(bits, _GROUP, symmetric, name)
        tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(_K)}
        for module in _MODULES:
            zeros = torch.full((_N, _K // _GROUP), 2.0 ** (bits - 1))
            if not symmetric:
                zeros = torch.randint(0, 2**bits, zeros.shape, generator=generator).float()
            weight = QuantizedWeight(
                torch.randint(0, 2**bits, (_N, _K), generator=generator, dtype=torch.uint8),
                (torch.rand(zeros.shape, generator=generator) + 0.1).half().float(),
                zeros,
                UniformGrid(bits, symmetric),
                _GROUP,
            )
            packed = FORMATS[name].pack(weight, spec)
            tensors |= {f"{module}.{local}": tensor for local, tensor in packed.items()}
        quantization = FORMATS[name].config(dict.fromkeys(_MODULES, spec), ["lm_head"])
        folder = {"config.json": json.dumps({**_LLAMA, "quantization_config": quantization}).encode()}
        yield folder | (_two_shards(tensors) if number % 2 else {_SINGLE: _shard(tensors)})


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


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 9, 32, 64, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 1.5, 1e308),
    *("", "gptq", "awq", "re:(a+)+$", "re:.*.*.*.*.*.*x", "..", "../x", "/etc/passwd", "\ud800", "\x00", "a" * 5000),
    *([], {}, [[]], {"": {}}, [0] * 100, ["re:("], {"-:(": {}}, {"+:(a|a)*$": {"bits": 2}}, [2**62, 2**62], [0, 2**62]),
    *("F16", "I32", "I64", "F4", "BOOL", "C64", "F8_E8M0", "Q4", [1] * 70),
)  # fmt: skip


def _at_random(rng: random.Random, content: Any) -> Any:
    """Return a JSON value with something in it replaced, removed, doubled or swapped."""
    places: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        here = stack.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in items:
            places.append((here, key))
            stack.append(value)
    if not places:
        return rng.choice(_ODD)
    here, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0 and isinstance(here, dict):
        del here[key]
    elif action == 1 and isinstance(here, dict):
        here[rng.choice((*here, "x", "", "dynamic", "ignore", "bits", "\ud800"))] = here.pop(key)
    elif action == 2 and isinstance(here[key], int):
        here[key] += rng.choice((-8, -1, 1, 8, 2**32, 2**63))
    elif action == 3:
        there, other = rng.choice(places)
        if other in there if isinstance(there, dict) else other < len(there):
            here[key] = json.loads(json.dumps(there[other]))
    else:
        here[key] = rng.choice(_ODD)
    return content


def _changed_json(rng: random.Random, raw: bytes) -> bytes:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return json.dumps(_at_random(rng, content)).encode()


def _changed_header(rng: random.Random, raw: bytes) -> bytes:
    """Return a shard whose header is other JSON, its length made right or left wrong."""
    length = int.from_bytes(raw[:8], "little")
    header = _changed_json(rng, raw[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    """Return bytes with some flipped, cut off, taken out, doubled or added; more often at the start."""
    if not raw:
        return rng.randbytes(8)
    at = min(rng.randrange(len(raw)), rng.randrange(len(raw)))
    action = rng.randrange(7)
    if action == 0:
        return raw[:at]
    if action == 1:
        return raw[:at] + raw[at + rng.randrange(1, 64) :]
    if action == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 64)) + raw[at:]
    if action == 3:
        return raw[:at] + raw[at : at + 200] * 2 + raw[at + 200 :]
    if action == 4:
        return rng.choice((b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", rng.randrange(2**40)))) + raw[8:]
    if action == 5:
        nested = rng.choice((b"[", b'{"a":', b"[[],")) * rng.choice((10, 2000, 200_000))
        return struct.pack("<Q", len(nested)) + nested if rng.randrange(2) else nested
    flipped = bytearray(raw)
    for _ in range(rng.randrange(1, 8)):
        flipped[rng.randrange(min(len(raw), at + 64))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _renamed(rng: random.Random, folder: Folder) -> None:
    """Remove, exchange, copy or rename a file."""
    name = rng.choice(list(folder))
    other = rng.choice([*folder, "x.safetensors", "model-00003-of-00003.safetensors", _SINGLE, "quantize_config.json"])
    action = rng.randrange(4)
    if action == 0:
        folder.pop(name)
    elif action == 1 and other in folder:
        folder[name], folder[other] = folder[other], folder[name]
    elif action == 2:
        folder[other] = folder[name]
    else:
        folder[other] = folder.pop(name)


def mutated(number: int, sound: list[Folder]) -> Folder:
    """Return the folder of a case, its files changed."""
    rng = random.Random(number)
    folder = dict(rng.choice(sound))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not folder:
            break
        name = rng.choice(list(folder))
        if rng.randrange(12) == 0:
            _renamed(rng, folder)
        elif rng.randrange(4) == 0:
            folder[name] = _bytes(rng, folder[name])
        elif name.endswith(".json"):
            folder[name] = _changed_json(rng, folder[name])
        else:
            folder[name] = _changed_header(rng, folder[name])
    return folder


def read_all(path: Path) -> None:
    """Read everything in a packed folder.

    Raises:
        LlmqError: it is damaged.
    """
    with PackedCheckpoint(path) as packed:
        for module in packed.layers:
            packed.take(module)
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
