"""Brings the tensors of a checkpoint into the skeleton of its model, part by part, and takes them away again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from llmq.preflight import Job


class Loader:
    """The model of a job on its device, of which only what was asked for is in memory."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.device = device

    def outer(self) -> None:
        """Load everything around the blocks, and the head."""
        prefix = f"{self.job.structure.blocks_name}."
        names = [name for name in self.job.model.state_dict() if not name.startswith(prefix)]
        self._materialize(names)
        self.job.model.tie_weights()
        self._move_buffers(self.job.model)

    def block(self, index: int) -> nn.Module:
        """Return block number `index` with its tensors on the device."""
        name, block = self.job.structure.blocks_name, self.job.structure.blocks[index]
        self._materialize(f"{name}.{index}.{key}" for key in block.state_dict())
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
