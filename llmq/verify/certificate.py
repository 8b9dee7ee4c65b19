"""The certificate of a packed folder: what each loader makes of it, where every tensor went, the sums of its files."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import environment
from llmq.errors import CheckpointError
from llmq.families import check_causal
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config
from llmq.verify.account import Account, settle
from llmq.verify.calling import Loader, Outcome, ask
from llmq.verify.comparing import EXACT, Comparison, compare
from llmq.verify.prompts import Prompts, fixed_prompts
from llmq.verify.reference import folder_of, logits, original_model, reference_model
from llmq.verify.signature import sign_files, sign_tensors

VERSION = 1
NEW_TOKENS = 16


@dataclass(frozen=True)
class Answered:
    """What came of one loader."""

    loader: str
    outcome: Outcome
    comparison: Comparison | None  # None: refused
    rounding: float  # relative difference of the reference, computed in the loader's dtype, from itself in float32

    @property
    def verdict(self) -> str:
        """What came of it in a word; `rounded` is as close as the loader's dtype lets it be: twice `rounding`."""
        if self.comparison is None:
            return "refused"
        if self.comparison.relative is None:
            return "not finite"
        if self.comparison.relative <= EXACT:
            return "exact"
        return "rounded" if self.comparison.relative <= 2 * self.rounding else "differs"

    @property
    def fault(self) -> str | None:
        """Why this loader does not compute the same function; None if it does, or refused to load."""
        found = self.comparison
        if found is None or self.verdict in ("exact", "rounded"):
            return None
        if not found.finite:
            return f"loader {self.loader}: some logits are not finite"
        return f"loader {self.loader}: logits differ by up to {found.max:.2g}, {found.relative:.1e} of the largest"

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        told: dict[str, Any] = {"loader": self.loader, "versions": self.outcome.versions}
        if self.comparison is None:
            return {**told, "loaded": False, "refused": self.outcome.refused}
        numbers = asdict(self.comparison)
        told |= {"loaded": True, "verdict": self.verdict, "dtype": self.outcome.dtype, **numbers}
        told |= {"rounding": self.rounding}
        return {**told, "new_tokens": " ".join(map(str, self.outcome.new)), "notes": self.outcome.notes}


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    folder: Path
    original: str
    prompts: Prompts
    packing: Comparison  # what quantizing changed: the codes' function against the original's
    sizes: dict[str, float]
    account: Account
    answers: list[Answered]

    @property
    def faults(self) -> list[str]:
        """Return a line for each loader that has loaded and is not exact, and each tensor that is unaccounted for."""
        return [answer.fault for answer in self.answers if answer.fault] + self.account.faults

    def certificate(self, apart_from: Path | None = None) -> dict[str, Any]:
        """Return the certificate ready for JSON, the sums of all files but `apart_from` in it."""
        packed = PackedCheckpoint(self.folder)
        drawn = len(self.prompts.ids) - self.prompts.text_rows
        return {
            "certificate": VERSION,
            "model": self.folder.name,
            "original": self.original,
            "reference": {
                "what": "codes to float32 weights by llmq's readers, run by transformers on the CPU",
                "versions": environment.versions(),
                "prompts": {
                    "rows": f"{self.prompts.text_rows} of text, {drawn} of random tokens",
                    "ids": [" ".join(map(str, row)) for row in self.prompts.ids.tolist()],
                },
            },
            "verdicts": {
                "exact": f"largest difference of logits at most {EXACT:g} of the largest logit",
                "rounded": "at most twice that of the reference computed in the loader's dtype",
            },
            "loaders": [answer.to_dict() for answer in self.answers],
            "packing": {"kl": self.packing.kl, "agreement": self.packing.agreement},
            "sizes": self.sizes,
            "account": asdict(self.account),
            "faults": self.faults,
            "files": sign_files(self.folder, apart_from),
            "tensors": sign_tensors(packed),
        }


def verify(
    folder: Path,
    against: Path,
    loaders: Sequence[Loader],
    *,
    seconds: float = 600,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Return what `loaders` make of the packed `folder`, and what became of the tensors of the original `against`.

    Takes 4 bytes of memory per weight, for one model at a time. A loader that refuses is a result.

    Args:
        folder: a packed folder.
        against: the dense one that it was made from.
        loaders: who is asked.
        seconds: how long a loader may take.
        progress: told what is done.

    Raises:
        CheckpointError: a folder is damaged, or they do not belong together.
        SpecError: transformers does not know the model, or it does not predict the next token.
    """
    packed, original = PackedCheckpoint(folder), folder_of(against)
    config = model_config(packed)
    check_causal(config, "llmq verify")
    progress("account of tensors")
    account = settle(original, packed)
    prompts = fixed_prompts(folder, config)
    progress("reference")
    expected = logits(reference_model(packed), prompts.ids)
    rounding = {"float32": 0.0}
    gc.collect()
    progress("original")
    before = logits(original_model(original), prompts.ids)
    gc.collect()
    if before.shape != expected.shape:
        raise CheckpointError(
            f"{folder} predicts {expected.shape[-1]} tokens and {against} {before.shape[-1]}; "
            "--against names the model that was quantized"
        )
    answers = []
    for loader in loaders:
        progress(loader.name)
        outcome = ask(loader, folder, prompts.ids, new=NEW_TOKENS if prompts.text_rows else 0, seconds=seconds)
        answers.append(judged(loader, outcome, packed, prompts.ids, expected, rounding))
    return Verification(
        folder,
        against.name,
        prompts,
        compare(before, expected),
        sizes(packed, original_bytes(original)),
        account,
        answers,
    )


def judged(
    loader: Loader,
    outcome: Outcome,
    packed: PackedCheckpoint,
    ids: Tensor,
    expected: Tensor,
    rounding: dict[str, float],
) -> Answered:
    """Return how `outcome` compares with the `expected` logits of `ids`.

    Args:
        loader: who was asked.
        outcome: what came of it.
        packed: the folder.
        ids: int64 [B, L].
        expected: of the reference in float32, [B, L, V].
        rounding: by dtype, how far the reference itself is off in it; gets what is missing.
    """
    if outcome.logits is None:
        return Answered(loader.name, outcome, None, 0.0)
    if outcome.dtype not in rounding:
        there = logits(reference_model(packed, getattr(torch, outcome.dtype)), ids)
        rounding[outcome.dtype] = compare(expected, there).relative or 0.0
    return Answered(loader.name, outcome, compare(expected, outcome.logits), rounding[outcome.dtype])


def original_bytes(original: Any) -> int:
    """Return the bytes of all tensors of a folder."""
    return sum(original.info(key).nbytes for key in original)


def sizes(packed: PackedCheckpoint, original: int) -> dict[str, float]:
    """Return what packed layers and everything take, where the original took so many bytes."""
    weights = sum(n * k for n, k in (layer.shape for layer in packed.layers.values()))
    inside = sum(packed.info(key).nbytes for layer in packed.layers.values() for key in layer.keys.values())
    return {
        "packed_layers": len(packed.layers),
        "packed_weights": weights,
        "packed_bytes": inside,
        "bits_per_packed_weight": 8 * inside / weights,
        "bytes_per_packed_weight": inside / weights,
        "tensor_bytes": original_bytes(packed),
        "original_tensor_bytes": original,
    }


def read_certificate(path: Path) -> dict[str, Any]:
    """Return the certificate in the file `path`.

    Raises:
        CheckpointError: it is none, or of another version.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a certificate: {error}") from error
    if not isinstance(found, dict) or found.get("certificate") != VERSION:
        raise CheckpointError(f"{path}: is no certificate of version {VERSION}")
    return found
