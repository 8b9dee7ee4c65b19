"""Brings the tensors of a checkpoint into the skeleton of its model, part by part, and takes them away again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmq.preflight import Job


class Loader:
    """The model of a job on its device, of which only what was asked for is in memory."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.device = device

    def outer(self) -> None:
        """Load everything around the blocks, and the head; also first blocks that compute something for all others."""
        structure = self.job.structure
        self._materialize(self._outside())
        if structure.family.shared:
            for index in structure.starts:
                self.block(index)
        self.job.model.tie_weights()
        self._move_buffers(self.job.model)

    @property
    def has_entrance(self) -> bool:
        """Whether `entrance` is enough to reach the first block: there is one stack, and one module of embeddings."""
        structure = self.job.structure
        return len(structure.starts) == 1 and not structure.family.shared

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Let the model run up to its first block, with as little of it in memory as that takes.

        Of what is around the blocks, token embeddings are read row by row where tokens ask for them, and the head is
        not read at all. Nothing stays.
        """
        model = self.job.model
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        large = {id(part.weight) for part in (embeddings, head) if part is not None}
        state = model.state_dict(keep_vars=True)
        names = [name for name in self._outside() if id(state[name]) not in large]
        self._materialize(names)
        self._move_buffers(model)
        try:
            with self._rows_of(embeddings):
                yield
        finally:
            for name in names:
                parent, _, child = name.rpartition(".")
                module = model.get_submodule(parent)
                value = getattr(module, child)
                if isinstance(value, nn.Parameter):
                    setattr(module, child, nn.Parameter(value.to("meta"), requires_grad=False))

    @contextmanager
    def _rows_of(self, embeddings: nn.Module) -> Iterator[None]:
        """Let token embeddings hold the rows of one call's tokens at a time."""
        name = next(name for name, module in self.job.model.named_modules() if module is embeddings)
        key = self.job.names[f"{name}.weight"]
        whole, padding = embeddings.weight, getattr(embeddings, "padding_idx", None)

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens, places = args[0].unique(return_inverse=True)
            rows = self._gather(key, tokens.cpu()).to(self.device, self.job.dtype)
            module.weight = nn.Parameter(rows, requires_grad=False)
            return places, *args[1:]

        handle = embeddings.register_forward_pre_hook(read)
        embeddings.padding_idx = None  # type: ignore[assignment]  # a row's number; of no effect without gradients
        try:
            yield
        finally:
            handle.remove()
            embeddings.padding_idx, embeddings.weight = padding, whole  # type: ignore[assignment]

    def _gather(self, key: str, rows: Tensor) -> Tensor:
        """Return rows of a tensor in the files, numbered in rising order; neighbours are read together."""
        ends = (rows.diff() != 1).nonzero().flatten() + 1
        runs = rows.tensor_split(ends)
        return torch.cat([self.job.source.read(key, slice(int(run[0]), int(run[-1]) + 1)) for run in runs])

    def _outside(self) -> list[str]:
        """Return the names of what is around the blocks."""
        prefixes = self.job.structure.prefixes
        return [name for name in self.job.model.state_dict() if not name.startswith(prefixes)]

    def block(self, index: int) -> nn.Module:
        """Return block number `index` with its tensors on the device."""
        prefix, block = self.job.structure.prefixes[index], self.job.structure.blocks[index]
        self._materialize(prefix + key for key in block.state_dict())
        self._move_buffers(block)
        return block

    def release(self, index: int) -> None:
        """Free the tensors of block number `index`."""
        self.job.structure.blocks[index].to("meta")

    def _move_buffers(self, part: nn.Module) -> None:
        """Bring what `part` computed instead of loading (rotary frequencies, scales of embeddings) to the device."""
        for module in part.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, key, buffer.to(self.device))

    def _materialize(self, names: Iterable[str]) -> None:
        """Read the tensors of these names from the files into the model."""
        from accelerate.utils import set_module_tensor_to_device

        for name in names:
            if name not in self.job.names:
                continue  # tied to another tensor, or a buffer that is computed
            tensor = self.job.source.read(self.job.names[name])
            dtype = self.job.dtype if tensor.is_floating_point() else tensor.dtype
            set_module_tensor_to_device(self.job.model, name, self.device, value=tensor, dtype=dtype)
