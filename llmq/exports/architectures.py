"""What llama.cpp has to be told of a model: one row per architecture, and the refusals where it would compute another
function than transformers does.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmq.errors import SpecError

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

ROTARY_FACTORS = "rope_freqs.weight"  # what llama.cpp divides the rotary frequencies by
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias")  # in old files; computed from config.json


class Architecture(NamedTuple):
    """How GGUF has an architecture of transformers."""

    name: str
    moved_rows: bool = False  # the rotary pairs of a head are neighbours, not half a head apart
    experts: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", moved_rows=True),
    "MistralForCausalLM": Architecture("llama", moved_rows=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", experts=True),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the row of a model.

    Raises:
        SpecError: there is none, or llama.cpp does not compute what `config` says.
    """
    name = (config.architectures or ["none"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SpecError(f"GGUF export knows {known}, not {name}; convert such a model with llama.cpp's own script")
    row = ARCHITECTURES[name]
    for reason in _differences(config, row):
        raise SpecError(f"{name} in GGUF: {reason}; llama.cpp would compute another function")
    return row


def _differences(config: PretrainedConfig, row: Architecture) -> list[str]:
    """Return what of `config` llama.cpp does not do."""
    rope = _rope(config)
    found = []
    if config.hidden_act != "silu":
        found.append(f"hidden_act is {config.hidden_act!r}, llama.cpp has 'silu'")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        found.append(f"rope_type is {rope['rope_type']!r}, llmq exports 'default', 'linear' and 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}, llama.cpp has 1")
    if getattr(config, "use_sliding_window", False):
        found.append("use_sliding_window is true, and llama.cpp attends to everything")
    if row.experts and (config.decoder_sparse_step != 1 or config.mlp_only_layers):
        found.append("some layers have no experts, and llama.cpp expects them in all")
    if row.experts and not config.norm_topk_prob:
        found.append("norm_topk_prob is false, and llama.cpp normalizes")
    return found


def describe(config: PretrainedConfig, row: Architecture, writer: gguf.GGUFWriter) -> None:
    """Add the sizes and constants of a model to the metadata."""
    rope, head = _rope(config), head_size(config)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if row.experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def head_size(config: PretrainedConfig) -> int:
    """Return the size of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def heads_of(module: str, config: PretrainedConfig, row: Architecture) -> int | None:
    """Return how many heads the rows of `module` are moved within, or None if they stay."""
    if not row.moved_rows:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rpartition(".")[2])


def rotary_rows(rows: int, heads: int) -> Tensor:
    """Return which row of transformers' query or key weight each row of GGUF's is, int64 [rows].

    transformers rotates the pairs (i, i + half a head), llama.cpp's Llama the pairs (2i, 2i + 1).
    """
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def rotary_factors(config: PretrainedConfig) -> Tensor | None:
    """Return what each rotary frequency is divided by, float32 [head / 2]; None: by 1.

    Llama 3 divides the low ones by `factor`, leaves the high ones, and goes over from one to the other linearly in the
    number of turns that a frequency makes in the context it was first trained on.
    """
    rope, head = _rope(config), head_size(config)
    if rope["rope_type"] != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = torch.pow(rope["rope_theta"], -torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = kept + (1 - kept) / rope["factor"]
    return scaled.reciprocal().float()


def stack_of(name: str) -> tuple[str, int] | None:
    """Return the name of the stack that an expert's module or tensor goes into, and its place there."""
    found = _EXPERT.fullmatch(name.removesuffix(".weight"))
    return None if found is None else (f"{found[1]}.{found[3]}", int(found[2]))


def is_derived(name: str) -> bool:
    """Return whether a tensor of the files is left out, because config.json says the same."""
    return name.endswith(_DERIVED)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the parameters of the rotary embedding."""
    return {"rope_type": "default", **config.rope_parameters}


def _context(config: PretrainedConfig) -> int:
    """Return for how many tokens llama.cpp computes the same: not more than a window of attention, which it lacks."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    return min(longest, window or longest)
