"""Which engines run a packed checkpoint, by what is known of them before it is made.

An engine is a row of `ENGINES`: which bits, grids, formats and shapes it takes. Whether it has the architecture of a
model is its own matter: these rows are about layouts. Sources are at the facts; version numbers are those looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmq.types import QuantSpec

RANKS = (1, 2, 4, 8)  # of tensor parallelism

# Linears that engines join into one: their members must be packed alike. vLLM and others, for Llama-like models; the
# last two are Mixtral's names of gate and up.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))

# Linears whose inputs tensor parallelism splits (Megatron, arXiv 1909.08053): those that write to the residual stream.
_ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|out_proj|down_proj|c_proj|fc2|w2|dense_4h_to_h|(self_attention|attention|attn)\.(dense|output)|wo)$"
)
# Multi-head latent attention computes these on every rank: DeepSeek-V2 and V3 in vLLM.
_REPLICATED = re.compile(r"(^|\.)(q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj)$")
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Result:
    """What will be written, as far as engines look at it."""

    spec: QuantSpec
    packed: Mapping[str, tuple[int, int]]  # by name, outputs and inputs
    dense: frozenset[str]  # linears in the blocks that stay as they were
    text_only: bool = True  # whether the model takes nothing but tokens
    head_width: int = 1  # outputs of an attention head, which no rank splits

    @property
    def experts(self) -> list[str]:
        """Packed linears of experts."""
        return [name for name in self.packed if _EXPERT.search(name)]


Rule = Callable[[Result], str | None]


@dataclass(frozen=True)
class Engine:
    """What one engine takes."""

    name: str
    rules: tuple[Rule, ...]  # each returns why not, or None
    ranks: bool = False  # whether it splits weights over ranks
    note: str = ""  # what to know even if it takes everything


@dataclass(frozen=True)
class Verdict:
    """Whether an engine takes a result."""

    engine: str
    clashes: tuple[str, ...]  # why not; empty: it takes the layout
    ranks: Mapping[int, str | None]  # by number of ranks, why not; empty: it does not split weights
    note: str

    @property
    def accepted(self) -> bool:
        """Whether the layout is taken, on one rank at least."""
        return not self.clashes

    def line(self) -> str:
        """Return the verdict as a person reads it."""
        if not self.accepted:
            return f"{self.engine}: no: {'; '.join(self.clashes)}"
        text = f"{self.engine}: yes"
        if self.ranks:
            fit = [str(count) for count, clash in self.ranks.items() if clash is None]
            text += f", tensor-parallel {', '.join(fit)}"
            text += "".join(f"; not {count}: {clash}" for count, clash in self.ranks.items() if clash)
        return f"{text}; {self.note}" if self.note else text


def verdicts(result: Result) -> list[Verdict]:
    """Return what each engine says to `result`."""
    found = []
    for engine in ENGINES:
        clashes = tuple(clash for clash in (rule(result) for rule in engine.rules) if clash)
        ranks = {count: _split_clash(result, count) for count in RANKS} if engine.ranks and not clashes else {}
        found.append(Verdict(engine.name, clashes, ranks, engine.note))
    return found


def _takes(known: Mapping[str, Mapping[int, bool]]) -> Rule:
    """Return the rule that only these formats are read, and of each these bits, of which True takes no zero points."""

    def rule(result: Result) -> str | None:
        spec = result.spec
        if spec.format not in known:
            return f"format {spec.format}, it reads {', '.join(known)}"
        takes = known[spec.format]
        if spec.bits not in takes:
            return f"{spec.bits} bits, of {spec.format} it takes {', '.join(map(str, takes))}"
        if takes[spec.bits] and not spec.symmetric:
            return f"zero points, of {spec.format} it takes symmetric weights only"
        return None

    return rule


def _whole_words(result: Result) -> str | None:
    for name, shape in result.packed.items():
        if any(size % 32 for size in shape):
            return f"{name} is {shape[0]} x {shape[1]}, it takes multiples of 32"
    return None


def _fused_alike(result: Result) -> str | None:
    """Return a fused linear of which only parts are packed."""
    for names in _FUSED:
        parts: dict[str, set[str]] = defaultdict(set)
        for name in (*result.packed, *result.dense):
            parent, _, last = name.rpartition(".")
            if last in names:
                parts[parent].add(name)
        for parent, members in parts.items():
            packed = sorted(member for member in members if member in result.packed)
            if packed and len(packed) < len(members):
                rest = sorted(members - set(packed))
                return (
                    f"{parent}: it joins {' and '.join(m.rpartition('.')[2] for m in [*packed, *rest])}, of which "
                    f"{rest[0].rpartition('.')[2]} stays dense; pack all or none"
                )
    return None


def _alike_in_all_blocks(result: Result) -> str | None:
    """Return a linear that is packed in one block and dense in another."""
    local = {_in_block(name): name for name in result.packed}
    for name in sorted(result.dense):
        if _in_block(name) in local:
            return f"{name} stays dense and {local[_in_block(name)]} does not; it packs a name in all blocks or in none"
    return None


def _no_experts(result: Result) -> str | None:
    return f"experts ({result.experts[0]} and others): it leaves them random" if result.experts else None


def _symmetric_experts(result: Result) -> str | None:
    return "experts with zero points" if result.experts and not result.spec.symmetric else None


def _text(result: Result) -> str | None:
    return None if result.text_only else "a model that takes more than tokens"


def _in_block(name: str) -> str:
    """Return the name of a linear without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


_ALL = dict.fromkeys((2, 3, 4, 8), False)
_FOUR = {4: False}
_SYMMETRIC = dict.fromkeys((2, 3, 4, 8), True)

ENGINES = (
    # whatever is in llmq.formats, as llmq.hf loads it
    Engine("llmq", (), note="import llmq.hf before from_pretrained, or llmq.load"),
    Engine(
        "transformers with optimum and gptqmodel",
        (
            _takes({"gptq": _ALL, "gptq_v2": _ALL, "awq": _FOUR}),  # GPTQConfig refuses other bits (FORMATS 1.1)
            _alike_in_all_blocks,  # of gptq only names within a block are honoured (FORMATS 2.2)
            _no_experts,  # per-expert tensors are unexpected, the fused ones missing: a report only (FORMATS 1.5, ran)
            _text,  # its GPTQ quantizer wants main_input_name input_ids (FORMATS 2.2)
        ),
    ),
    Engine(
        "transformers with compressed-tensors",
        (
            _takes({"compressed-tensors": _ALL}),  # 3 bits from 0.18 on, as a stream (docs/formats.md)
            _symmetric_experts,  # with zero points they fail (FORMATS 1.5, ran)
        ),
        note="weights are dense after the first forward pass; zero points fail to load with some versions of "
        "compressed-tensors unless dequantize=True is passed (docs/formats.md)",
    ),
    Engine(
        "transformers with AutoRound 0.16",
        (
            # its own torch layers, in inference/backend.py: zero - 1 of symmetric grids only, the zero itself of all
            _takes({"auto-round": _SYMMETRIC, "auto-round-v2": _ALL}),
            _whole_words,
        ),
        note="computes in float16 on a CPU",
    ),
    Engine(
        "vLLM 0.33",
        (
            # of GPTQ two, whose qzeros it drops if symmetric: both versions are the same to it (FORMATS 1.1)
            _takes(
                {
                    "gptq": {4: True, 8: True},
                    "gptq_v2": {4: True, 8: True},
                    "awq": _FOUR,  # FORMATS 1.2
                    "compressed-tensors": _ALL,  # FORMATS 1.3
                    "auto-round": {4: True, 8: True},  # as gptq, in quantization/inc; version 2 is refused
                }
            ),
            _fused_alike,  # one quantization per joined linear (FORMATS 1.3, complaint 20)
        ),
        ranks=True,
        note="needs a GPU",
    ),
    Engine(
        "GPTQModel 7.7",
        (
            # version 1 with zero points is refused, llmq never writes it (FORMATS 1.1)
            _takes({"gptq": _ALL, "gptq_v2": _ALL, "awq": _FOUR}),
            _whole_words,  # FORMATS 1.1
        ),
    ),
    Engine(
        "llama.cpp",
        (
            # dequant_gptq in convert_hf_to_gguf.py: 3 is not implemented; zeros get 1 unless checkpoint_format says no
            _takes({"gptq": {2: False, 4: False, 8: False}, "gptq_v2": {2: False, 4: False, 8: False}}),
        ),
        note="llmq convert --format gguf keeps the codes; convert_hf_to_gguf.py rounds dequantized weights anew",
    ),
)


def _split_clash(result: Result, ranks: int) -> str | None:
    """Return the first packed linear that cannot be split over so many ranks, and why."""
    for name, (n, k) in result.packed.items():
        if ranks == 1 or _REPLICATED.search(name):
            continue
        if (
            clash := _rows_split(result, name, k, ranks)
            if _ROW_PARALLEL.search(name)
            else _split(result, name, n, ranks)
        ):
            return clash
    return None


def _split(result: Result, name: str, n: int, ranks: int) -> str | None:
    """Return why the outputs of a linear cannot be split: zeros are packed along them, 32 / bits to a word."""
    factor = 32 // result.spec.bits if 32 % result.spec.bits == 0 else 32
    if name.endswith(("k_proj", "v_proj")) and n < ranks * result.head_width:
        return None  # fewer heads than ranks: each rank has a whole one, several the same
    if n % ranks or (n // ranks) % factor:
        return f"{name} has {n} outputs, {n / ranks:g} per rank, no multiple of {factor}"
    return None


def _rows_split(result: Result, name: str, k: int, ranks: int) -> str | None:
    """Return why the inputs of a linear cannot be split: no group and no word may lie on two ranks."""
    factor = 32 // result.spec.bits if 32 % result.spec.bits == 0 else 32
    if k % ranks or (k // ranks) % factor:
        return f"{name} has {k} inputs, {k / ranks:g} per rank, no multiple of {factor}"
    columns = result.spec.group_size
    if columns > 0 and (k // ranks) % columns:
        return f"{name} has {k} inputs, {k // ranks} per rank, no multiple of group_size {columns}"
    return None
