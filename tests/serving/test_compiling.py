"""torch.compile and generation with a static cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from serving_cases import layers
from transformers import CompileConfig

import llmq

KINDS = [
    (torch.float32, "compressed-tensors", 3, False),
    (torch.bfloat16, "gptq", 4, False),
]


@pytest.mark.parametrize(("dtype", "format", "bits", "sym"), KINDS)
def test_the_whole_model_is_one_graph(
    dtype: torch.dtype, format: str, bits: int, sym: bool, packed: Callable[..., Path]
) -> None:
    model = llmq.load(packed(bits, 32, sym, format), dtype=dtype)
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert all(layer.kernel is not None for layer in layers(model).values())


def test_a_static_cache_gives_the_same_tokens(packed: Callable[..., Path]) -> None:
    model = llmq.load(packed(), dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    ids = torch.randint(1, 128, (1, 5), generator=torch.Generator().manual_seed(0))
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **plain)
    assert expected.shape == (1, 11)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **plain), expected)
    # compiled on request: by itself transformers compiles on accelerators only
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=config, **plain)
    assert torch.equal(found, expected)
