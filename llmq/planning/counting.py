"""Counts what torch does: products and factorizations by size, bytes of everything else, calls, and bytes held.

Planning runs the code itself, on shapes (the meta device) or on a miniature of a problem, and counts; what the code
costs is then known without a second description of it that would have to be kept true.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FACTORS = {"linalg_cholesky_ex": 1 / 3, "cholesky_inverse": 2 / 3}  # times K³
_SOLVES = {"cholesky_solve": 2.0, "linalg_solve_triangular": 1.0}  # times K² per column
_VECTORS = ("addmv", "mv")
_FREE = {"detach", "alias", "expand", "t", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "unbind"}
_FREE |= {"split", "diagonal", "as_strided", "empty", "empty_like", "_local_scalar_dense"}
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"
_ATTENTION = 6  # log2 of the side that the products in fused attention are as fast as
CACHE = 2**19  # bytes of a result below which memory is not what an operation waits for

Amounts = defaultdict[tuple[str, int], float]  # flops by dtype and log2 of the least side


def _none() -> Amounts:
    return defaultdict(float)


@dataclass
class Work:
    """Amounts of work, each with a speed of its own."""

    products: Amounts = field(default_factory=_none)
    factors: Amounts = field(default_factory=_none)  # of Cholesky factorizations
    solves: Amounts = field(default_factory=_none)  # of triangular solves
    near: float = 0.0  # bytes of small results, which stay in a core's cache
    far: float = 0.0  # bytes of large ones
    calls: float = 0.0  # operations

    def __add__(self, other: Work) -> Work:
        return Work(
            _sum(self.products, other.products),
            _sum(self.factors, other.factors),
            _sum(self.solves, other.solves),
            self.near + other.near,
            self.far + other.far,
            self.calls + other.calls,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            _times(self.products, times),
            _times(self.factors, times),
            _times(self.solves, times),
            self.near * times,
            self.far * times,
            self.calls * times,
        )


def _sum(one: Amounts, other: Amounts) -> Amounts:
    found = one.copy()
    for key, value in other.items():
        found[key] += value
    return found


def _times(amounts: Amounts, times: float) -> Amounts:
    return defaultdict(float, {key: value * times for key, value in amounts.items()})


def total(parts: Iterable[Work]) -> Work:
    """Return all of `parts` together."""
    return sum(parts, start=Work())


def side(size: float) -> int:
    """Return log2 of the least side of a matrix, by which the speeds of products are told apart."""
    return int(math.log2(max(1.0, size)))


class Counting(TorchDispatchMode):
    """Counts the work of every operation while it is active.

    Args:
        whole: bytes from which on a result counts as large.
    """

    def __init__(self, whole: int = CACHE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._whole = whole
        self._names: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = func._schema.name.removeprefix("aten::").rstrip("_")
        if name not in _FREE and "view" not in name:
            self._count(name, args, kwargs or {}, out)
        return out

    def _count(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        work, results = self.work, _tensors(out)
        if not results:
            return
        work.calls += 1
        packet = getattr(torch.ops.aten, name, None)
        inputs = _tensors(args)
        dtype = str(inputs[0].dtype if inputs else results[0].dtype).removeprefix("torch.")
        if name in _FACTORS:
            k = inputs[0].shape[-1]
            work.factors[dtype, side(k)] += _FACTORS[name] * k * inputs[0].numel()
        elif name in _SOLVES:
            k = min(x.shape[-1] for x in inputs if x.shape[-1] == x.shape[-2])
            work.solves[dtype, side(k)] += _SOLVES[name] * k * results[0].numel()
        elif name == _FUSED:
            batch, heads, queries, width = inputs[0].shape
            work.products[dtype, _ATTENTION] += 4 * batch * heads * queries * inputs[1].shape[2] * width
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            work.products[dtype, side(min(min(x.shape[-2:]) for x in inputs if x.ndim >= 2))] += flops
        else:
            size = sum(x.numel() * x.element_size() for x in (inputs if name in _VECTORS else results))
            if size < self._whole:
                work.near += size
            else:
                work.far += size


class Held(TorchDispatchMode):
    """Counts the bytes that are held at once while it is active; tensors that exist before do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the memory of its results until they are gone."""
        out = func(*args, **(kwargs or {}))
        for result in _tensors(out):
            storage = result.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(x: Any) -> list[Tensor]:
    """Return the tensors among results or arguments."""
    if isinstance(x, Tensor):
        return [x]
    if not isinstance(x, tuple | list):
        return []
    found: list[Tensor] = []
    for y in x:
        if isinstance(y, Tensor):
            found.append(y)
        elif isinstance(y, tuple | list):
            found += [z for z in y if isinstance(z, Tensor)]
    return found
