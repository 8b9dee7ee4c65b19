"""Tiny random mixtures of experts, and what the tests of them share."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from llmq import preflight
from llmq.calibration import Calibration
from llmq.loading import Loader
from llmq.moe import Bank
from llmq.nn import QuantLinear
from llmq.problems import Observed
from llmq.recipe import make_recipe
from llmq.stream import Stage, Stream

EXPERTS = 4
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MLA = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**COMMON, head_dim=16, num_experts=EXPERTS, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=EXPERTS),
    "deepseek_v2": DeepseekV2Config(**MLA),
    "deepseek_v3": DeepseekV3Config(**MLA),
    "gpt_oss": GptOssConfig(
        **COMMON,
        head_dim=16,
        num_local_experts=EXPERTS,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        swiglu_limit=2.0,  # low enough for these inputs to be clamped
    ),
}
# what files call the experts of each, below the block, and their projections: gate, up, down
FILE_NAMES = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "deepseek_v2": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
CPU = torch.device("cpu")


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model, biases and routers included, whose experts run as transformers' plain loop."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype, experts_implementation="eager").eval()
        with torch.no_grad():
            for key, tensor in (*model.named_parameters(), *model.named_buffers()):
                if key.endswith(("bias", "sinks")):
                    tensor.normal_(0, 0.1)
    return model


def make_moe(folder: Path, name: str, *, never: int | None = None) -> Path:
    """Write a random model to `folder`; expert `never` of GPT-OSS is one that the routers send nothing to."""
    make_model(folder, CONFIGS[name])
    model = model_of(name)
    if never is not None:
        for module in model.modules():
            if type(module).__name__ == "GptOssTopKRouter":
                module.bias.data[never] = -1e4
    model.save_pretrained(folder)
    return folder


def windows(samples: int = 8, length: int = 32, seed: int = 0) -> Calibration:
    ids = torch.randint(1, 128, (samples, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, None, "random tokens", "none")


def started(folder: Path, calibration: Calibration, **options: Any) -> tuple[Stream, Loader]:
    """Return the stream in front of the first block of the model in `folder`, and the model's loader."""
    loader = Loader(preflight.prepare(folder, make_recipe({"group_size": 32})), CPU)
    loader.outer()
    return Stream.start(loader.job.model, loader.job.structure, calibration, CPU, **options), loader


def bank_stages(stream: Stream, loader: Loader, index: int) -> tuple[Observed, list[Stage]]:
    """Return block number `index` under observation, and the stages of its bank; the stream must be in front of it."""
    block = loader.block(index)
    stages = stream.stages(block, index, loader.job.structure.linears[index])
    return Observed(stream, block, index), [stage for stage in stages if stage.experts is not None]


def routed(folder: Path, ids: Tensor, block: int, mask: Tensor | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the fused experts of a block in transformers' own model, what enters them [T, D], and the picks [T, k]."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    experts = model.model.layers[block].mlp.experts
    seen: list[Tensor] = []
    experts.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    return experts, seen[0], seen[1]


def dequantized(folder: Path, packed: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model in `folder`, experts fused, with the weights that `packed` holds."""
    dense = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    inside = set()
    for name, bank in packed.named_modules():
        if isinstance(bank, Bank):
            inside |= bank.places().keys()
            fused = dense.get_submodule(name)
            for part in bank.parts():
                module = bank.get_submodule(part.name.rpartition(".")[0])
                if isinstance(module, QuantLinear) and part.name.endswith("weight"):
                    target = part.of(fused.get_parameter(part.parameter).data[part.expert])
                    target.copy_(module.quantized_weight().dequantize())
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear) and module not in inside:
            dense.get_submodule(name).weight.data.copy_(module.quantized_weight().dequantize())
    return dense
