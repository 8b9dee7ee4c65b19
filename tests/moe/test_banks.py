"""Banks of experts compute what transformers' fused modules compute, whatever form the files have."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from moe_cases import CONFIGS, EXPERTS, FILE_NAMES, make_moe, model_of
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.integrations.moe import use_experts_implementation

from llmq.checkpoint import CheckpointReader
from llmq.errors import SpecError
from llmq.families import skeleton
from llmq.moe import Bank, banks_of, fuse_, left_dense, merges, routers_of, unfuse_
from llmq.names import file_names
from llmq.unfused import take_apart


def filled(bank: Bank, state: dict[str, Tensor], name: str) -> None:
    """Give a bank the numbers of the fused parameters in `state`."""
    bank.to_empty(device="cpu")
    with torch.no_grad():
        for part in bank.parts():
            bank.get_parameter(part.name).copy_(part.of(state[f"{name}.{part.parameter}"][part.expert]))


@pytest.mark.parametrize("name", CONFIGS)
def test_bank_equals_the_fused_experts(name: str) -> None:
    model = model_of(name, torch.float64)
    ids = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        state = model.state_dict()
        banks = unfuse_(model)
        for path, bank in banks.items():
            filled(bank, state, path)
        found = model(ids).logits
    assert all(bank.rows is None for bank in banks.values()), "no expert is running any more"
    assert len(banks) == (1 if name.startswith("deepseek") else 2)
    # gate and up are one product there and two here: the same sums, in another order at most
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


class Experts(nn.Module):
    """Experts like those of transformers; the decorator below says in which layout."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        shapes = config.shapes
        for local, shape in shapes.items():
            self.register_parameter(local, nn.Parameter(torch.empty(shape, device="meta")))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


def reference(fused: dict[str, Tensor], layout: dict[str, bool], x: Tensor, picked: Tensor, w: Tensor) -> Tensor:
    """Return what experts of a layout make of `x`: token by token, from the description of the decorator."""
    first = fused["gate_up_proj" if layout["has_gate"] else "up_proj"]
    down = fused["down_proj"]
    if layout["is_transposed"]:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    out = torch.zeros_like(x)
    for t, k in product(range(len(x)), range(picked.shape[1])):
        expert = int(picked[t, k])
        if expert >= len(first):
            continue
        y = first[expert] @ x[t]
        if layout["has_bias"]:
            y = y + fused["gate_up_proj_bias" if layout["has_gate"] else "up_proj_bias"][expert]
        if layout["has_gate"]:
            half = len(y) // 2
            gate, up = (y[:half], y[half:]) if layout["is_concatenated"] else (y[::2], y[1::2])
            y = nn.functional.silu(gate) * up
        else:
            y = nn.functional.silu(y)
        y = down[expert] @ y
        if layout["has_bias"]:
            y = y + fused["down_proj_bias"][expert]
        out[t] += w[t, k] * y
    return out


@pytest.mark.parametrize("flags", list(product((False, True), repeat=4)))
def test_every_layout_that_the_decorator_describes(flags: tuple[bool, ...]) -> None:
    layout = dict(zip(("is_concatenated", "is_transposed", "has_bias", "has_gate"), flags, strict=True))
    if layout["has_gate"] and not layout["is_concatenated"]:

        def apply_gate(self: nn.Module, y: Tensor) -> Tensor:
            return self.act_fn(y[..., ::2]) * y[..., 1::2]

        cls = type("Interleaved", (Experts,), {"_apply_gate": apply_gate})
    else:
        cls = type("Plain", (Experts,), {})
    e, width, inner = 3, 5, 4
    first, joined = ("gate_up_proj", 2 * inner) if layout["has_gate"] else ("up_proj", inner)
    flip = (lambda e, n, k: (e, k, n)) if layout["is_transposed"] else (lambda e, n, k: (e, n, k))
    shapes = {first: flip(e, joined, width), "down_proj": flip(e, width, inner)}
    if layout["has_bias"]:
        shapes |= {f"{first}_bias": (e, joined), "down_proj_bias": (e, width)}
    config = PretrainedConfig()
    config.shapes = shapes
    model = nn.Module()
    model.add_module("experts", use_experts_implementation(**layout)(cls)(config))
    generator = torch.Generator().manual_seed(0)
    fused = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    banks = unfuse_(model)
    filled(banks["experts"], {f"experts.{name}": tensor for name, tensor in fused.items()}, "experts")
    x, weights = torch.randn(6, width, generator=generator), torch.rand(6, 2, generator=generator)
    picked = torch.tensor([[0, 1], [2, 0], [1, 2], [e, 0], [1, e], [0, 2]])  # e: picks nothing, as transformers has it
    expected = reference(fused, layout, x, picked, weights)
    torch.testing.assert_close(model.experts(x, picked, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_projections_have_the_names_of_files(name: str, tmp_path: Path) -> None:
    source = CheckpointReader(make_moe(tmp_path, name))
    model = skeleton(CONFIGS[name], torch.float32)
    apart, banks = take_apart(source, model)
    names = file_names(model, apart.keys())
    path, *projections = FILE_NAMES[name]
    for bank, module in banks.items():
        assert list(module.names) == projections, "gate, up, down, in this order"
        for expert, projection in product(range(EXPERTS), projections):
            block = ".".join(bank.split(".")[:3])
            assert names[f"{bank}.{expert}.{projection}.weight"] == f"{block}.{path}.{expert}.{projection}.weight"
    assert set(model.state_dict()) == set(names), "every tensor of the model is in the files"
    assert set(apart) == set(names.values()), "and the other way round"
    assert sum(apart.info(key).nbytes for key in apart) == sum(source.info(key).nbytes for key in source)
    for key in apart:
        assert tuple(apart.read(key).shape) == apart.info(key).shape
        assert apart.read(key).is_contiguous()


def test_rows_of_a_presented_tensor(tmp_path: Path) -> None:
    source = CheckpointReader(make_moe(tmp_path, "gpt_oss"))
    apart, _ = take_apart(source, skeleton(CONFIGS["gpt_oss"], torch.float32))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    whole = source.read("model.layers.0.mlp.experts.gate_up_proj")[2].T[1::2]
    assert torch.equal(apart.read(name), whole)
    assert torch.equal(apart.read(name, slice(3, 9)), whole[3:9])


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_are_found_and_shared_experts_are_not(name: str) -> None:
    model = skeleton(CONFIGS[name], torch.float32)
    banks = unfuse_(model)
    local = "router" if name == "gpt_oss" else "gate"
    assert routers_of(model, banks) == [f"{bank.removesuffix('experts')}{local}" for bank in banks]


def test_the_gate_of_a_shared_expert_is_a_router() -> None:
    model = skeleton(CONFIGS["qwen3_moe"], torch.float32)
    (first, *_), mlp = unfuse_(model), model.model.layers[0].mlp
    mlp.shared_expert = nn.Sequential(nn.Linear(64, EXPERTS), nn.Linear(EXPERTS, 64))  # as narrow as a router
    mlp.shared_expert_gate = nn.Linear(64, 1)
    assert routers_of(model, [first]) == ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]


def test_a_bank_gives_its_module_back() -> None:
    model = skeleton(CONFIGS["mixtral"], torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    for name, bank in unfuse_(model).items():
        fuse_(model, bank, name)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not banks_of(model)


def test_only_conversions_of_experts_merge_them() -> None:
    model = skeleton(CONFIGS["mixtral"], torch.float32)
    banks = unfuse_(model)
    own = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightConverter)]
    assert [merges(converter, banks) for converter in own] == [True, True]
    other = WeightConverter("attn.qkv.weight", ["attn.q_proj.weight", "attn.k_proj.weight"], operations=[Chunk(dim=0)])
    assert not merges(other, banks)
    assert not merges(own[0], {})


@pytest.mark.parametrize("make", [lambda: torch.empty(4, 8, 6), lambda: torch.empty(4, 6, 8)])
def test_matrices_in_an_unknown_form_are_refused(make: Callable[[], Tensor]) -> None:
    block = nn.Module()
    block.add_module("experts", nn.Module())
    block.experts.register_parameter("w13", nn.Parameter(make()))
    with pytest.raises(SpecError, match=r"layers\.0\.experts: Module keeps 4 matrices .* w13 .*--ignore"):
        left_dense([("layers.0", block)], [])
    assert left_dense([("layers.0", block)], ["k_proj", "experts$"]) == {"layers.0.experts": "--ignore experts$"}


def test_convolutions_and_single_tables_are_no_experts() -> None:
    block = nn.Module()
    block.add_module("conv", nn.Conv1d(4, 4, 3))
    block.register_parameter("table", nn.Parameter(torch.empty(1, 4, 6)))
    assert left_dense([("layers.0", block)], []) == {}
