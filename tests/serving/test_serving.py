"""Packed checkpoints in transformers: kernels, memory, saving."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_cases import layers
from tolerance import assert_close_to_float64, relative_error
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

import llmq
from llmq import ops
from llmq.nn import QuantLinear
from llmq_kernels.native import build

# row of ops.KERNELS -> (bits, group size, sym, dtype) that it is the choice for: behind the native rows where nothing
# can be compiled. Triton's rows run in the interpreter
ROWS = {
    "cpu_native": [(4, 32, True, torch.bfloat16), (3, 64, False, torch.bfloat16), (8, -1, True, torch.bfloat16)],
    "cpu_native_float": [(2, 32, False, torch.float32), (4, 64, True, torch.float16), (8, 32, False, torch.float32)],
    "cpu_int4pack": [(4, 32, True, torch.bfloat16), (4, 64, False, torch.bfloat16)],
    "cpu_int8pack": [(8, -1, True, torch.bfloat16)],
    "triton_w4a16": [(4, 32, True, torch.float16), (4, 64, False, torch.float16), (4, -1, False, torch.float16)],
    "triton_w8a16": [(8, 32, True, torch.float16), (8, 64, False, torch.float16)],
    "triton_w3a16": [(3, 32, True, torch.float16), (3, 64, False, torch.float16)],
    "triton_w2a16": [(2, 32, False, torch.float16)],
    "reference": [
        (2, 32, False, torch.float32),
        (3, 32, True, torch.bfloat16),
        (4, 32, False, torch.float32),
        (8, 32, False, torch.float16),
    ],
}
# tests/serving/test_lut_rows.py, tests/vectors/test_vector_serving.py, tests/kernels/test_vectors_triton.py
ELSEWHERE = {"cpu_lut", "triton_lut", "cpu_vectors", "triton_vectors", "vectors"}
CPU = torch.device("cpu")
NATIVE = {"cpu_native": torch.bfloat16, "cpu_native_float": torch.float32}
CASES = [(row, *case) for row, cases in ROWS.items() for case in cases]


def test_every_row_of_the_kernel_table_is_covered() -> None:
    assert ROWS.keys() | ELSEWHERE == ops.KERNELS.keys()


def choose_row(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """Make `row` the choice: of Triton's on the CPU, where the interpreter runs them, of others where they would be."""
    if row.startswith("triton"):
        monkeypatch.setattr(ops, "choose", lambda *_: row)
    elif not row.startswith("cpu_native"):
        monkeypatch.setattr(build, "_library", lambda *_: build.BuildError("not in this test"))
    elif (reason := ops.KERNELS[row].refuses(ops.Layer(4, 64, True, 64, 64), CPU, NATIVE[row])) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("row", "bits", "group_size", "sym", "dtype"), CASES, ids=lambda v: str(v).rpartition(".")[2])
def test_packed_layers_and_logits_equal_the_dequantized_ones(
    row: str,
    bits: int,
    group_size: int,
    sym: bool,
    dtype: torch.dtype,
    dense: Path,
    packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_row(monkeypatch, row)
    model = llmq.load(packed(bits, group_size, sym), dtype=dtype)
    exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    for name, layer in layers(model).items():
        assert layer.kernel == row
        exact.get_submodule(name).weight.data.copy_(layer.quantized_weight().dequantize())

    def compare(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        assert isinstance(layer, QuantLinear)
        expected = args[0].double() @ layer.quantized_weight().dequantize().double().T
        assert out.dtype == dtype
        assert_close_to_float64(out, expected, layer.in_features)

    for layer in layers(model).values():
        layer.register_forward_hook(compare)
    ids = torch.randint(1, 128, (1, 17), generator=torch.Generator().manual_seed(1))
    rounded = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        expected = exact(ids).logits
        # the dense model in this dtype shows what two blocks of roundings are worth; packing must not add to it
        allowed = 1.5 * relative_error(rounded(ids).logits, expected)
        assert relative_error(model(ids).logits, expected) <= allowed


@pytest.mark.parametrize(("row", "bits", "group_size", "sym", "dtype"), CASES, ids=lambda v: str(v).rpartition(".")[2])
def test_saving_gives_back_the_tensors_that_were_loaded(
    row: str,
    bits: int,
    group_size: int,
    sym: bool,
    dtype: torch.dtype,
    packed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_row(monkeypatch, row)
    folder = packed(bits, group_size, sym)
    llmq.load(folder, dtype=dtype).save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        packed_tensor = key.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
        expected = tensor if packed_tensor else tensor.to(dtype)
        assert after[key].dtype == expected.dtype
        assert torch.equal(after[key], expected)
    configs = [json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_stay_packed_in_memory(packed: Callable[..., Path], dtype: torch.dtype) -> None:
    model = llmq.load(packed(4, 64, True), dtype=dtype)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64))
    weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
    resident = sum(b.nbytes for layer in layers(model).values() for b in layer.buffers())
    assert 8 * resident / weights <= 4.5  # 4 bits, a scale of 16 per 64, and at most another 16 for the zero
    assert not any(p.ndim == 2 and "proj" in name for name, p in model.named_parameters())


@pytest.mark.usefixtures("no_native")
def test_device_map_and_pipeline_and_generate(packed: Callable[..., Path]) -> None:
    folder = packed()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.bfloat16)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    generate = pipeline("text-generation", model=str(folder))
    assert layers(generate.model)
    text = generate("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w1 w2 w3")
    assert len(text) > len("w1 w2 w3")


@pytest.mark.usefixtures("no_native")
def test_moving_and_casting_a_model_keeps_its_codes(packed: Callable[..., Path]) -> None:
    model = llmq.load(packed(4, 32, False), dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "proj" in key}
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        # transformers forbids casting quantized models as a whole; their parts may be cast
        head, body = model.lm_head.float(), model.model.float()
        head(body(ids).last_hidden_state)
        assert {layer.kernel for layer in layers(model).values()} == {"reference"}
        body.half()(ids)
        head.to(torch.bfloat16)
        body.to(torch.bfloat16)(ids)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    other = llmq.load(packed(4, 32, True), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({"x": torch.ones(1)})
    model.load_state_dict({**model.state_dict(), **before})
    with torch.no_grad():
        model(ids)


@pytest.mark.usefixtures("no_native")
def test_scales_that_a_kernel_rounds_are_saved_exactly(packed: Callable[..., Path], tmp_path: Path) -> None:
    """A foreign file's float16 scales need not fit bfloat16."""
    content = load_file(packed() / "model.safetensors")
    for key in content:
        if key.endswith("scales"):
            content[key] = (content[key].float() * 1.0009765625).half()  # fills the last bits of float16
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((packed() / "config.json").read_bytes())
    model = llmq.load(tmp_path, dtype=torch.bfloat16)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    saved = model.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in content.items() if "proj" in key)


def test_operator_is_a_good_citizen(packed: Callable[..., Path]) -> None:
    layer = next(iter(layers(llmq.load(packed(), dtype=torch.float32)).values()))
    layer.prepare_(torch.float32)
    x = torch.randn(2, 3, layer.in_features)
    plain = (*layer.layer[:4], layer.layer.grid)
    torch.library.opcheck(ops.quant_matmul, (x, layer.packed(), None, "reference", *plain))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert layer(x[:0]).shape == (0, 3, layer.out_features)
