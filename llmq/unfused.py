"""Checkpoints whose experts are apart, whatever form their files have.

Files mostly hold experts one by one, but some families (GPT-OSS), and whatever was saved from memory as it is, have
one parameter of three dimensions for all. `take_apart` gives a model banks of linear layers in any case and, in the
latter, presents the files as if they held experts one by one: what reads, checks and writes tensors sees no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.checkpoint import CheckpointReader
from llmq.moe import Bank, Part, fuse_, unfuse_
from llmq.names import file_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnfusedReader(CheckpointReader):
    """A checkpoint that presents fused parameters as the tensors that are in them.

    Args:
        inner: the checkpoint.
        parts: by the names that tensors are to have, the fused parameter's name in the files, and where in it they are.
    """

    def __init__(self, inner: CheckpointReader, parts: dict[str, tuple[str, Part]]) -> None:
        self.path, self.config, self.close = inner.path, inner.config, inner.close
        self._inner, self._parts = inner, parts
        fused = {key for key, _ in parts.values()}
        self._infos = {key: inner.info(key) for key in inner if key not in fused}
        for name, (key, part) in parts.items():
            info = inner.info(key)
            shape = tuple(part.of(torch.empty(info.shape[1:], device="meta")).shape)
            nbytes = torch.Size(shape).numel() * info.dtype.itemsize
            self._infos[name] = info._replace(shape=shape, nbytes=nbytes)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return tensor `name`, or only `rows` of its first dimension; see `CheckpointReader.read`."""
        if name not in self._parts:
            return self._inner.read(name, rows)
        key, part = self._parts[name]
        tensor = part.of(self._inner.read(key, slice(part.expert, part.expert + 1))[0])
        return (tensor if rows is None else tensor[rows]).contiguous()


def take_apart(
    source: CheckpointReader, model: PreTrainedModel, ignore: Iterable[str] = ()
) -> tuple[CheckpointReader, dict[str, Bank]]:
    """Put banks in the place of fused experts in `model`, and return them with a `source` whose names are theirs.

    Where `ignore`, regular expressions, finds all linears of a bank, and the files hold it fused, it stays as it is.

    Raises:
        SpecError: files keep a model's experts in a way that llmq does not know.
    """
    patterns = [re.compile(pattern) for pattern in ignore]
    whole = file_names(model, source.keys(), merged=False)
    banks = unfuse_(model)
    parts: dict[str, tuple[str, Part]] = {}
    for name, bank in list(banks.items()):
        fused = {part.parameter for part in bank.parts() if f"{name}.{part.parameter}" in whole}
        if not fused:
            continue
        linears = {f"{name}.{part.name.rpartition('.')[0]}" for part in bank.parts()}
        if all(any(pattern.search(linear) for pattern in patterns) for linear in linears):
            fuse_(model, banks.pop(name), name)
            continue
        for part in bank.parts():
            if part.parameter in fused:
                key = whole[f"{name}.{part.parameter}"]
                parts[f"{key.removesuffix(part.parameter)}{part.name}"] = key, part
    return (UnfusedReader(source, parts) if parts else source), banks
