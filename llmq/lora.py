"""PEFT plug-in: LoRA adapters on packed layers.

PEFT keeps a table from the type of an adapter to the class that puts it on a model, and wraps layers by their class:
`QuantLinear` it does not know. `enable` replaces the table's row for LoRA by a subclass that does; the wrapper is
PEFT's own for GPTQ layers, which adds the adapter to the layer's output; gradients pass through the packed product.
Merging is refused: no codes stand for the sum. Models without packed layers are handled as before. `llmq.hf` calls it
where PEFT is installed.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from llmq.errors import SpecError
from llmq.nn import QuantLinear

_NO_MERGE = (
    "an adapter cannot be merged into packed weights: their sum is on no grid; save the adapter with save_pretrained "
    "and load it beside the packed model, or merge it into the dense model and quantize that"
)


def enable() -> None:
    """Let PEFT put LoRA adapters on packed layers in this process."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = PackedLoraModel


def disable() -> None:
    """Give LoRA back to PEFT's own class."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


class PackedLoraLinear(GPTQLoraLinear):
    """A packed layer and its adapters."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT would find the same numbers, and warn that it does not know the class
        assert isinstance(module, QuantLinear), "registered for QuantLinear alone"
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            SpecError: always.
        """
        raise SpecError(_NO_MERGE)


class PackedLoraModel(LoraModel):
    """LoRA on models that may have packed layers."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config._register_custom_module({QuantLinear: PackedLoraLinear})
        super()._prepare_model(peft_config, model)

    def _check_merge_allowed(self) -> None:
        if any(isinstance(module, PackedLoraLinear) for module in self.model.modules()):
            raise SpecError(_NO_MERGE)
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
