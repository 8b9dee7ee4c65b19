"""Tiny random models of many architectures, whole in memory, with a way to run one block alone."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llmq.families import Linear, Structure, find_structure
from llmq.transforms.wiring import Run

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GLU = {**COMMON, "hidden_size": 48, "intermediate_size": 72, "num_key_value_heads": 2}
OPT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "ffn_dim": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GLU),
    "llama_tied": LlamaConfig(**{**GLU, "tie_word_embeddings": True}),
    "llama_mha": LlamaConfig(**{**GLU, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**GLU, sliding_window=8),
    "qwen2": Qwen2Config(**GLU),
    "qwen3": Qwen3Config(**GLU, head_dim=16),
    "gemma": GemmaConfig(**{**GLU, "tie_word_embeddings": True}, head_dim=16),
    "gemma2": Gemma2Config(**GLU, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**GLU, head_dim=16, sliding_window=8, layer_types=["full_attention"] * 2),
    "phi3": Phi3Config(**GLU),
    "mixtral": MixtralConfig(**GLU, num_local_experts=4),
    "opt": OPTConfig(**OPT),
    "opt_post": OPTConfig(**OPT, do_layer_norm_before=False),
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Structure]:
    """Return a random model whose norms and biases are random too, and its structure."""
    model = deepcopy(_model(name)).to(dtype)  # building one takes longer than all that is done with it
    return model, find_structure(model)


@cache
def _model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                is_bias, spread = key.endswith("bias"), 0.3 * torch.randn_like(parameter)
                parameter.copy_(parameter + spread if is_bias else (parameter + spread).abs() + 0.1)
    return model


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens(), use_cache=False).logits
    return out


class Probe(NamedTuple):
    """One block, what enters it, and how to run it alone."""

    block: nn.Module
    linears: list[Linear]
    run: Run
    x: Tensor


def probes(model: PreTrainedModel, structure: Structure) -> list[Probe]:
    """Return a probe of each block, with the hidden states and arguments of a pass of the model."""
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], args[1:], {k: v for k, v in kwargs.items() if k != "past_key_values"}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in structure.blocks]
    logits(model)
    for handle in handles:
        handle.remove()

    def runner(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                out = block(x, *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        return run

    return [
        Probe(block, linears, runner(block, args, kwargs), x)
        for block, linears, (x, args, kwargs) in zip(structure.blocks, structure.linears, calls, strict=True)
    ]


def exact_norms_(model: nn.Module) -> None:
    """Let the norms compute in the model's own dtype: those of transformers go through float32, whatever comes in."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module, float("Gemma" in type(module).__name__))


def _rms_norm(module: nn.Module, offset: float, x: Tensor) -> Tensor:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + module.weight)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
