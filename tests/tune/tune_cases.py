"""Tiny models in memory, quantized roughly, with the streams that tuning works on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import LLAMA
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmq.activations import HiddenStates
from llmq.calibration import Calibration, from_token_lists
from llmq.families import Linear, Structure, find_structure
from llmq.grids.uniform import UniformGrid
from llmq.solvers.rtn import rtn
from llmq.stream import Stream
from llmq.tune.block import Site
from llmq.tune.tunable import put
from llmq.types import QuantizedWeight

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
Layers = dict[str, tuple[Linear, Tensor, QuantizedWeight]]


def llama(**overrides: Any) -> PreTrainedModel:
    """Return a Llama of 2 blocks whose norms are not all ones."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **SMALL, **overrides})).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_((1 + 0.2 * torch.randn_like(p)).bfloat16() if "norm" in name else torch.zeros_like(p))
    return net


def gpt2() -> PreTrainedModel:
    """Return a GPT-2 of 2 blocks, whose linears keep their weights as [K, N]."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def windows(count: int, length: int = 16, seed: int = 0) -> Calibration:
    ids = torch.randint(1, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, None, "random tokens", "none")


def padded(seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (16, 9, 12, 16, 5, 14)]
    return from_token_lists(samples, pad_token_id=0, source="x")


@dataclass
class Case:
    """A model, what the original one has at its places, and its linears rounded to nearest."""

    net: PreTrainedModel
    original: PreTrainedModel  # a copy
    structure: Structure
    stream: Stream  # in front of the first block
    reference: Stream  # the same
    layers: list[Layers]  # per block

    def site(self, index: int = 0) -> Site:
        """Return the place of a block, the streams having passed those before it; its linears hold zeros."""
        blocks = self.structure.blocks
        for before in range(index):
            self.hold(before)
            self.stream.advance(blocks[before], before)
        prefix = self.structure.prefixes[index]
        for passed in range(index + 1):
            self.reference.advance(self.original.get_submodule(self.structure.names[passed]), passed)
        with torch.no_grad():
            for linear, _, _ in self.layers[index].values():
                linear.weight.zero_()
        return Site(blocks[index], index, prefix, self.stream, self.reference.hidden)

    def hold(self, index: int, weights: dict[str, QuantizedWeight] | None = None) -> None:
        """Let the linears of a block hold these quantized weights, or those rounded to nearest."""
        for name, (linear, _, q) in self.layers[index].items():
            linear.weight.copy_((weights[name] if weights else q).dequantize())

    def end(self) -> HiddenStates:
        """Move the reference to the end and return what the last block of the original returns."""
        for index, name in enumerate(self.structure.names):
            self.reference.advance(self.original.get_submodule(name), index)
        return self.reference.hidden

    def replace_all(self, layers: dict[str, Any]) -> None:
        """Put `layers` in place of all linears."""
        for index, block in enumerate(self.structure.blocks):
            prefix = self.structure.prefixes[index]
            put(block, prefix, {name: layers[name] for name in self.layers[index]})


def make_case(
    net: PreTrainedModel | None = None,
    *,
    bits: int = 3,
    symmetric: bool = False,
    group_size: int = 16,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    batch_tokens: int = 32,
) -> Case:
    net = net or llama()
    original = copy.deepcopy(net)
    structure = find_structure(net)
    stream = Stream.start(net, structure, calibration or windows(6), CPU, held_out=held_out, batch_tokens=batch_tokens)
    grid = UniformGrid(bits, symmetric)
    layers: list[Layers] = []
    for linears in structure.linears:
        found: Layers = {}
        for linear in linears:
            weight = linear.weight.clone()
            found[linear.name] = (linear, weight, rtn(weight, None, grid, group_size).weight)
        layers.append(found)
    return Case(net, original, structure, stream, stream.fork(), layers)


def assert_on_grid(q: QuantizedWeight) -> None:
    """Fail unless the codes are codes and the scales are what files hold."""
    lowest = int(q.grid.symmetric and getattr(q.grid, "sym_range", "full") == "restricted")
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.min()) >= lowest
    assert int(q.codes.max()) <= 2**q.grid.bits - 1
    assert torch.equal(q.scales, q.grid.storable(q.scales))
