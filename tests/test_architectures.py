"""Every family that llmq is said to work with: quantized, packed, loaded, compared, saved again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, Family
from safetensors.torch import load_file
from tolerance import assert_close_to_float64, relative_error
from torch import Tensor, nn
from transformers import Gemma3TextConfig, GPT2Model
from transformers.pytorch_utils import Conv1D

import llmq
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.grids.uniform import UniformGrid
from llmq.nn import QuantLinear
from llmq.recipe import Recipe
from llmq.report import Report
from llmq.solvers.rtn import rtn

RECIPE = Recipe(group_size=32)


def windows() -> Calibration:
    ids = torch.randint(1, 100, (9, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, None, "random tokens", "none")


@dataclass(frozen=True)
class Made:
    """A model of a family, and what the default recipe made of it."""

    family: Family
    folder: Path
    report: Report

    @cached_property
    def original(self) -> Any:
        return self.family.auto.from_pretrained(self.folder / "dense")

    @cached_property
    def packed(self) -> Any:
        return llmq.load(self.folder / "packed")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights [N, K] of the packed linears."""
        packed = {name: m for name, m in self.packed.named_modules() if isinstance(m, QuantLinear)}
        return {name: m.quantized_weight().dequantize() for name, m in packed.items()}

    def holding(self) -> Any:
        """Return the original model with the weights of the packed one."""
        dense = self.family.auto.from_pretrained(self.folder / "dense")
        for name, weight in self.weights.items():
            linear = dense.get_submodule(name)
            linear.weight.data.copy_(weight.T if isinstance(linear, Conv1D) else weight)
        return dense


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    report = quantize(family.make(folder / "dense"), folder / "packed", RECIPE, calibration=windows())
    return Made(family, folder, report)


@pytest.mark.usefixtures("no_native")  # the reference computes the same numbers, to the last bit
def test_packed_model_equals_its_dequantized_self(made: Made) -> None:
    ids = torch.randint(1, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    found, expected = (made.family.logits(model, ids) for model in (made.packed, made.holding()))
    assert type(made.packed) is type(made.original)
    if made.family is FAMILIES["jamba"]:  # packed, it computes x + b - b in place of x
        assert_close_to_float64(found, expected.double(), 64)
    else:
        assert torch.equal(found, expected)  # float32: the same numbers
    assert relative_error(found, made.family.logits(made.original, ids).double()) > 1e-3
    by_transformers = made.family.auto.from_pretrained(made.folder / "packed")
    assert torch.equal(made.family.logits(by_transformers, ids), found)


def test_every_linear_of_the_blocks_is_packed(made: Made) -> None:
    config = json.loads((made.folder / "packed/config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["modules_in_block_to_quantize"] == made.family.stages
    assert set(made.weights) == {layer.name for layer in made.report.layers}
    assert made.report.dense["ignored_linears"] == {}
    linears = {name for name, m in made.original.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    dense = linears - set(made.weights)
    assert all(any(part in name for part in ("lm_head", "cls.", "vision", "visual", "projector")) for name in dense)


@torch.no_grad()
def test_default_loses_less_than_rounding_to_nearest(made: Made) -> None:
    # the activations that calibrate are the model's own: every layer does better than chance by far
    assert all(layer.relative_loss is not None and layer.relative_loss < 0.05 for layer in made.report.layers)
    grid = UniformGrid(4, symmetric=True)
    losses: dict[str, list[float]] = {}

    def watch(name: str, packed: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            w, x = (module.weight.T if isinstance(module, Conv1D) else module.weight), args[0].flatten(0, -2)
            nearest = rtn(w.contiguous(), None, grid, 32).weight.dequantize()
            energy = (x @ w.T).square().sum()
            losses[name] = [float((x @ (w - q).T).square().sum() / energy) for q in (packed, nearest)]

        return hook

    for name, weight in made.weights.items():
        made.original.get_submodule(name).register_forward_pre_hook(watch(name, weight))
    made.family.logits(made.original, windows().input_ids)
    ours, nearest = (sum(column) for column in zip(*losses.values(), strict=True))
    # Jamba calls this one where it is packed, and takes its weight where it is not
    assert all(name.endswith("mamba.dt_proj") for name in set(made.weights) - set(losses))
    assert ours < nearest


def test_all_else_is_copied(made: Made) -> None:
    before, after = (load_file(made.folder / part / "model.safetensors") for part in ("dense", "packed"))
    gone = {key for key in before if key not in after}
    assert len(gone) == len(made.report.layers)
    assert all(f"{key.removesuffix('weight')}qweight" in after for key in gone)
    assert all(torch.equal(before[key], after[key]) for key in before if key not in gone)
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (made.folder / "packed" / name).read_bytes() == (made.folder / "dense" / name).read_bytes()


def test_saving_writes_what_was_loaded(made: Made) -> None:
    made.packed.save_pretrained(made.folder / "again")
    before, after = (load_file(made.folder / part / "model.safetensors") for part in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.usefixtures("no_native")  # the reference computes the same numbers, to the last bit
def test_names_of_a_checkpoint_without_the_head_models_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2Model(FAMILIES["gpt2"].config).save_pretrained(tmp_path / "dense")  # keys start with h.0, as on the hub
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "dense/model.safetensors")
    report = quantize(tmp_path / "dense", tmp_path / "packed", RECIPE, calibration=windows())
    assert "h.0.attn.c_attn.qweight" in load_file(tmp_path / "packed/model.safetensors")
    made = Made(FAMILIES["gpt2"], tmp_path, report)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        assert torch.equal(made.packed(ids).logits, made.holding()(ids).logits)


def test_blocks_of_one_model_get_their_own_arguments(tmp_path: Path) -> None:
    """Gemma's blocks differ in attention mask and rotary table; feeding one block's to all changes the codes."""
    local = FAMILIES["gemma3"]
    whole = Family(Gemma3TextConfig(**{**local.config.to_dict(), "layer_types": ["full_attention"] * 2}), local.stages)
    quantize(local.make(tmp_path / "dense"), tmp_path / "a", RECIPE, calibration=windows())
    quantize(whole.make(tmp_path / "dense2"), tmp_path / "b", RECIPE, calibration=windows())
    a, b, *dense = (load_file(tmp_path / d / "model.safetensors") for d in ("a", "b", "dense", "dense2"))
    assert all(torch.equal(dense[0][key], dense[1][key]) for key in dense[0])  # the same weights, other masks
    key = "model.layers.0.self_attn.o_proj.qweight"
    assert not torch.equal(a[key], b[key])
