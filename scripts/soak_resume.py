"""Kill `llmq quantize` again and again, repeat it until it is done, and compare every byte with an undisturbed run.

    python scripts/soak_resume.py [--kills 100] [--seed 0] [--models llama,gpt2,qwen3_moe]
        [--presets plain,default,best] [--work DIR] [--disk-full]

Each kill is a SIGKILL at a random instant of a random case (a tiny random model and a preset), in a process of its own;
the case is then repeated, and killed again with a chance of one half, until it finishes. Prints a line per case and
the number of differing bytes; the exit code is 1 if there is one. Of report.json, what the clock says is left out.

With --disk-full, every case is also run on a disk that is too small (a tmpfs, which takes the right to mount; else
files are limited in size), must end in one error that says so, and then finish when there is room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from llmq.driver import quantize
from llmq.errors import CheckpointError, LlmqError
from llmq.families import auto_class
from llmq.presets import PRESETS, preset_fields
from llmq.recipe import make_recipe

WORDS = 128
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    "t5": {
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 32,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 128},
    "qwen3_moe": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
}
SETTINGS = {"bits": 3, "sym": False, "group_size": 32, "num_samples": 16, "seq_len": 64, "shard_size": "40KB"}
SPARE = (0, 2**20 + 2**16)  # bytes of a small disk beyond the output: none, and too few for hidden states
SHORT = {"tune_steps": 10, "tune_epochs": 2}  # of the gradient stages, where a preset has them


@dataclass(frozen=True)
class Case:
    """What is quantized, and how."""

    model: str
    preset: str
    source: Path
    text: Path

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.model}-{self.preset}"

    def run(self, output: Path) -> None:
        """Quantize into `output`, or go on there."""
        fields = preset_fields(self.preset)
        short = {name: value for name, value in SHORT.items() if fields.get(name)}
        quantize(self.source, output, make_recipe({**SETTINGS, **fields, **short, "calibration": str(self.text)}))


def make_case(folder: Path, model: str, preset: str) -> Case:
    """Write a tiny random model with tokenizer and text."""
    source, text = folder / model, folder / "text.txt"
    if not source.exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model, vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **SIZES[model])
        auto_class(config).from_config(config, dtype=torch.bfloat16).save_pretrained(source)
        words = {"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(source)
    if not text.exists():
        draw = random.Random(0)
        text.write_text(" ".join(f"w{draw.randrange(1, WORDS)}" for _ in range(4000)))
    return Case(model, preset, source, text)


def in_child(work: Callable[[], None], kill_after: float | None = None) -> int | None:
    """Do `work` in a process of its own; return its exit code, or None if it was killed after that many seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            work()
            code = 0
        except LlmqError as error:
            print(error, file=sys.stderr, flush=True)
            code = 3 if isinstance(error, CheckpointError) else 2
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a checkpoint; of the report what does not depend on the clock."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    report = json.loads(files["report.json"])
    for name in ("seconds", "peak_memory_bytes"):
        del report[name]
    return {**files, "report.json": json.dumps(report).encode()}


def differing_bytes(a: dict[str, bytes], b: dict[str, bytes]) -> int:
    """Return how many bytes differ; a file that one lacks differs in all."""
    total = 0
    for name in a.keys() | b.keys():
        x, y = a.get(name, b""), b.get(name, b"")
        total += sum(p != q for p, q in zip(x, y, strict=False)) + abs(len(x) - len(y))
    return total


def soak(case: Case, kills: int, folder: Path, draw: random.Random) -> tuple[int, int]:
    """Return how many bytes of a case differ after at least this many kills, and how many runs that took."""
    whole = folder / f"{case.name}-whole"
    start = time.perf_counter()
    if in_child(lambda: case.run(whole)) != 0:
        raise SystemExit(f"{case.name}: fails without a kill")
    seconds, expected = time.perf_counter() - start, content(whole)
    done = wrong = runs = 0
    while done < kills:
        output = folder / f"{case.name}-{runs}"
        code: int | None = None
        while code is None:
            kill = draw.uniform(0, seconds) if done < kills or draw.random() < 0.5 else None
            code = in_child(lambda: case.run(output), kill)  # noqa: B023  run at once
            done += code is None
        if code != 0 and not (output / "config.json").exists():  # else killed when all but the cleaning was done
            raise SystemExit(f"{case.name}: exit code {code} when repeated in {output}")
        wrong += differing_bytes(expected, content(output))
        shutil.rmtree(output)
        runs += 1
    print(f"{case.name:24} {done:4} kills, {runs:3} runs of {seconds:.1f} s, {wrong} differing bytes", flush=True)
    return wrong, done


def fill_disk(case: Case, folder: Path, spare: int) -> bool:
    """Return whether a case that finds the disk full says so, and finishes in the same bytes once there is room.

    The disk has room for the output and `spare` bytes: with none the run refuses to begin, with some it is stopped.
    """
    expected, output = content(folder / f"{case.name}-whole"), folder / f"{case.name}-small-{spare}"
    output.mkdir()
    size = sum(len(x) for x in expected.values()) + spare
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(output)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def limited() -> None:
        if not mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        case.run(output)

    try:
        code = in_child(limited)
        unfinished = not (output / "config.json").exists()
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1G", output], check=True)
        same = (code == 0 or in_child(lambda: case.run(output)) == 0) and content(output) == expected
    finally:
        if mounted:
            subprocess.run(["umount", output], check=True)
    kind = f"a tmpfs with {spare} bytes to spare" if mounted else "a limit on files"
    sound = code == (3 if unfinished else 0)
    said = ("refused" if unfinished else "there was room") if sound else f"ENDED WITH {code}"
    then = "the same bytes" if same else "OTHERS"
    print(f"{case.name:24} {kind}: {said}, then {then}", flush=True)
    return sound and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="llama,gpt2,qwen3_moe")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--work", type=Path, help="folder to work in; default: a temporary one")
    parser.add_argument("--disk-full", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        cases = [
            make_case(folder, model, preset)
            for model in arguments.models.split(",")
            for preset in arguments.presets.split(",")
        ]
        share = -(-arguments.kills // len(cases))
        outcomes = [soak(case, share, folder, draw) for case in cases]
        survived = [fill_disk(case, folder, n) for case in cases for n in SPARE] if arguments.disk_full else []
    wrong, kills = (sum(values) for values in zip(*outcomes, strict=True))
    print(f"{kills} kills, {wrong} differing bytes")
    return int(wrong > 0 or not all(survived))


if __name__ == "__main__":
    sys.exit(main())
