"""The native rows of the kernel table: when they are the choice, and that everything else works as without them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_cases import needs_compiler
from safetensors.torch import load_file
from serving_cases import layers
from torch import nn

import llmq
from llmq import ops
from llmq.errors import LlmqError
from llmq.formats.streams import Stream
from llmq.nn import QuantLinear
from llmq.types import QuantSpec
from llmq_kernels import native
from llmq_kernels.native import build

CPU = torch.device("cpu")


def chosen(bits: int, group_size: int, dtype: torch.dtype, k: int = 128, symmetric: bool = True) -> str:
    return ops.choose(ops.Layer(bits, group_size, symmetric, 64, k), CPU, dtype)


def on_a_processor(monkeypatch: pytest.MonkeyPatch, *, pairs: bool) -> None:
    monkeypatch.setattr(build, "_library", lambda *_: None)
    monkeypatch.setattr(build, "has_pairs", lambda kernels: pairs)


def test_products_of_pairs_are_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, pairs=True)
    assert {chosen(bits, 32, torch.bfloat16) for bits in range(2, 9)} == {"cpu_native"}
    assert chosen(8, 128, torch.bfloat16) == "cpu_native"
    assert chosen(4, 20, torch.bfloat16, k=20) == "cpu_native"  # one group, of any length
    assert chosen(4, 16, torch.bfloat16) == "cpu_native_float"
    assert chosen(4, 32, torch.float32) == chosen(4, 32, torch.float16) == "cpu_native_float"
    assert chosen(4, 20, torch.float32) == "reference"


def test_without_them_the_operators_of_pytorch_are(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, pairs=False)
    assert chosen(4, 32, torch.bfloat16) == "cpu_int4pack"
    assert chosen(8, 128, torch.bfloat16) == "cpu_int8pack"
    assert chosen(3, 32, torch.bfloat16) == chosen(8, 32, torch.bfloat16) == "cpu_native_float"
    reason = ops.KERNELS["cpu_native"].refuses(ops.Layer(4, 32, True, 64, 128), CPU, torch.bfloat16)
    assert reason == "this processor has no dot products of bfloat16 (AVX512_BF16)"


@pytest.mark.usefixtures("no_native")
def test_where_nothing_is_compiled_all_is_as_before() -> None:
    assert chosen(4, 32, torch.bfloat16) == "cpu_int4pack"
    assert chosen(8, 128, torch.bfloat16) == "cpu_int8pack"
    assert chosen(3, 32, torch.bfloat16) == chosen(4, 32, torch.float32) == "reference"


def test_a_gpu_is_none_of_their_business() -> None:
    for row in ("cpu_native", "cpu_native_float"):
        reason = ops.KERNELS[row].refuses(ops.Layer(4, 32, True, 64, 128), torch.device("cuda"), torch.bfloat16)
        assert reason == "runs on a CPU, not on cuda"


def test_zeros_out_of_range_are_not_taken() -> None:
    stream = Stream(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 1), torch.tensor([[16], [17]]).to(torch.uint8))
    with pytest.raises(ValueError, match="zeros of 16 to 17: 4 bits need 0 to 16"):
        ops.KERNELS["cpu_native"].pack(stream, ops.Layer(4, 32, False, 2, 32), torch.bfloat16)


@needs_compiler
def test_a_cast_keeps_the_very_tensors(packed: Callable[..., Path]) -> None:
    model = llmq.load(packed(4, 64, True), dtype=torch.float32)
    layer = next(iter(layers(model).values()))
    before = [tensor.data_ptr() for tensor in layer.packed()]
    device, dtypes = torch.device("cpu"), (torch.bfloat16, torch.float16, torch.float32)
    native = [dtype for dtype in dtypes if ops.choose(layer.layer, device, dtype).startswith("cpu_native")]
    assert native[-2:] == [torch.float16, torch.float32]  # bfloat16 where the processor has products of it
    for dtype in native:
        assert layer(torch.ones(1, layer.in_features, dtype=dtype)).dtype == dtype
    assert [tensor.data_ptr() for tensor in layer.packed()] == before


@needs_compiler
def test_finer_scales_of_a_file_are_used_as_they_are(packed: Callable[..., Path]) -> None:
    """bfloat16 would round them; products of a few tokens do not."""
    model = llmq.load(packed(4, 64, True), dtype=torch.bfloat16)
    layer = next(iter(layers(model).values()))
    if layer.kernel != "cpu_native":
        pytest.skip(f"this processor runs {layer.kernel}")
    layer.get_buffer("packed_1").mul_(1 + 2**-10)
    x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    exact = layer.quantized_weight().dequantize().double().sum(1)
    assert torch.equal(layer(x)[0], exact.to(torch.bfloat16))
    assert layer._buffers.get("exact_scales") is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_layers_read_at_once_save_what_they_read(
    packed: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = packed(3, 32, False)
    llmq.load(folder, dtype=dtype).save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if "proj" in key)


def layer_of(bits: int, dtype: torch.dtype) -> QuantLinear:
    spec = QuantSpec(bits, 32, True, "llmq")
    layer = QuantLinear(64, 24, spec, bias=True, dtype=dtype, device="cpu")
    assert layer.bias is not None
    layer.bias.data.fill_(0.5)
    draw = torch.Generator().manual_seed(0)
    layer.get_buffer("codes").random_(generator=draw)
    layer.get_buffer("scales").uniform_(0.01, 0.02, generator=draw)
    return layer


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_and_the_short_way_agree(dtype: torch.dtype) -> None:
    layer = layer_of(5, dtype)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    short = layer(x)
    assert short.shape == (2, 3, 24)
    plain = (*layer.layer[:4], layer.layer.grid)
    assert torch.equal(short, ops.quant_matmul(x, layer.packed(), layer.bias, layer.kernel, *plain))
    torch.library.opcheck(ops.quant_matmul, (x, layer.packed(), layer.bias, layer.kernel, *plain))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), short)
    watched = x.clone().requires_grad_()
    assert torch.equal(layer(watched), short)
    layer(watched).sum().backward()
    assert watched.grad is not None
    assert layer(x[:0]).shape == (0, 3, 24)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning")
def test_what_watches_sees_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names += (str(func),)
            return func(*args, **(kwargs or {}))

    layer, x = layer_of(4, torch.float32), torch.ones(1, 64)
    layer(x)
    with Seen() as seen:
        layer(x)
    assert any("quant_matmul" in name for name in seen.names)
    assert layer(nn.Parameter(x)).grad_fn is not None
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(2 * x), layer(2 * x))


def test_where_nothing_runs_every_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BITS", range(0))
    monkeypatch.setattr(ops, "KERNELS", {name: row for name, row in ops.KERNELS.items() if name != "reference"})
    with pytest.raises(LlmqError, match="cpu_native_float: bits 2: multiplies with codes of 2 to 8 bits"):
        chosen(2, 32, torch.float32)
