"""transformers plug-in: importing this module makes `from_pretrained` load packed folders with llmq's packed layers.

transformers keeps two tables, quantization method to configuration class and to quantizer class. The rows for the
methods in `llmq.formats.METHODS` are replaced; `disable` puts the old ones back. Nothing else of transformers is
touched: other methods, and folders of these methods whose layout is none of llmq's, load as before.

Which layers are packed is read from the headers of the files, not guessed from the configuration: a tensor that is
missing, left over or of the wrong shape is an error, where transformers alone would go on with random weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint import CheckpointReader, ShardReader, TensorInfo, resolve, tensor_infos
from llmq.embedding import QuantEmbedding, TiedHead, pack_embedding_
from llmq.errors import CheckpointError, SpecError
from llmq.families import auto_class
from llmq.filling import Unread, prepare_
from llmq.formats import METHODS
from llmq.fusion import unite_
from llmq.moe import Bank, fuse_, merges
from llmq.names import file_names
from llmq.nn import QuantLinear
from llmq.packed import PackedLayer, packed_layers
from llmq.packed_experts import gather_, is_gathered
from llmq.places import banks_apart, placed
from llmq.publishing import publish_with_card_
from llmq.shared_inputs import sharing


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
        if method not in _PREVIOUS:
            _PREVIOUS[method] = tuple(table.get(method) for table in _tables())
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = StoredConfig
        auto.AUTO_QUANTIZER_MAPPING[method] = PackedQuantizer
    if find_spec("peft") is not None:
        from llmq import lora

        lora.enable()


def disable() -> None:
    """Give packed checkpoints back to transformers' own loaders."""
    for method, rows in _PREVIOUS.items():
        for table, row in zip(_tables(), rows, strict=True):
            if row is None:
                table.pop(method, None)
            else:
                table[method] = row
    if find_spec("peft") is not None:
        from llmq import lora

        lora.disable()


def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    return auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING


def reads(config: dict[str, Any]) -> bool:
    """Return whether llmq loads folders with this quantization_config.

    Those of gptq, and of methods that transformers does not know, are never left to others.
    """
    method = config["quant_method"]
    try:
        METHODS[method].specs(config, [])
    except CheckpointError:
        return bool(method == "gptq") or _PREVIOUS[method][0] is None
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

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredConfig:
        # transformers copies configurations a dozen times while it loads; nobody changes this one
        return self

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

    def __getnewargs__(self) -> tuple[QuantizationConfigMixin]:
        return (self.quantization_config,)  # for copies of a model, which has its quantizer

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._banks: dict[str, Bank] = {}  # of experts that are packed
        self._unread: Unread | None = None
        self._sharing: list[tuple[str, ...]] = []  # packed layers that see the same input

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on packed weights: yes. The weights themselves stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generation may compile the model: yes, the operators have fake implementations.

        Not so where packed experts run one by one: which of them do depends on the data.
        """
        return all(is_gathered(bank) for bank in self._banks.values())

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes, with the tensors that were loaded."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that would bring weights to a device for each call.

        Raises:
            SpecError: parts are on disk, or on a CPU beside GPUs.
        """
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            where = "on disk" if "disk" in places else f"on the CPU, beside {', '.join(sorted(places - {'cpu'}))}"
            raise SpecError(
                f"device_map puts parts of a packed model {where}; packed layers run where they are: allow more memory "
                '(max_memory), use more GPUs, or load all of it with device_map="cpu"'
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        infos = tensor_infos(checkpoint_files or [])
        banks = banks_apart(model, infos)
        with ShardReader(infos) as reader:
            layers = packed_layers(self.quantization_config.stored, infos, reader.read)
        places = placed(model, infos, layers)
        self._sharing = sharing(model, places)
        device = _only_device(device_map)
        modules = dict(model.named_modules())  # `get_submodule` walks to each from the top
        for name, layer in places.items():
            if isinstance(modules[name], nn.Embedding):
                pack_embedding_(model, name, layer.stored, dtype or torch.float32, empty=device is not None)
                continue
            parent_name, _, local = name.rpartition(".")
            bias = getattr(modules[name], "bias", None) is not None
            n, k = layer.shape
            spec, layout = layer.stored.spec, layer.stored.layout
            buffers = "meta" if device is None else None
            new = QuantLinear(k, n, spec, bias=bias, dtype=dtype or torch.float32, layout=layout, device=buffers)
            setattr(modules[parent_name], local, new)
            model.all_tied_weights_keys.pop(f"{name}.weight", None)  # a head with codes of its own is tied to nothing
        self._check_dense(model, infos, places, _where(checkpoint_files))
        if device is not None:
            self._unread = Unread(infos, places, device)
            _ignored(model).add(self._unread.pattern)
        publish_with_card_(model, Path(_where(checkpoint_files)), places)
        if any(isinstance(module, QuantLinear) for bank in banks.values() for module in bank.modules()):
            self._banks = banks
        else:  # dense experts are transformers' own business
            for name, bank in banks.items():
                fuse_(model, bank, name)
        return model

    def _check_dense(
        self, model: PreTrainedModel, infos: Mapping[str, TensorInfo], places: Mapping[str, PackedLayer], where: str
    ) -> None:
        """Check that the files have all tensors of the model that belong to no packed layer."""
        owned = {key for layer in places.values() for key in layer.keys.values()}
        packed = {f"{name}.{local}" for name, layer in places.items() for local in layer.keys}
        there = file_names(model, [key for key in infos if key not in owned])
        missing = set(model.state_dict()) - packed - set(there) - set(model.all_tied_weights_keys)
        optional = model._keys_to_ignore_on_load_missing or []
        missing = {name for name in missing if not any(re.search(pattern, name) for pattern in optional)}
        if missing:
            raise CheckpointError(f"{where}: tensor {min(missing)} is missing ({len(missing)} in all)")

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Return the conversions between files and model, without those that would merge experts that are packed."""
        kept = [x for x in weight_conversions if not (isinstance(x, WeightConverter) and merges(x, self._banks))]
        updated: list[Any] = super().update_weight_conversions(kept, model)  # type: ignore[no-untyped-call]
        return updated

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        dtype = model.dtype
        if self._unread is not None:
            _ignored(model).discard(self._unread.pattern)
            self._unread.read_(model, dtype)
            self._unread = None
        else:
            for name, module in model.named_modules():
                if isinstance(module, (QuantLinear, QuantEmbedding)):
                    prepare_(module, name, dtype)
        unite_(model, self._sharing)
        for bank in self._banks.values():
            gather_(bank, dtype)
        for module in model.modules():  # after the embeddings, of which they are made
            if isinstance(module, TiedHead):
                module.prepare_(dtype)
        return model


def _only_device(device_map: Any) -> torch.device | None:
    """Return the one device that a model is loaded to, or None where several are possible, or none is real."""
    places = {"cpu"} if device_map is None else set(device_map.values()) if isinstance(device_map, dict) else set()
    if len(places) != 1:
        return None
    device = torch.device(places.pop())
    return None if device.type == "meta" else device


def _ignored(model: PreTrainedModel) -> set[str]:
    """Return the expressions for tensors of files that `model` does not miss; the set is the model's own."""
    found: Any = model._keys_to_ignore_on_load_unexpected
    assert isinstance(found, set), "transformers makes it when it makes a model"
    return found


def _where(files: Iterable[str] | None) -> str:
    return str(Path(next(iter(files or ["checkpoint"]))).parent)


_PREVIOUS: dict[str, tuple[Any, ...]] = {}  # configuration and quantizer of each method; None: there was none
enable()
