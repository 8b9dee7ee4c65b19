"""Names in the module tree against names in checkpoint files.

They differ: files of a base model lack the prefix of its head model (``h.0.…`` for ``transformer.h.0.…``), and
transformers renames keys of older files. The mapping is asked of transformers, which loads by it; there is no copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmq.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def file_names(
    model: PreTrainedModel, keys: Iterable[str], packed_suffix: str = "", *, merged: bool = True
) -> dict[str, str]:
    """Return the file's name of each parameter and buffer of `model` that the file's `keys` contain.

    With `packed_suffix` (``.qweight``) only keys with that ending count, each standing for the module's weight. Without
    `merged` what the files have in pieces is left out, instead of refused.

    Raises:
        SpecError: a weight inside the model is fused from several tensors of the file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()
    found: dict[str, str] = {}
    for key in keys:
        if not key.endswith(packed_suffix):
            continue
        source = key.removesuffix(packed_suffix) + ".weight" if packed_suffix else key
        # as transformers would; apart, where the experts of the model are apart like those of the files; as it is
        for first, second in ((renamings, converters if merged else []), (renamings, []), ([], [])):
            name, fused = rename_source_key(source, first, second, model.base_model_prefix, known)
            if name in known:
                break
        if fused is not None and name in known:
            raise SpecError(
                f"{type(model).__name__}: {name} is put together from several tensors of the files ({key} is one); "
                "llmq takes apart what it knows as experts only"
            )
        if name in known:
            found[name] = key
    return found
