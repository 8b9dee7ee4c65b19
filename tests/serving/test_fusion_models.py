"""Whole models whose layers share their inputs: loaded, compiled, saved, adapted, shown."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq as run
from fusion_cases import Products, exact, random_input, random_layer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from serving_cases import layers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmq.hf
from llmq import fusion, ops
from llmq.choices import Together, together
from llmq.fusion import Fused

CPU = torch.device("cpu")
NAMES = {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
ALONE = [64, 32, 32, 64, 128, 128, 64] * 2  # outputs of the layers of both blocks, in the order of calls
ONE = [128, 64, 256, 64] * 2


def groups(model: nn.Module) -> set[Fused]:
    return {layer.fused for layer in layers(model).values() if layer.fused is not None}


def local_names(model: nn.Module, group: Fused) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name, layer in layers(model).items() if layer in group.members)


@torch.no_grad()
def step(model: Any, tokens: int = 1) -> Tensor:
    """Return hidden states: what a dense head returns depends on where its weight lies in memory."""
    found: Tensor = model.model(torch.arange(1, 1 + tokens)[None], use_cache=False).last_hidden_state
    return found


@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_has_one_product_for_each_input(
    dtype: torch.dtype, device_map: str | None, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    products = Products(monkeypatch, tokens=1)
    model = AutoModelForCausalLM.from_pretrained(packed(4, 32, False), dtype=dtype, device_map=device_map)
    assert {local_names(model, group) for group in groups(model)} == NAMES
    if any(layer.kernel == "cpu_int4pack" for layer in layers(model).values()):
        pytest.skip("no native kernels here, and this model's keys are fewer than PyTorch's operator takes together")
    assert all(group.kernel is not None for group in groups(model))
    together = step(model)
    assert products.taken() == ONE
    many = step(model, 2)
    assert products.taken() == ALONE
    for layer in layers(model).values():
        layer.fused = None
    assert torch.equal(step(model), together)  # rows of a weight are independent of each other
    assert torch.equal(step(model, 2), many)
    assert products.taken() == 2 * ALONE


def test_state_dicts_are_those_of_layers_by_themselves(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Products(monkeypatch, tokens=1)
    folder = packed(3, 32, False)
    model = llmq.load(folder, dtype=torch.float32)
    logits = step(model)
    stored = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in model.state_dict().items())
    model.load_state_dict(model.state_dict())
    assert torch.equal(step(model), logits)
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(step(llmq.load(tmp_path, dtype=torch.float32)), logits)
    assert torch.equal(step(twin), logits)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(step(again), logits)
    assert {local_names(again, group) for group in groups(again)} == NAMES


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_an_adapter_on_one_of_them_gets_what_it_should(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llmq.load(packed(), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.eval()
    products = Products(monkeypatch, tokens=1)
    for group in groups(adapted):
        group.settle_()
    found = step(adapted.model)
    assert products.taken() == ONE
    for layer in layers(adapted).values():
        layer.fused = None
    assert torch.equal(step(adapted.model), found)


class Parent(nn.Module):
    """Three layers of one input, and a last one."""

    def __init__(self, *, bias: bool = False, columns: Tensor | None = None) -> None:
        super().__init__()
        made = [random_layer(n, bias=bias, columns=columns, seed=n) for n in (40, 24, 64)]
        self.q, self.k, self.v = made
        for layer in made:
            layer.prepare_(torch.float32)
        Fused(made)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class Graphs:
    """A compiler that keeps what it is given."""

    def __init__(self) -> None:
        self.products: list[int] = []  # of each graph

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.products.append(sum("quant_matmul" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


@pytest.mark.parametrize("plain", [True, False])
def test_a_compiled_graph_has_one_product_and_is_made_once(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "TOKENS", {"cpu": 4})
    columns = torch.arange(128).view(2, 64).flip(0).flatten()
    parent = Parent() if plain else Parent(bias=True, columns=columns)
    assert (parent.q.columns() is None) == plain
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(parent, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for m, products in ((1, [1]), (1, []), (3, [1]), (2, []), (9, [3]), (1, [])):
            x = random_input(m, seed=m)
            assert torch.equal(compiled(x), parent(x))
            assert graphs.products == products, m
            graphs.products.clear()
        assert fusion._waiting.x is None
    with torch.enable_grad():
        x = random_input(1).requires_grad_()
        compiled(x).sum().backward()
        assert graphs.products == [3]
        assert x.grad is not None


def test_a_graph_that_breaks_between_them_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "TOKENS", {"cpu": 4})

    class Broken(Parent):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            q = self.q(x)
            torch._dynamo.graph_break()
            k = self.k(x)
            x.add_(1)
            torch._dynamo.graph_break()
            return torch.cat([q, k, self.v(x)], -1)

    parent = Broken()
    torch._dynamo.reset()
    compiled = torch.compile(parent, backend="eager")
    with torch.no_grad():
        for seed in range(3):
            x = random_input(2, seed=seed)
            expected = torch.cat(
                [exact(layer, y) for layer, y in zip(parent.children(), (2 * x, 2 * x, 2 * x + 1), strict=True)], -1
            )
            assert torch.allclose(compiled(x).double(), expected, atol=1e-4)
            assert torch.allclose(parent(x).double(), expected, atol=1e-4)
        parent.q(x), parent.k(x), parent.v(x)  # the last part was of another input: it waits until the next


def test_a_traced_graph_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "TOKENS", {"cpu": 4})
    parent = Parent()
    with torch.no_grad():
        exported = torch.export.export(parent, (random_input(2),)).module()
        assert torch.equal(exported(x := random_input(2, seed=1)), parent(x))


@pytest.mark.usefixtures("no_native")
def test_what_is_one_product_is_shown(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "TOKENS", {"cpu": 1, "cuda": 64})
    folder = packed(4, 32, True)
    fine = {
        (names, 2, sum({"q": 64, "g": 128, "u": 128}.get(name[0], 32) for name in names), 1, None) for names in NAMES
    }
    assert {tuple(vars(x).values()) for x in together(folder, CPU, torch.float32)} == fine
    shown = run("kernels", folder, "--dtype", "float32").output
    assert "q_proj, k_proj, v_proj" in shown
    assert "up to 1 token" in shown
    found = json.loads(run("kernels", folder, "--json").output)["fused"]
    assert {x["refused"] for x in found if "q_proj" in x["names"]} == {
        "cpu_int4pack arranges 64 outputs together; 32 is no multiple"
    }
    assert {x["refused"] for x in found if "up_proj" in x["names"]} == {None}


def test_what_is_shown_is_what_is_done(broken: Callable[..., Path], packed: Callable[..., Path]) -> None:
    def shuffled(tensors: dict[str, Any]) -> None:
        draw = torch.Generator().manual_seed(0)
        most, one = (torch.randperm(64, generator=draw) for _ in range(2))
        for key in [key for key in tensors if key.endswith("g_idx") and "down_proj" not in key]:
            tensors[key] = tensors[key][one if "layers.1.self_attn.k_proj" in key else most]

    folder = broken(shuffled)
    model = llmq.load(folder, dtype=torch.float32)
    whole = sorted(local_names(model, group) for group in groups(model) if group.kernel is not None)
    shown = together(folder, CPU, torch.float32)
    assert sorted(x.names for x in shown if x.refused is None for _ in range(x.groups)) == whole
    assert len(whole) == 3
    assert [x.refused for x in shown if x.refused] == ["columns are in different orders"]
    with torch.no_grad():
        for name, layer in layers(model).items():
            x = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
            assert torch.allclose(layer(x).double(), exact(layer, x), atol=1e-3), name
    step(model)


def test_reasons_name_what_differs(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, row = packed(), ops.KERNELS["reference"]
    monkeypatch.setattr(ops, "choose", lambda layer, *_: "reference" if layer.out_features == 32 else "cpu_native")
    refused = {x.refused for x in together(folder, CPU, torch.float32) if "q_proj" in x.names}
    assert refused == {"kernels differ: cpu_native, reference"}
    monkeypatch.setattr(ops, "choose", lambda *_: "reference")
    monkeypatch.setitem(ops.KERNELS, "reference", row._replace(outputs=None))
    assert {x.refused for x in together(folder, CPU, torch.float32)} == {"reference does not divide its arrangement"}
    assert isinstance(together(folder, CPU, torch.float32)[0], Together)
