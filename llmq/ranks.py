"""Processes that share one run: who calibrates on which batches, who solves what, and how the others get the results.

Sums over tokens must not depend on how many processes there are, so they are taken in a fixed order: batches are dealt
to eight lanes, each lane is summed by one process, and lanes are added in the order of their numbers. One process alone
does the same. Everything that is solved is solved in pieces that are the same for any number of processes too.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

LANES = 8  # so many processes can share the calibration batches evenly

_T = TypeVar("_T")


def lane_of(batch: int, batches: int) -> int:
    """Return the lane that batch number `batch` of so many is summed in."""
    return batch * min(LANES, batches) // batches


class Ended(BaseException):
    """Another rank has failed or is gone; `llmq.joining.joined` raises what is to be said of it.

    It is no Exception, so that nothing on its way takes what happened there for something that happened here.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(error)
        self.error = error


class Ranks:
    """This process among those that share the run; all of them call the same methods in the same order.

    Args:
        rank: its number; 0 is the one that writes and speaks.
        world: how many there are.
        device: where tensors that come from another rank's device are put.
    """

    def __init__(self, rank: int, world: int, device: device | None = None) -> None:
        self.rank = rank
        self.world = world
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def owns(self, batch: int, batches: int) -> bool:
        """Return whether batch number `batch` of so many is calibrated on here."""
        return self.world == 1 or lane_of(batch, batches) % self.world == self.rank

    def rounds(self, batches: int) -> Iterator[list[list[int]]]:
        """Yield for each round of lanes, in order, the batches of each rank's lane; the last may have too few."""
        lanes: dict[int, list[int]] = {}
        for batch in range(batches):
            lanes.setdefault(lane_of(batch, batches), []).append(batch)
        order = list(lanes.values())
        for start in range(0, len(order), self.world):
            yield order[start : start + self.world]

    def barrier(self) -> None:
        """Wait until all ranks are here.

        Raises:
            Ended: one of them never will be.
        """
        self.gather(None)

    def gather(self, value: _T) -> list[_T]:
        """Return what each rank gives, in their order, its own as it is; errors as for `barrier`."""
        return [self.broadcast(value, source) for source in range(self.world)]

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Return what the first rank makes; errors as for `barrier`."""
        return self.broadcast(make() if self.first else cast("_T", None))

    def shared(self, mine: Mapping[int, _T]) -> list[_T]:
        """Return the parts of all ranks in the order of their numbers; each has its own; errors as for `barrier`."""
        parts = {number: part for one in self.gather(mine) for number, part in one.items()}
        return [parts[number] for number in sorted(parts)]

    def broadcast(self, value: _T, source: int = 0) -> _T:
        """Return what rank `source` gives, there as it is; errors as for `barrier`.

        Tensors in it travel as bytes, one at a time; those on the source's device arrive on this rank's.
        """
        if self.world == 1:
            return value
        import torch

        if self.rank == source:
            content, tensors = _taken_apart(value)
            self._pass(torch.tensor([len(content)]), source)
            self._pass(torch.frombuffer(bytearray(content), dtype=torch.uint8), source)
            for tensor in tensors:
                self._pass(self._bytes(tensor), source)
            return value
        size = self._pass(torch.zeros(1, dtype=torch.int64), source)
        content = self._pass(torch.empty(int(size), dtype=torch.uint8), source).numpy().tobytes()
        found: _T = _Unpickler(content, self, source).load()
        return found

    def receive(self, shape: tuple[int, ...], dtype: dtype, *, on_device: bool, source: int) -> Tensor:
        """Return the next tensor that rank `source` sends."""
        import torch

        found = torch.empty(shape, dtype=dtype, device=self.device if on_device else "cpu")
        content = self._pass(self._bytes(found), source)
        found.view(-1).view(torch.uint8).copy_(content)  # onto itself where it was received in place
        return found

    def _pass(self, content: Tensor, source: int) -> Tensor:
        """Send `content` from rank `source` to the others, where it is overwritten."""
        from torch import distributed

        try:
            if content.numel():
                distributed.broadcast(content, source)
        except RuntimeError as error:  # what torch says where a connection ends
            raise Ended from error
        return content

    def _bytes(self, tensor: Tensor) -> Tensor:
        """Return the bytes of a tensor where they can be sent from."""
        import torch

        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return flat if self._direct else flat.cpu()

    @property
    def _direct(self) -> bool:
        """Whether devices talk to each other."""
        from torch import distributed

        return "nccl" in distributed.get_backend_config()


ALONE = Ranks(0, 1)


def _taken_apart(value: object) -> tuple[bytes, list[Tensor]]:
    """Return `value` without its tensors, and them."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), list(pickler.tensors.values())


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a tensor."""
        from torch import Tensor

        if not isinstance(value, Tensor):
            return None
        self.tensors.setdefault(id(value), value)
        return id(value), tuple(value.shape), value.dtype, value.device.type != "cpu"


class _Unpickler(pickle.Unpickler):
    """Receives tensors where they were left out: in the order in which the source lists them."""

    def __init__(self, content: bytes, ranks: Ranks, source: int) -> None:
        super().__init__(io.BytesIO(content))
        self._ranks = ranks
        self._source = source
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, stands: Any) -> Tensor:
        """Return the tensor that was left out here."""
        key, shape, dtype, on_device = stands
        if key not in self._tensors:
            self._tensors[key] = self._ranks.receive(shape, dtype, on_device=on_device, source=self._source)
        return self._tensors[key]
