"""transformers plug-in: importing this module makes `from_pretrained` load packed folders with llmq's packed layers.

transformers keeps two tables, quantization method to configuration class and to quantizer class. The rows for the
methods in `llmq.formats.METHODS` are replaced; `disable` puts the old ones back. Nothing else of transformers is
touched: other methods, and folders of these methods whose layout is none of llmq's, load as before.

Which layers are packed is read from the headers of the files, not guessed from the configuration: a tensor that is
missing, left over or of the wrong shape is an error, where transformers alone would go on with random weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint import CheckpointReader, read_from, resolve, tensor_infos
from llmq.errors import CheckpointError, SpecError
from llmq.families import auto_class
from llmq.formats import METHODS
from llmq.moe import Bank, fuse_, merges
from llmq.names import file_names
from llmq.nn import QuantLinear
from llmq.packed import packed_layers
from llmq.places import banks_apart, placed


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
) -> PreTrainedModel:
    """Return the model in folder or hub id `model`, with its head, packed layers packed, in eval mode.

    Args:
        model: a packed or dense checkpoint folder, or a hub id.
        dtype: dtype of activations and dense weights; None: the checkpoint's own.
        device: where to put it; None: the CPU.
        adapter: a LoRA adapter folder to put on it, such as `llmq adapter` writes; needs peft.

    Raises:
        CheckpointError: the folder is not a checkpoint, or its tensors do not fit its configuration.
    """
    path = resolve(model)
    CheckpointReader(path)
    loaded: PreTrainedModel = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(
        path, dtype=dtype or "auto", device_map=None if device is None else {"": device}
    )
    if adapter is not None:
        loaded.load_adapter(str(adapter))
    return loaded


def enable() -> None:
    """Let llmq load packed checkpoints in this process; importing the module does it."""
    for method in METHODS:
        _PREVIOUS.setdefault(
            method, (auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method], auto.AUTO_QUANTIZER_MAPPING[method])
        )
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = StoredConfig
        auto.AUTO_QUANTIZER_MAPPING[method] = PackedQuantizer
    if find_spec("peft") is not None:
        from llmq import lora

        lora.enable()


def disable() -> None:
    """Give packed checkpoints back to transformers' own loaders."""
    for method, (config, quantizer) in _PREVIOUS.items():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
        auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
    if find_spec("peft") is not None:
        from llmq import lora

        lora.disable()


def reads(config: dict[str, Any]) -> bool:
    """Return whether llmq loads folders with this quantization_config; those of gptq are never left to others."""
    method = config["quant_method"]
    try:
        METHODS[method].specs(config, [])
    except CheckpointError:
        return bool(method == "gptq")
    return True


class StoredConfig(QuantizationConfigMixin):
    """A quantization_config exactly as the file has it, so that saving writes back what was read."""

    def __init__(self, **stored: Any) -> None:
        self.quant_method = stored["quant_method"]
        self.stored = stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the configuration that config.json has: one of this class, or transformers' own for other layouts."""
        if reads(config_dict):
            return cls(**config_dict)
        own = _PREVIOUS[config_dict["quant_method"]][0]
        return own.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json gets."""
        return dict(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: there are no defaults to leave out."""
        return self.to_dict()


class PackedQuantizer(HfQuantizer):
    """Swaps linear layers for `QuantLinear` before the weights arrive, and prepares kernels after."""

    quantization_config: StoredConfig

    def __new__(cls, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> Any:
        """Return a loader of packed folders, or transformers' own quantizer for all that is none."""
        if isinstance(quantization_config, StoredConfig):
            return super().__new__(cls)
        method = quantization_config.quant_method
        return _PREVIOUS[getattr(method, "value", method)][1](quantization_config, **kwargs)

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._banks: dict[str, Bank] = {}  # of experts that are packed

    @property
    def is_trainable(self) -> bool:
        """Whether packed weights can be trained: no."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether generation may compile the model: yes, the operator has a fake implementation.

        Not so where experts are packed: which of them run depends on the data.
        """
        return not self._banks

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes, with the tensors that were loaded."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise SpecError("device_map puts packed layers on disk; give them memory on a CPU or GPU")
        infos = tensor_infos(checkpoint_files or [])
        banks = banks_apart(model, infos)
        layers = packed_layers(self.quantization_config.stored, infos, lambda name: read_from(infos, name))
        for name, layer in placed(model, infos, layers).items():
            parent_name, _, local = name.rpartition(".")
            bias = getattr(model.get_submodule(name), "bias", None) is not None
            n, k = layer.shape
            stored = layer.stored
            new = QuantLinear(k, n, stored.spec, bias=bias, dtype=dtype or torch.float32, layout=stored.layout)
            setattr(model.get_submodule(parent_name), local, new)
        missing = set(model.state_dict()) - set(file_names(model, infos)) - set(model.all_tied_weights_keys)
        optional = model._keys_to_ignore_on_load_missing or []
        missing = {name for name in missing if not any(re.search(pattern, name) for pattern in optional)}
        if missing:
            where = _where(checkpoint_files)
            raise CheckpointError(f"{where}: tensor {min(missing)} is missing ({len(missing)} in all)")
        if any(isinstance(module, QuantLinear) for bank in banks.values() for module in bank.modules()):
            self._banks = banks
        else:  # dense experts are transformers' own business
            for name, bank in banks.items():
                fuse_(model, bank, name)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Return the conversions between files and model, without those that would merge experts that are packed."""
        kept = [x for x in weight_conversions if not (isinstance(x, WeightConverter) and merges(x, self._banks))]
        updated: list[Any] = super().update_weight_conversions(kept, model)  # type: ignore[no-untyped-call]
        return updated

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                try:
                    module.prepare_(model.dtype)
                except CheckpointError as error:
                    raise CheckpointError(f"{name}: {error}") from error
        return model


def _where(files: Iterable[str] | None) -> str:
    return str(Path(next(iter(files or ["checkpoint"]))).parent)


_PREVIOUS: dict[str, tuple[Any, Any]] = {}
enable()
