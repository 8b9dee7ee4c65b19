"""Saving and pushing packed models: what transformers does, and the model card.

transformers writes a card of its own where it pushes, and none where it saves. A packed model gets both methods anew,
on the instance; its class, and all other models, are as they were. The card is that of the folder which the model was
loaded from, as it stands there, or where there is none, made from what the layers are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from llmq.card import CARD, CERTIFICATE, RELATION, Facts, card, card_in, metadata_of, packed_base_of, report_in
from llmq.checkpoint import read_json
from llmq.errors import CheckpointError
from llmq.packed import PackedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def publish_with_card_(model: PreTrainedModel, folder: Path, places: Mapping[str, PackedLayer]) -> None:
    """Let `model`, loaded from `folder` with packed layers in `places`, save and push its card with it."""
    own: dict[str, Any] = {"save_pretrained": save_pretrained, "push_to_hub": push_to_hub}
    for name, function in own.items():
        setattr(model, name, MethodType(function, model))
    vars(model)[_SOURCE] = (folder, dict(places))


def _card(model: PreTrainedModel) -> str:
    """Return the card of a packed model."""
    folder, places = vars(model)[_SOURCE]
    text = card_in(folder)
    if metadata_of(text).get("base_model_relation") == RELATION:
        return text
    return card(_facts(model, folder, places), text)


def _facts(model: PreTrainedModel, folder: Path, places: Mapping[str, PackedLayer]) -> Facts:
    try:
        certificate = read_json(folder / CERTIFICATE)
    except CheckpointError:
        certificate = None
    return Facts(
        packed_base_of(card_in(folder)),
        type(model).__name__,
        {name: layer.stored.spec for name, layer in places.items()},
        {name: layer.shape for name, layer in places.items()},
        report=report_in(folder),
        certificate=certificate,
    )


def save_pretrained(
    self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save as transformers does, with the model card; with `push_to_hub`, upload the folder too."""
    text = _card(self)  # now: the folder may be the same
    repo_id = kwargs.pop("repo_id", None) or Path(save_directory).absolute().name
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    folder = Path(save_directory)
    if not folder.is_dir() or kwargs.get("is_main_process") is False:
        return
    (folder / CARD).write_text(text, encoding="utf-8")
    if push_to_hub:
        _upload(folder, repo_id, hub | ({"token": kwargs["token"]} if "token" in kwargs else {}))


def push_to_hub(self: PreTrainedModel, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
    """Upload model and card to the hub and return the address of the commit; options as for transformers' method."""
    unknown = kwargs.keys() - _HUB
    if unknown:
        raise TypeError(f"push_to_hub() got an unexpected keyword argument {min(unknown)!r}")
    with tempfile.TemporaryDirectory() as name:
        self.save_pretrained(name, max_shard_size=max_shard_size)
        return _upload(Path(name), repo_id, kwargs)


_SOURCE = "_llmq_source"  # attribute of packed models
_HUB = {"commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"}


def _upload(folder: Path, repo_id: str, options: Mapping[str, Any]) -> str:
    """Upload a folder, and return the address of the commit."""
    from huggingface_hub import HfApi, ModelCard

    rest = dict(options)
    api = HfApi(token=rest.pop("token", None))
    repo_id = api.create_repo(repo_id, private=rest.pop("private", None), exist_ok=True).repo_id
    tags = rest.pop("tags", None) or []
    if tags:
        found: Any = ModelCard((folder / CARD).read_text(encoding="utf-8"))
        found.data.tags = list(dict.fromkeys([*(found.data.tags or []), *tags]))
        (folder / CARD).write_text(str(found), encoding="utf-8")
    message = rest.pop("commit_message", None) or "Upload packed model"
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **rest))
