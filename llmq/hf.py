"""transformers plug-in: importing this module makes `from_pretrained` load GPTQ folders with llmq's packed layers.

transformers keeps two tables, quantization method to configuration class and to quantizer class. The rows for "gptq"
are replaced by the classes below; `disable` puts the old ones back. Nothing else of transformers is touched, and
checkpoints of other methods load as before.

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
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint import CheckpointReader, TensorInfo, resolve, tensor_infos
from llmq.errors import CheckpointError, SpecError
from llmq.families import auto_class
from llmq.formats import FORMATS
from llmq.moe import Bank, fuse_, merges, unfuse_
from llmq.names import file_names
from llmq.nn import QuantLinear
from llmq.types import QuantSpec

_METHOD = "gptq"
_OPTIONAL = ("g_idx",)  # old files lack it
_OWNED = ("qweight", "qzeros", "scales", "g_idx")  # local names that only packed layers have


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
    """Let llmq load GPTQ checkpoints in this process; importing the module does it."""
    _PREVIOUS.setdefault("config", auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD])
    _PREVIOUS.setdefault("quantizer", auto.AUTO_QUANTIZER_MAPPING[_METHOD])
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = StoredConfig
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = PackedQuantizer
    if find_spec("peft") is not None:
        from llmq import lora

        lora.enable()


def disable() -> None:
    """Give GPTQ checkpoints back to transformers' own loader."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _PREVIOUS["config"]
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _PREVIOUS["quantizer"]
    if find_spec("peft") is not None:
        from llmq import lora

        lora.disable()


class StoredConfig(QuantizationConfigMixin):
    """A quantization_config exactly as the file has it, so that saving writes back what was read."""

    def __init__(self, **stored: Any) -> None:
        self.quant_method = stored.get("quant_method", _METHOD)
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json gets."""
        return dict(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: there are no defaults to leave out."""
        return self.to_dict()

    @property
    def spec(self) -> QuantSpec:
        """What the packed layers look like.

        Raises:
            CheckpointError: a key is missing or names a layout that llmq does not read.
        """
        layout = self.stored.get("checkpoint_format") or self.stored.get("format") or _METHOD
        if layout not in FORMATS:
            known = ", ".join(FORMATS)
            raise CheckpointError(f"quantization_config: unknown checkpoint_format {layout!r}; llmq reads {known}")
        if self.stored.get("bits") not in (2, 3, 4, 8):
            raise CheckpointError(f"quantization_config: bits is {self.stored.get('bits')!r}; llmq reads 2, 3, 4 and 8")
        group_size = self.stored.get("group_size", -1)
        return QuantSpec(self.stored["bits"], group_size, bool(self.stored.get("sym", True)), layout)


class PackedQuantizer(HfQuantizer):
    """Swaps linear layers for `QuantLinear` before the weights arrive, and prepares kernels after."""

    quantization_config: StoredConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._banks: dict[str, Bank] = {}  # of experts that are packed
        if not self.pre_quantized:
            raise SpecError("llmq.hf loads packed checkpoints; make one with `llmq quantize`, or call disable() first")

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
        banks = _take_apart(model, infos)
        packed = file_names(model, infos, packed_suffix=".qweight")
        spec = self.quantization_config.spec
        check_headers(model, infos, packed, spec)
        for weight_name, qweight in packed.items():
            name = weight_name.removesuffix(".weight")
            parent_name, _, local = name.rpartition(".")
            old = model.get_submodule(name)
            n, k = _linear_shape(old, name)
            absent = [x for x in _OPTIONAL if f"{qweight.removesuffix('qweight')}{x}" not in infos]
            new = QuantLinear(k, n, spec, bias=old.bias is not None, dtype=dtype or torch.float32, absent=absent)
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
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.prepare_(model.dtype)
        return model


def check_headers(
    model: PreTrainedModel, infos: dict[str, TensorInfo], packed: dict[str, str], spec: QuantSpec
) -> None:
    """Check that the files hold whole packed layers of the right shapes, and no packed tensors besides.

    Raises:
        CheckpointError: they do not.
    """
    if not packed:
        raise CheckpointError("quantization_config says gptq, but the files hold no packed weight of the model")
    accounted = set()
    for weight_name, qweight in packed.items():
        name, prefix = weight_name.removesuffix(".weight"), qweight.removesuffix("qweight")
        n, k = _linear_shape(model.get_submodule(name), name)
        for local, (shape, dtype) in FORMATS[spec.format].layout(spec, n, k).items():
            key = prefix + local
            accounted.add(key)
            if key not in infos and local in _OPTIONAL:
                continue
            if key not in infos:
                raise CheckpointError(f"packed tensor {key} is missing; the checkpoint is incomplete")
            found = infos[key]
            if found.shape != shape or found.dtype.is_floating_point != dtype.is_floating_point:
                raise CheckpointError(
                    f"{found.file}: packed tensor {key} is {found.dtype} {list(found.shape)}; a layer of {n} outputs "
                    f"and {k} inputs at {spec.bits} bits, group_size {spec.group_size}, has {dtype} {list(shape)}"
                )
    stray = [key for key in infos if key.rpartition(".")[2] in _OWNED and key not in accounted]
    if stray:
        raise CheckpointError(f"packed tensor {stray[0]} belongs to no linear layer of the model ({len(stray)} such)")


def _take_apart(model: PreTrainedModel, infos: dict[str, TensorInfo]) -> dict[str, Bank]:
    """Put banks of linear layers in the place of the fused experts that the files have apart, and return them."""
    whole = file_names(model, infos, merged=False)
    banks = unfuse_(model)
    for name, bank in list(banks.items()):
        if any(f"{name}.{part.parameter}" in whole for part in bank.parts()):
            fuse_(model, banks.pop(name), name)
    return banks


def _linear_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        k, n = module.weight.shape
        return n, k
    raise CheckpointError(f"{name}: the files hold a packed weight for a {type(module).__name__}, which is not linear")


def _where(files: Iterable[str] | None) -> str:
    return str(Path(next(iter(files or ["checkpoint"]))).parent)


_PREVIOUS: dict[str, Any] = {}
enable()
