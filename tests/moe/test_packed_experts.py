"""Packed experts run at once: they compute, save, move and train as they do one by one."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from command_line import llmq as llmq_command
from moe_cases import CPU, make_moe, windows
from native_cases import needs_compiler
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import llmq
from llmq import expert_ops
from llmq.choices import choices
from llmq.driver import quantize
from llmq.moe import Bank, banks_of
from llmq.nn import QuantLinear
from llmq.packed_experts import PackedExperts, gather_, is_gathered
from llmq.recipe import make_recipe

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]  # gate and up joined, of one size with down, interleaved with biases
IDS = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return packed models: rounded to nearest, which is the fastest way to have one."""
    found = {}
    for name in FAMILIES:
        path = tmp_path_factory.mktemp(name)
        source = make_moe(path / "dense", name)
        recipe = make_recipe({"group_size": 32, "method": "rtn", "sym": name == "mixtral"})
        quantize(source, path / "packed", recipe, calibration=windows(2, 8))
        found[name] = path / "packed"
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the products with all experts of a bank, by their rows."""
    seen: list[int] = []
    real = expert_ops.matmul
    monkeypatch.setattr(
        expert_ops, "matmul", lambda x, stack, routes: seen.append(len(routes[0])) or real(x, stack, routes)
    )
    return seen


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def one_by_one(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Return the logits of a model whose banks run their experts one by one."""
    banks = banks_of(model).values()
    kept = [bank.together for bank in banks]
    try:
        for bank in banks:
            bank.together = None
        return logits(model, ids)
    finally:
        for bank, together in zip(banks, kept, strict=True):
            bank.together = together


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by the order of sums only: by a few roundings of the activations of two layers."""
    eps = torch.finfo(expected.dtype).eps
    return bool((found - expected).abs().max() <= 16 * eps * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_together_they_compute_what_they_do_alone(
    name: str, dtype: torch.dtype, folders: dict[str, Path], calls: list[int]
) -> None:
    model = llmq.load(folders[name], dtype=dtype)
    assert model.hf_quantizer.is_compileable
    for ids in (IDS, IDS[:1, :1]):
        calls.clear()
        found = logits(model, ids)
        assert calls == [2 * ids.numel()] * 4, "two products of each of two layers"
        expected = one_by_one(model, ids)
        assert len(calls) == 4
        assert close(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_loaded(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = llmq.load(folders[name])
    logits(model)
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert f"model.layers.0.mlp.experts.3.{'w2' if name == 'mixtral' else 'down_proj'}.qweight" in state
    assert torch.equal(logits(llmq.load(tmp_path)), logits(model))


def test_scales_of_several_dtypes_stay_what_they_are(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["qwen3_moe"], dtype=torch.float32)
    expected, state = logits(model), model.state_dict()
    for bank in banks_of(model).values():
        linear = bank.get_submodule("2").gate_proj
        linear._buffers["packed_1"] = linear._buffers["packed_1"].float()  # as where halves do not hold them
        gather_(bank, torch.float32)
        assert is_gathered(bank)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_weight_is_in_memory_once(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["gpt_oss"])
    for bank in banks_of(model).values():
        together = bank.together
        assert isinstance(together, PackedExperts)
        held = together._held
        assert held is not None
        stacks = {t.untyped_storage().data_ptr() for s in (held.first, held.last) for t in (*s.packed, s.bias)}
        linears = [module for module in bank.modules() if isinstance(module, QuantLinear)]
        own = {t.untyped_storage().data_ptr() for m in linears for t in (*m.packed(), m.bias)}
        assert own == stacks


def moved(model: PreTrainedModel, how: str) -> PreTrainedModel:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "bfloat16 and back":
        for dtype in (torch.bfloat16, torch.float32):  # transformers refuses to cast the model as a whole
            for bank in banks_of(model).values():
                bank.to(dtype)
                bank(torch.ones(1, 64, dtype=dtype), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
        return model
    if how == "restored":
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.restore_()
        return model
    file = io.BytesIO()
    torch.save(banks_of(model), file)
    file.seek(0)
    for name, bank in torch.load(file, weights_only=False).items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], bank)
    return model


@pytest.mark.parametrize("how", ["deepcopy", "bfloat16 and back", "restored", "pickled"])
def test_moved_models_put_their_own_experts_together(how: str, folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["qwen3_moe"], dtype=torch.float32)
    expected = logits(model)
    other = moved(model, how)
    calls.clear()
    assert torch.equal(logits(other), expected)
    assert len(calls) == 4
    if how == "deepcopy":
        first = next(iter(banks_of(other).values()))
        first.get_submodule("0").down_proj.restore_()
        assert torch.equal(logits(model), expected), "what happens to the copy is its own business"


def test_another_state_is_taken(folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["gpt_oss"], dtype=torch.float32)
    before = logits(model)
    state = model.state_dict()
    for key, tensor in list(state.items()):
        if ".experts.2." in key and key.endswith("bias"):
            state[key] = tensor + 1
        elif ".experts.1." in key and key.endswith("qweight"):
            state[key] = tensor.flip(0)
    model.load_state_dict(state)
    found = logits(model)
    assert not close(found, before)
    assert len(calls) == 8
    assert close(found, one_by_one(model))
    with torch.no_grad():
        for bank in banks_of(model).values():
            bank.get_submodule("0").down_proj.bias.add_(3)  # in place: the stack has the same memory
    after = logits(model)
    assert not close(after, found)
    assert close(after, one_by_one(model))


def test_a_hook_on_one_linear_is_called(folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["mixtral"], dtype=torch.float32)
    expected, seen = logits(model), []
    bank = next(iter(banks_of(model).values()))
    linear = bank.projections(1)[1]
    for register in (linear.register_forward_hook, linear.register_forward_pre_hook):
        calls.clear()
        handle = register(lambda *_: seen.append(1))
        assert close(logits(model), expected)
        assert len(calls) == 2, "the other layer's bank goes on"
        assert len(seen) == 1
        seen.clear()
        handle.remove()
        assert torch.equal(logits(model), expected)
        assert len(calls) == 6
    original = linear.forward
    linear.forward = lambda x: seen.append(1) or original(x)
    logits(model)
    assert seen


def test_models_on_several_devices_run_experts_at_once_on_each(folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["mixtral"], dtype=torch.float32)
    expected = logits(model)
    for bank in banks_of(model).values():  # as accelerate does where a device map has several
        attach_execution_device_hook(bank, torch.device("cpu"))
        assert "forward" in vars(bank.projections(0)[1])
    calls.clear()
    assert torch.equal(logits(model), expected)
    assert len(calls) == 4
    add_hook_to_module(bank.projections(0)[1], AlignDevicesHook("cpu", offload=True))
    logits(model)
    assert len(calls) == 6


def test_an_adapter_on_experts_is_used_and_trained(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["gpt_oss"], dtype=torch.float32)
    expected = logits(model)
    bank = banks_of(model)["model.layers.0.mlp.experts"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["2.down_proj", "1.up_proj"], init_lora_weights=False), bank)
    found = logits(model)
    assert not close(found, expected)
    assert close(found, one_by_one(model))
    model(IDS, use_cache=False, labels=IDS).loss.backward()
    trained = [p for n, p in bank.named_parameters() if "lora_" in n]
    assert len(trained) == 4
    assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_whole_model_is_one_graph(name: str, folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders[name], dtype=torch.float32)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), expected)
    ids = IDS.flip(1)
    assert torch.equal(logits(compiled, ids), logits(model, ids))


def test_a_moved_model_is_compiled_anew(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["qwen3_moe"], dtype=torch.float32)
    bank = next(iter(banks_of(model).values()))
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    x, picked, weights = torch.randn(6, 64), torch.arange(12).view(6, 2) % 5, torch.rand(6, 2)
    with torch.no_grad():
        expected = bank(x, picked, weights)
        assert torch.equal(compiled(x, picked, weights), expected)
        bank.to(torch.bfloat16).to(torch.float32)
        for linear in (module for module in bank.modules() if isinstance(module, QuantLinear)):
            linear.prepare_(torch.float32)
        assert torch.equal(compiled(x, picked, weights), expected)


def test_static_caches_generate_the_same(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["mixtral"], dtype=torch.float32)
    plain: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], **plain)
    found = model.generate(IDS[:1], cache_implementation="static", disable_compile=True, **plain)
    assert torch.equal(found, expected)


def test_gradients_are_those_of_one_by_one(folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["gpt_oss"], dtype=torch.float32)
    bank = next(iter(banks_of(model).values()))
    draw = torch.Generator().manual_seed(0)
    bank.requires_grad_(False)
    x = torch.randn(7, 64, generator=draw, requires_grad=True)
    weights = torch.rand(7, 2, generator=draw, requires_grad=True)
    picked = torch.tensor([[0, 1], [2, 0], [1, 2], [4, 0], [1, 4], [3, 2], [4, 4]])  # 4: none
    grads = []
    for together in (bank.together, None):
        bank.together = together
        y = bank(x, picked, weights)
        assert len(calls) == 2
        grads.append((y, *torch.autograd.grad(y.square().sum(), (x, weights))))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not grads[0][0][6].any()


def test_a_bias_that_is_trained_gets_its_gradient(folders: dict[str, Path]) -> None:
    model = llmq.load(folders["gpt_oss"], dtype=torch.float32)
    bias = banks_of(model)["model.layers.0.mlp.experts"].get_submodule("1").down_proj.bias
    bias.requires_grad_()
    model(IDS, use_cache=False, labels=IDS).loss.backward()
    assert bias.grad is not None
    assert bias.grad.any()


def test_experts_that_differ_run_one_by_one(folders: dict[str, Path], calls: list[int]) -> None:
    model = llmq.load(folders["qwen3_moe"], dtype=torch.float32)
    expected = logits(model)
    calls.clear()
    bank = banks_of(model)["model.layers.1.mlp.experts"]
    other = copy.deepcopy(bank.get_submodule("2").up_proj)
    other.register_buffer("order", torch.arange(64), persistent=False)  # as of a file with its columns out of order
    bank.get_submodule("2").up_proj = other
    gather_(bank, torch.float32)
    assert not is_gathered(bank)
    assert not model.hf_quantizer.is_compileable
    assert close(logits(model), expected)
    assert len(calls) == 2


@needs_compiler
def test_it_is_said_how_experts_are_run(folders: dict[str, Path], request: pytest.FixtureRequest) -> None:
    def said() -> dict[str, str | None]:
        return {choice.example: choice.experts for choice in choices(folders["mixtral"], CPU, torch.float32)}

    assert {said()[name] for name in said() if "experts" in name} == {"at once"}
    assert {said()[name] for name in said() if "experts" not in name} == {None}
    assert "experts at once" in " ".join(
        llmq_command("kernels", folders["mixtral"], "--dtype", "float32").stdout.split()
    )
    request.getfixturevalue("no_native")
    assert {said()[name] for name in said() if "experts" in name} == {"one by one"}


def test_no_tokens_and_one_of_them(folders: dict[str, Path]) -> None:
    bank: Bank = next(iter(banks_of(llmq.load(folders["qwen3_moe"], dtype=torch.float32)).values()))
    with torch.no_grad():
        for rows in (0, 1):
            picked = torch.zeros(rows, 2, dtype=torch.int64)
            assert bank(torch.randn(rows, 64), picked, torch.rand(rows, 2)).shape == (rows, 64)


def test_picks_of_any_strides_and_kind(folders: dict[str, Path]) -> None:
    bank: Bank = next(iter(banks_of(llmq.load(folders["qwen3_moe"], dtype=torch.float32)).values()))
    x, wide = torch.randn(5, 64), torch.arange(15).view(5, 3) % 4
    with torch.no_grad():
        for picked in (wide[:, :1], wide[:, ::2], wide.T[:2].T):
            weights = torch.rand(picked.shape)
            expected = bank(x, picked.clone(memory_format=torch.contiguous_format), weights)
            assert torch.equal(bank(x, picked, weights), expected)
            assert torch.equal(bank(x, picked.int(), weights), expected)
