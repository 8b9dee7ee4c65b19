"""Packed folders without a packed format: dense tensors in files, codes in memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from llmq.checkpoint import CheckpointReader
from llmq.grids.uniform import UniformGrid
from llmq.solvers.rtn import rtn
from llmq.types import Affine, QuantizedWeight, QuantSpec

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Packed(CheckpointReader):
    """What `llmq.packed.PackedCheckpoint` offers, with given codes in the place of dense weights of the folder."""

    def __init__(self, path: Path, weights: dict[str, QuantizedWeight]) -> None:
        super().__init__(path)
        self._weights = weights
        self.specs = {
            name: QuantSpec(weight.grid.bits, weight.group_size, weight.grid.symmetric, "gptq_v2")
            for name, weight in weights.items()
        }
        self.dense = [name for name in self if name.removesuffix(".weight") not in weights]
        self.order: Tensor | None = None

    def weight(self, module: str) -> QuantizedWeight:
        return self._weights[module]

    def columns(self, module: str) -> Tensor | None:
        return self.order


def quantize(w: Tensor, bits: int, group_size: int, *, symmetric: bool = True) -> QuantizedWeight:
    """Return the weight `w` [N, K] rounded to the nearest levels."""
    grid = UniformGrid(bits, symmetric)
    return rtn(w, None, grid, group_size).weight


def random_weight(
    n: int, k: int, bits: int, group_size: int, *, symmetric: bool = True, seed: int = 0
) -> QuantizedWeight:
    """Return a weight whose codes and zeros take all values, with scales as our grids make them, of both signs."""
    g = torch.Generator().manual_seed(seed)
    grid = UniformGrid(bits, symmetric)
    groups = -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scales = grid.storable(torch.randn(n, groups, generator=g) * 0.01)
    zeros = torch.randint(0, 2**bits, (n, groups), generator=g).float()
    return QuantizedWeight(
        codes, scales, torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros, grid, group_size
    )


def dequantized(weight: QuantizedWeight) -> Tensor:
    """Return what the codes stand for, one by one."""
    columns = torch.arange(weight.codes.shape[1]) // weight.group_size
    return weight.grid.decode(weight.codes, Affine(weight.scales[:, columns], weight.zeros[:, columns]))


def make_tokenizer(*steps: Any, ignore_merges: bool = False, words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that learned a few merges; token 0 is <|end|>."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps) or [pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the thin thing there, then 1997 and 2024", *words], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def make_folder(folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random model and its tokenizer to `folder`, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms are 1 and biases 0 in a new model
                parameter.data += torch.randn(parameter.shape).to(dtype) / 8
            assert name
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pack_linears(folder: Path, bits: int = 4, group_size: int = 32, *, symmetric: bool = True) -> Packed:
    """Return the folder with all linear layers in blocks quantized, save routers."""
    reader = CheckpointReader(folder)
    names = [name for name in reader if name.endswith("_proj.weight")]
    weights = {
        name.removesuffix(".weight"): quantize(reader.read(name), bits, group_size, symmetric=symmetric)
        for name in names
    }
    return Packed(folder, weights)


def rewrite(folder: Path, change: Any) -> None:
    """Change the dense tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
