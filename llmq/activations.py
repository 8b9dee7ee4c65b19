"""The hidden states of all calibration batches in front of one block, in memory, in files, or in both.

Files come in generations: what stands in front of block 3 is generation 3, and while the batches pass that block they
are written to generation 4, one by one. Generation 3 stays until the block is on record, so that a run killed between
two batches finds the states that it began the block with.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmq.disk import disk_errors, sync_path
from llmq.errors import CheckpointError
from llmq.ranks import ALONE, Ranks
from llmq.shards import HeaderError, read_tensors, write_tensors


def offload_folder(parent: str | Path, output: str | Path) -> Path:
    """Return the folder below `parent` for the states of the run that writes `output`: always the same one."""
    name = hashlib.sha256(str(Path(output).resolve()).encode()).hexdigest()[:16]
    return Path(parent) / f"llmq-states-{name}"


class HiddenStates:
    """Hidden states [B, L, D] of every batch; behaves like a list whose entries live where there is room.

    Args:
        device: where entries are when they are read.
        folder: where files are kept; None: no files, and nothing to restore from.
        cached: whether entries stay in memory too; without a folder they do in any case.
        ranks: who shares the folder. Each moves its own batches on, and reads those of others from their files.
    """

    def __init__(
        self, device: torch.device, folder: Path | None = None, *, cached: bool = True, ranks: Ranks = ALONE
    ) -> None:
        assert ranks.world == 1 or folder is not None, "ranks meet in files"
        self.device = device
        self.ranks = ranks
        self.generation = 0
        self._folder = folder
        self._cached = cached or folder is None
        self._memory: list[Tensor | None] = []
        self._moved: set[int] = set()  # batches that are in the next generation already

    @classmethod
    def restored(
        cls, device: torch.device, folder: Path, generation: int, *, cached: bool, ranks: Ranks = ALONE
    ) -> HiddenStates:
        """Return the states of a generation that was settled by an earlier process; ranks wait for each other after."""
        states = cls(device, folder, cached=cached, ranks=ranks)
        states.generation = generation
        settled = states._path(generation, 0).parent
        if not settled.is_dir():
            raise CheckpointError(
                f"{settled}: the hidden states of the unfinished run are gone; repeat it with the same --offload-dir, "
                "or pass --force to start over"
            )
        count = len(list(settled.iterdir()))
        states._memory = [None] * count
        if ranks.first:
            shutil.rmtree(folder / str(generation + 1), ignore_errors=True)  # of the block that was under way
        if cached:
            for batch in states.mine:
                states._memory[batch] = states._load(batch)
        return states

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, batch: int) -> Tensor:
        state = self._memory[batch]
        return (self._load(batch) if state is None else state).to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    @property
    def mine(self) -> list[int]:
        """The batches that this process moves on, once all are there."""
        return [batch for batch in range(len(self)) if self.ranks.owns(batch, len(self))]

    def append(self, state: Tensor, *, mine: bool = True) -> None:
        """Add the states of a further batch, at the same place as those that are there; another rank keeps its own.

        Raises:
            CheckpointError: the disk does not take them.
        """
        self._memory.append(None)
        if mine:
            self._put(len(self) - 1, state, self.generation)

    def __setitem__(self, batch: int, state: Tensor) -> None:
        """Let a batch, one of `mine`, move on to what the block made of it; errors as for `append`."""
        self._moved.add(batch)
        self._put(batch, state, self.generation + 1)

    def arrive(self) -> None:
        """Wait until all batches have moved on, those of other ranks too.

        Raises:
            Ended: another rank failed, or was lost.
        """
        self.ranks.barrier()
        self._moved = set(range(len(self)))

    def fork(self, folder: Path | None = None) -> HiddenStates:
        """Return the same states, which move on their own; their files go to `folder`."""
        assert len(self._moved) in (0, len(self)), "a fork is taken between two blocks"
        other = HiddenStates(self.device, folder, cached=self._cached, ranks=self.ranks)
        other.generation = self.generation + bool(self._moved)
        other._memory = [None] * len(self)
        for batch in self.mine:
            other._put(batch, self[batch], other.generation)
        return other

    def sync(self) -> None:
        """Force what this process wrote to the disk: where the batches stand now.

        Raises:
            CheckpointError: the disk does not take it.
        """
        if self._folder is None or not self.mine:
            return
        generation = self.generation + bool(self._moved)
        with disk_errors(self._folder):
            for batch in self.mine:
                sync_path(self._path(generation, batch))
            sync_path(self._path(generation, 0).parent)
            sync_path(self._folder)

    def settle(self) -> None:
        """End a generation that all batches have left, and which nobody reads any more; its files go."""
        assert len(self._moved) == len(self), "a block is passed by all batches"
        if self._folder is not None and self.ranks.first:
            shutil.rmtree(self._folder / str(self.generation), ignore_errors=True)
        self.generation += 1
        self._moved.clear()

    def _put(self, batch: int, state: Tensor, generation: int) -> None:
        state = state.detach()
        if self._cached:
            self._memory[batch] = state
        if self._folder is not None:
            path = self._path(generation, batch)
            with disk_errors(self._folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    write_tensors(file.fileno(), {"hidden": state})

    def _load(self, batch: int) -> Tensor:
        generation = self.generation + (batch in self._moved)
        path = self._path(generation, batch)
        try:
            with disk_errors(path), path.open("rb") as file:
                return read_tensors(file.fileno())["hidden"]
        except HeaderError as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); pass --force to start over") from error

    def _path(self, generation: int, batch: int) -> Path:
        assert self._folder is not None, "without a folder everything is in memory"
        return self._folder / str(generation) / f"{batch:05d}.safetensors"
