"""Packed models under accelerate's device maps, as far as a CPU shows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from serving_cases import layers
from transformers import AutoModelForCausalLM

import llmq.hf
from llmq.errors import SpecError

IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize("kind", [("gptq", 4, True), ("awq", 4, False), ("compressed-tensors", 3, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_map_loads_the_same_model(kind: tuple[Any, ...], dtype: torch.dtype, packed: Callable[..., Path]) -> None:
    """The map "auto" goes through transformers' loader, the others through llmq's own."""
    folder = packed(kind[1], 32, kind[2], kind[0])
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=where)
        for where in (None, "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"})
    ]
    for model in models[1:]:
        for name, layer in layers(model).items():
            first = layers(models[0])[name]
            assert layer.kernel == first.kernel is not None
            assert layer._buffers.keys() == first._buffers.keys()
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(layer.buffers(), first.buffers(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), models[0].parameters(), strict=True))
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, models[0](IDS).logits)


def test_packed_layers_have_their_packed_size(packed: Callable[..., Path]) -> None:
    folder = packed(2, 64, True)
    model = llmq.load(folder, dtype=torch.float32)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    dense = sum(4 * layer.in_features * layer.out_features for layer in layers(model).values())
    assert dense > size / 2
    room = size + 4096  # rotary frequencies are in no file
    found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", max_memory={"cpu": room}
    )
    assert layers(found)
    with pytest.raises(SpecError, match="on disk; packed layers run where they are"):
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="auto", max_memory={"cpu": int(0.9 * size)}
        )


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "on disk"),
        ({"model": 0, "lm_head": "cpu"}, "on the CPU, beside 0"),
    ],
)
def test_maps_that_move_weights_for_each_call_are_refused(
    device_map: dict[str, Any], message: str, packed: Callable[..., Path]
) -> None:
    with pytest.raises(SpecError, match=message):
        AutoModelForCausalLM.from_pretrained(packed(), device_map=device_map)


def test_on_the_meta_device_layers_keep_the_shapes_of_files(packed: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(), device_map={"": "meta"})
    for layer in layers(model).values():
        assert layer.kernel is None
        assert {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()} == layer.stored
        assert all(buffer.is_meta for buffer in layer.buffers())


def test_hooks_of_accelerate_leave_packed_layers_intact(packed: Callable[..., Path]) -> None:
    model = llmq.load(packed(), dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
        parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        dispatched = dispatch_model(model, {**parts, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
        assert torch.equal(dispatched(IDS).logits, expected)
        offloaded = cpu_offload(llmq.load(packed(), dtype=torch.bfloat16), "cpu")
        assert torch.equal(offloaded(IDS).logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dispatched.state_dict().items())


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_no_tensor_is_reported_as_missing_or_left_over(device_map: str | None, packed: Callable[..., Path]) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(packed(), device_map=device_map, output_loading_info=True)
    assert not any(found.values())
    assert not any("qweight" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)
