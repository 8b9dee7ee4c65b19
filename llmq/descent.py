"""Coordinate descent on the codes: each column is set to the best level given all others, one pass over the columns.

With G = (W - Q) H, the loss as a function of column j alone is a parabola with its lowest point at
``t = q_j + G_j / H_jj``; the level nearest to t is its exact minimizer on the grid (Behdin et al. 2023, QuantEase,
arXiv 2309.01885, without its relaxation). A code changes only where that strictly helps, so the loss of every row falls
or stays, and repeated passes end. Nothing is inverted: any H with a positive diagonal will do.

The columns are visited by halving the range, as in `llmq.solvers.gptq`: what the left half changed reaches the right
half in one matrix product. A pass so costs half a product of the size of ``W H``; the other half, by which the left
learns of the right, is left to `complete`, for those who need the whole gradient. `sweep` is this order of visit alone,
for refiners that improve other pieces in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq.types import Affine, Grid, QuantizedWeight

_LEAF = 32  # columns that are updated one by one before the next matrix product


class Unheard(NamedTuple):
    """What the last sweep changed. Only columns to the right of a piece have heard of its changes."""

    changes: Tensor  # [K, N]
    pieces: Sequence[slice]  # of columns, from left to right, as they were visited


@dataclass(frozen=True)
class State:
    """A weight on its grid and the slope of its loss, which refiners hand on. K-major."""

    grid: Grid
    group_size: int
    h: Tensor  # [K, K]
    values: Tensor  # Qᵀ [K, N]
    scales: Tensor  # [G, N]
    zeros: Tensor  # [G, N]
    gradient: Tensor  # ((W - Q) H)ᵀ [K, N], save for what is unheard
    levels: Tensor | None = None  # [G, N, L], of a grid that learns them
    unheard: Unheard | None = None  # None: the state is complete

    def groups(self) -> list[tuple[slice, Affine]]:
        """Return the columns of each group and its placement, [N] each."""
        starts = range(0, self.h.shape[0], self.group_size)
        return [
            (slice(start, min(start + self.group_size, self.h.shape[0])), self.placement(group))
            for group, start in enumerate(starts)
        ]

    def placement(self, group: int) -> Affine:
        """Return the placement of a group, [N] each."""
        return Affine(self.scales[group], self.zeros[group], None if self.levels is None else self.levels[group])

    def weight(self) -> QuantizedWeight:
        """Return the weight alone."""
        codes = torch.empty(self.values.shape, dtype=torch.uint8, device=self.values.device)
        for columns, at in self.groups():
            codes[columns] = self.grid.encode(self.values[columns], at)
        codes, scales, zeros = (t.T.contiguous() for t in (codes, self.scales, self.zeros))
        levels = None if self.levels is None else self.levels.transpose(0, 1).contiguous()
        return QuantizedWeight(codes, scales, zeros, self.grid, self.group_size, levels)


def begin(q: QuantizedWeight, w: Tensor, h: Tensor) -> State:
    """Return the state of `q`, at the cost of one product.

    Args:
        q: the weight on its grid.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], symmetric positive semidefinite.
    """
    scales, zeros = q.scales.T.contiguous(), q.zeros.T.contiguous()
    values = torch.empty(w.shape[::-1], device=w.device)
    levels = None if q.levels is None else q.levels.transpose(0, 1).contiguous()
    state = State(q.grid, q.group_size, h, values, scales, zeros, values, levels)
    for columns, at in state.groups():
        values[columns] = q.grid.decode(q.codes.T[columns], at)
    return replace(state, gradient=h @ (w.T - values))


def complete(state: State) -> State:
    """Return `state` with its whole gradient."""
    if state.unheard is None:
        return state
    gradient = state.gradient.clone()
    _hear(gradient, state.h, *state.unheard)
    return replace(state, gradient=gradient, unheard=None)


def take(state: State, rows: Tensor) -> State:
    """Return these rows (indices into N) of `state`."""
    parts = {name: None if t is None else t.index_select(1, rows) for name, t in _row_tensors(state).items()}
    unheard = state.unheard
    if unheard is not None:
        unheard = unheard._replace(changes=unheard.changes.index_select(1, rows))
    return replace(state, unheard=unheard, **parts)  # type: ignore[arg-type]


def _row_tensors(state: State) -> dict[str, Tensor | None]:
    """Return the tensors of `state` whose second dimension is that of the rows, by name."""
    names = ("values", "scales", "zeros", "gradient", "levels")
    return {name: getattr(state, name) for name in names}


def descend(q: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `q` after one pass of coordinate descent over its codes; scales and zeros stay.

    Args:
        q: the weight on its grid.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], symmetric positive semidefinite; columns with H_jj = 0 keep their codes.
    """
    return descent(begin(q, w, h)).weight()


def descent(state: State) -> State:
    """Return the complete `state` after one pass of coordinate descent over its codes; scales and zeros stay."""
    return sweep(state, leaves(len(state.values)), _one_by_one)


def leaves(columns: int) -> list[slice]:
    """Return so many columns in pieces for `sweep` that are decided on one by one."""
    return [slice(start, min(start + _LEAF, columns)) for start in range(0, columns, _LEAF)]


def sweep(state: State, pieces: Sequence[slice], improve: Callable[[State, Tensor, slice], None]) -> State:
    """Return the complete `state` after one visit to each piece, from left to right.

    Args:
        state: what to improve; it is left as it is.
        pieces: adjacent slices that cover all columns.
        improve: called with the work in progress, the changes [K, N] of values so far, and a piece. The gradient of the
            piece knows all changes outside of it. It writes the new values, scales, zeros and levels of the piece into
            the work, and the changes of its values, which are 0 as yet.
    """
    changes = torch.zeros_like(state.values)
    copies: dict[str, Any] = {name: None if t is None else t.clone() for name, t in _row_tensors(state).items()}
    work = replace(state, **copies)
    _visit(work, changes, pieces, improve)
    return replace(work, unheard=Unheard(changes, pieces))


def _visit(
    work: State, changes: Tensor, pieces: Sequence[slice], improve: Callable[[State, Tensor, slice], None]
) -> None:
    """Improve adjacent pieces from left to right, those on the right knowing of those on the left."""
    if len(pieces) == 1:
        improve(work, changes, pieces[0])
        return
    left, right = _halves(pieces)
    _visit(work, changes, pieces[: len(pieces) // 2], improve)
    work.gradient[right].addmm_(work.h[right, left], changes[left], alpha=-1)
    _visit(work, changes, pieces[len(pieces) // 2 :], improve)


def _halves(pieces: Sequence[slice]) -> tuple[slice, slice]:
    """Return the columns of the left and of the right half of `pieces`."""
    middle = pieces[len(pieces) // 2].start
    return slice(pieces[0].start, middle), slice(middle, pieces[-1].stop)


def _hear(gradient: Tensor, h: Tensor, changes: Tensor, pieces: Sequence[slice]) -> None:
    """Bring to `gradient` the changes of `pieces` that `sweep` did not bring."""
    if len(pieces) == 1:
        columns = pieces[0]
        gradient[columns].addmm_(h[columns, columns], changes[columns], alpha=-1)
        return
    left, right = _halves(pieces)
    gradient[left].addmm_(h[left, right], changes[right], alpha=-1)
    _hear(gradient, h, changes, pieces[: len(pieces) // 2])
    _hear(gradient, h, changes, pieces[len(pieces) // 2 :])


def _one_by_one(work: State, changes: Tensor, columns: slice) -> None:
    """Improve these columns one by one."""
    diagonal = work.h.diagonal()[columns].tolist()
    for j in range(columns.start, columns.stop):
        if diagonal[j - columns.start] <= 0:
            continue
        group, part = j // work.group_size, 1.0 / diagonal[j - columns.start]
        done = slice(columns.start, j)
        # from the old value to the lowest point of the parabola
        way = torch.addmv(work.gradient[j], changes[done].T, work.h[j, done], beta=part, alpha=-part)
        old = work.values[j]
        move = work.grid.nearest(old + way, work.placement(group)).sub_(old)
        helps = torch.sub(move, way, alpha=2).mul_(move) < 0  # nearer to that point than before
        torch.mul(move, helps, out=changes[j])
    work.values[columns] += changes[columns]
