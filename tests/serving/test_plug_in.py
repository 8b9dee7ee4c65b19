"""What importing llmq.hf changes in transformers, and what it leaves alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers import auto

import llmq.hf


def test_disable_gives_transformers_its_own_loader_back() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is llmq.hf.PackedQuantizer
    llmq.hf.disable()
    try:
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
    finally:
        llmq.hf.enable()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is llmq.hf.PackedQuantizer


def test_importing_changes_the_rows_of_packed_methods_and_no_others() -> None:
    script = """
from transformers.quantizers import auto
from transformers import PreTrainedModel
tables = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
before, methods = [dict(table) for table in tables], dict(vars(PreTrainedModel))
import llmq.hf
from llmq.formats import METHODS
for table, old in zip(tables, before):
    assert {name for name in table if table[name] is not old.get(name)} == set(METHODS), table
assert dict(vars(PreTrainedModel)) == methods
llmq.hf.disable()
assert [dict(table) for table in tables] == before
llmq.hf.disable()
llmq.hf.enable()
llmq.hf.enable()
llmq.hf.disable()
assert [dict(table) for table in tables] == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


class Own:
    """Stands for what transformers would do by itself."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("transformers' own quantizer")

    @classmethod
    def from_dict(cls, *_: Any, **__: Any) -> None:
        raise NotImplementedError("transformers' own configuration")


def test_quantizing_while_loading_is_left_to_transformers(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llmq.hf._PREVIOUS, "gptq", (GPTQConfig, Own))
    with pytest.raises(NotImplementedError, match="own quantizer"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=GPTQConfig(bits=4, dataset="c4"))


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "awq", "version": "gemv", "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    ],
    ids=["awq gemv", "compressed-tensors fp8"],
)
def test_layouts_that_llmq_does_not_read_are_left_to_transformers(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = broken(**changes)
    monkeypatch.setitem(llmq.hf._PREVIOUS, changes["quant_method"], (Own, Own))
    with pytest.raises(NotImplementedError, match="own configuration"):
        AutoModelForCausalLM.from_pretrained(folder)
