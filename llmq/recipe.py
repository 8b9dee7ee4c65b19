"""The recipe: what to do to a model. Read from YAML, printed as YAML, turned into command-line options.

Where things are (the model, the output folder, the device) is not part of it, so the same recipe gives the same bytes
anywhere. Every field is declared once, here, with its default and help; `llmq.cli` makes one option of each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmq.errors import SpecError
from llmq.grids import ALL_GRIDS
from llmq.types import QuantSpec

# What statistics are collected by; the other fields of a recipe decide on codes.
COLLECTED_BY = (
    "calibration",
    "num_samples",
    "seq_len",
    "seed",
    "random_windows",
    "held_out",
    "response_only",
    "guidance_groups",
    "all_experts",
    "ignore",
    "dtype",
)

# Formats that store zero - 1, and what holds the zero itself, 0 included: asymmetric layers need that.
ASYMMETRIC = {"gptq": "gptq_v2", "auto-round": "auto-round-v2"}


class Recipe(BaseModel):
    """What `llmq quantize` does; immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        "gptq",
        description="solver that picks the codes: gptq, descent, obq (small layers), slb, bitsplit (uniform sym), "
        "admm, weighted_rtn, gptaq, or rtn (no calibration)",
    )
    grid: str = Field(
        "uniform",
        description=f"where levels may lie: {', '.join(ALL_GRIDS)}; all but uniform need format llmq, and take it",
    )
    bits: int = Field(4, description="bits per weight: 2, 3, 4 or 8; 2 to 8 in format llmq; grids say which they have")
    group_size: int = Field(
        128,
        description="columns that share a scale; -1 means one scale per output row, as codebook and vq2, vq4, vq8 have "
        "it if nothing is said",
    )
    sym: bool = Field(True, description="symmetric grid (every engine runs it) or one with zero points (more accurate)")
    sym_range: Literal["full", "gptq", "restricted"] = Field(
        "full", description="what symmetric scales span: full (most accurate), gptq or restricted"
    )
    order: Literal["natural", "act", "group", "pivot"] = Field(
        "act",
        description="order in which gptq and gptaq visit inputs: natural, act (by falling energy), group (act, group "
        "by group) or pivot; groups stay contiguous",
    )
    damp_percent: float = Field(0.05, gt=0, le=1, description="share of the mean Hessian diagonal that gptq adds to it")
    scale_search: Literal["hessian", "mse", "none"] = Field(
        "hessian",
        description="shrink each group's span as far as that lowers its error: weighted by the Hessian, plain (mse) or "
        "not at all (none)",
    )
    search_norm: float = Field(2.0, gt=0, le=8, description="power of the error that --scale-search mse sums")
    refine_rounds: int = Field(
        2,
        ge=0,
        description="rounds of refitting scales and re-deciding codes after the solver, each kept if the loss falls",
    )
    rotation: Literal["none", "hadamard", "random"] = Field(
        "none", description="rotate the residual stream and the heads' values, folded into the weights at no cost"
    )
    scaling: Literal["none", "smooth", "awq"] = Field(
        "none", description="move outlier channels' magnitude into the weights, where the solver loses less for it"
    )
    magr: float = Field(
        0.0, ge=0, description="strength of pulling in each group's largest weights before they are solved (MagR)"
    )
    shift: float = Field(
        0.5, ge=0, le=1, description="share of the errors in front of a layer that its weights are moved to answer for"
    )
    guidance_groups: int = Field(
        0, ge=0, le=4, description="groups of outputs whose tokens are weighted by the end loss's gradients; 0: none"
    )
    tune_steps: int = Field(0, ge=0, description="gradient steps on the codes and scales of each block")
    tune_epochs: int = Field(
        0, ge=0, description="passes over the calibration set that tune scales, norms and biases of the whole model"
    )
    random_windows: float = Field(
        0.125,
        ge=0,
        le=1,
        description="windows of random tokens, for those that the calibration text lacks, as a share of its windows",
    )
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of the calibration windows that only judges: what loses there is undone"
    )
    all_experts: bool = Field(
        False, description="let every expert learn from all tokens, not only from those that its router sends to it"
    )
    calibration: str | None = Field(
        None, description="text file, .jsonl with a text field, or dataset name; default: a text shipped with llmq"
    )
    num_samples: int | None = Field(
        None, ge=1, description="calibration windows; default: 128, or what the shipped text holds"
    )
    response_only: bool = Field(
        False, description="calibration is a .jsonl of conversations, and only what predicts answers counts"
    )
    seq_len: int = Field(512, ge=2, description="tokens per calibration window")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the choice of windows")
    format: str = Field(
        "gptq",
        description="packed layout: gptq (version 1 if symmetric, else 2), gptq_v2, awq (4 bits), compressed-tensors, "
        "auto-round (gptq under AutoRound's label), or llmq (all that llmq can make, for loading with llmq)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the calibration forward pass; auto is the checkpoint's own"
    )
    embeddings: int | None = Field(
        None,
        description="bits of the token embedding, and of a head tied to it: 2 to 8, in format llmq; default: as it is",
    )
    shard_size: str = Field("4GB", description="largest size of one output file, e.g. 500MB, 4GB")
    ignore: tuple[str, ...] = Field(
        (), description="regular expression; linear layers whose name it finds stay dense (repeatable)"
    )
    max_fallback: float = Field(
        0.05, ge=0, le=1, description="share of layers that may end rounded to nearest for want of a usable Hessian"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_grid(cls, fields: dict[str, object]) -> dict[str, object]:
        """Let the grid decide what is not said of bits, groups, zeros and format."""
        row = ALL_GRIDS.get(str(fields.get("grid", "uniform")))
        if row is None:
            raise ValueError(f"grid is {fields['grid']!r}; llmq has {', '.join(ALL_GRIDS)}")
        return row.defaults() | fields

    @field_validator("ignore")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        try:
            re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return patterns

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, size: str) -> str:
        if parse_size(size) < 1:
            raise ValueError("at least one byte")
        return size

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)

    @property
    def spec(self) -> QuantSpec:
        """What packed layers look like under this recipe."""
        packed = self.format if self.sym else ASYMMETRIC.get(self.format, self.format)
        return QuantSpec(self.bits, self.group_size, self.sym, packed, ALL_GRIDS[self.grid].scale_dtype, self.grid)

    @property
    def embedding_spec(self) -> QuantSpec | None:
        """What packed embeddings look like; None: they stay dense.

        8 bits get one scale per row, which is nearly exact, and what the int8 operator of CPUs multiplies with.
        """
        if self.embeddings is None:
            return None
        whole = self.embeddings == 8
        return QuantSpec(self.embeddings, -1 if whole else self.group_size, whole or self.sym, self.spec.format)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` names, as in 4096, 500MB, 4GB (powers of 1000) or 2GiB (of 1024).

    Raises:
        ValueError: it names none.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:[.][0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as 500MB, 4GB or 2GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def make_recipe(fields: dict[str, object]) -> Recipe:
    """Return the recipe with these fields and defaults elsewhere.

    Raises:
        SpecError: an unknown field or a value that does not fit.
    """
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # of the recipe as a whole: it names the field
            raise SpecError(f"recipe: {said}") from error
        where = ".".join(str(part) for part in first["loc"])
        known = f"; fields are {', '.join(Recipe.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise SpecError(f"recipe: {where}: {said} (got {first['input']!r}){known}") from error


def read_recipe(path: str | Path) -> dict[str, object]:
    """Return the fields that the YAML file `path` sets.

    Raises:
        SpecError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"recipe {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"recipe {path}: holds {type(content).__name__}, expected fields such as 'bits: 4'")
    return content
