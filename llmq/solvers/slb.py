"""Searched low-bit weights: each weight is a mixture of levels that gradients, and a falling temperature, make one.

Yang et al. 2020, "Searching for Low-Bit Weights in Quantized Neural Networks" (arXiv 2009.08695), section 3. A
weight has candidates v_1 … v_M with logits A_i. With ``P = softmax(A / τ)`` it counts as ``c = Σ_i P_i v_i`` while it
is searched for, and becomes the candidate of the largest P. The gradient is exact,

    ∂c / ∂A_i = P_i (v_i - c) / τ ,

and as τ falls to 0 the mixture becomes that candidate, so nothing is left to round. What is searched for here is the
least output error of the layer, ``(w - c) H (w - c)ᵀ`` by rows, on scales that stay; with two candidates it is a soft
rounding like AdaRound's (Nagel et al. 2020, arXiv 2004.10568).

All weights move at once, in steps long enough to flip them while the temperature falls: shorter ones end in worse
codes. That makes the codes depend on the last digit of every sum. The same run gives the same codes, but on another
machine, or with other rows beside it, a row may end in other codes that lose about as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.hessian import symmetric
from llmq.solvers.bitsplit import metric
from llmq.solvers.weighted_rtn import weighted_rtn
from llmq.types import Affine, Grid, QuantizedWeight, Solution
from llmq.weights import chosen, select_rows, stacked

_ALL_LEVELS = 3  # bits up to which every level is a candidate; above, the two around the weight
_STEPS = 100
_RATE = 0.2  # of Adam, in logits; from 0.1 to 0.5 the losses differ by 3 %, and 200 steps gain as much
_WARM, _COLD = 1.0, 0.02  # first and last temperature
_ENTRIES = 2**23  # logits that are searched together: rows know nothing of each other


def slb(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp_percent: float = 0.01,
    scale_search: str = "hessian",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes found by gradients; rows that lose by it, or gain nothing, stay rounded to nearest.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
        damp_percent: share of the mean diagonal of `h` added to the diagonal.
        scale_search: see `llmq.solvers.placing.placer`; the energy of column j is H_jj. Scales stay as they are placed.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `h` holds NaN or infinity, or an option has no such value.
    """
    w, h = w.float(), symmetric(h)
    start = weighted_rtn(w, h, grid, group_size, scale_search=scale_search, search_norm=search_norm).weight
    h = metric(h, damp_percent)
    count = 2**grid.bits if grid.bits <= _ALL_LEVELS else 2
    size = max(1, _ENTRIES // (count * w.shape[1]))
    slices = [slice(first, first + size) for first in range(0, len(w), size)]
    return Solution(stacked([_searched(select_rows(start, rows), w[rows], h) for rows in slices]), damp_percent)


class Candidates(NamedTuple):
    """What each weight can become."""

    codes: Tensor  # uint8 [M, N, K]
    values: Tensor  # float32 [M, N, K]
    given: Tensor  # bool [M, N, K]: whether it is one, and not another of them again


def candidates(start: QuantizedWeight, w: Tensor) -> Candidates:
    """Return the candidates for `w` [N, K] on the placement of `start`.

    All levels where there are few; else the nearest, first, and the next one on the other side of the weight, which
    at the end of the levels is no other.
    """
    parts = []
    for group, columns in enumerate(w.split(start.group_size, dim=1)):
        levels = None if start.levels is None else start.levels[:, group, None]
        at = Affine(start.scales[:, group, None], start.zeros[:, group, None], levels)
        parts.append(_of_group(start.grid, columns, at))
    return Candidates(*(torch.cat(pieces, dim=2) for pieces in zip(*parts, strict=True)))


def _of_group(grid: Grid, w: Tensor, at: Affine) -> Candidates:
    """Return the candidates for the columns `w` [N, S] of one group."""
    if grid.bits <= _ALL_LEVELS:
        codes = torch.arange(2**grid.bits, dtype=torch.uint8, device=w.device)[:, None, None].expand(-1, *w.shape)
    else:
        nearest = grid.encode(w, at)
        up, down = (_next(grid, nearest, at, step) for step in (1, -1))
        beyond = (grid.decode(up, at) - w) * (grid.decode(nearest, at) - w) < 0
        codes = torch.stack([nearest, torch.where(beyond, up, down)])
    values = torch.stack([grid.decode(own, at) for own in codes])
    # several codes may stand for one level, which the grid encodes by one of them only
    given = torch.stack([grid.encode(own, at) == code for own, code in zip(values, codes, strict=True)])
    if grid.bits > _ALL_LEVELS:
        given[1] &= (values[1] - w) * (values[0] - w) < 0
    return Candidates(codes, values, given)


def _next(grid: Grid, codes: Tensor, at: Affine, step: int) -> Tensor:
    """Return the codes of the next level in one direction that is another: learned levels may fall on each other."""
    here, beside = grid.decode(codes, at), _kept(codes.int() + step, grid)
    for _ in range(2**grid.bits):
        further = torch.where(grid.decode(beside, at) == here, _kept(beside.int() + step, grid), beside)
        if torch.equal(further, beside):
            break
        beside = further
    return grid.encode(grid.decode(beside, at), at)


def _kept(codes: Tensor, grid: Grid) -> Tensor:
    """Return whole numbers as uint8 codes of `grid`."""
    return codes.clamp(0, 2**grid.bits - 1).to(torch.uint8)


def mixture(logits: Tensor, values: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities ``P = softmax(A / τ)`` [M, N, K] and the mixed weights ``Σ_i P_i v_i`` [N, K]."""
    share = torch.softmax(logits / temperature, dim=0)
    return share, (share * values).sum(dim=0)


def logit_gradient(share: Tensor, values: Tensor, mixed: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Return the gradient of a loss by the logits, [M, N, K], from its `gradient` [N, K] by the mixed weights."""
    return share * (values - mixed) * (gradient / temperature)


def _searched(start: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `start` with the codes that were found, in the rows that lose less by them."""
    there = candidates(start, w)
    unit = _spacing(there)
    logits = torch.where(there.given, -(w - there.values).abs() / torch.where(unit > 0, unit, 1.0), -torch.inf)
    _descend_(logits, there.values, w, h, unit)
    pick = logits.argmax(dim=0, keepdim=True)
    codes, values = (t.gather(0, pick)[0] for t in (there.codes, there.values))
    found = QuantizedWeight(codes, start.scales, start.zeros, start.grid, start.group_size, start.levels)
    better = _losses(w - values, h) < _losses(w - start.dequantize(), h)
    return chosen(better, found, start)


def _spacing(there: Candidates) -> Tensor:
    """Return the mean distance of neighbouring candidates of each weight, [N, K]; 0 where there is only one."""
    top = there.values.masked_fill(~there.given, -torch.inf).amax(dim=0)
    bottom = there.values.masked_fill(~there.given, torch.inf).amin(dim=0)
    count = there.given.sum(dim=0)
    return (top - bottom) / (count - 1).clamp(min=1)


def _descend_(logits: Tensor, values: Tensor, w: Tensor, h: Tensor, unit: Tensor, steps: int = _STEPS) -> None:
    """Move `logits` [M, N, K] to where their largest lose least; `unit` [N, K] makes losses of rows comparable."""
    energy = (unit.square() @ h.diagonal())[:, None] / w.shape[1]
    part = torch.where(energy > 0, 2 / energy, 0.0)
    optimizer = torch.optim.Adam([logits], lr=_RATE)
    for step in range(steps):
        temperature = _WARM * (_COLD / _WARM) ** (step / (steps - 1))
        share, mixed = mixture(logits, values, temperature)
        gradient = (mixed - w) @ h * part
        logits.grad = logit_gradient(share, values, mixed, gradient, temperature)
        optimizer.step()


def _losses(error: Tensor, h: Tensor) -> Tensor:
    """Return ``e H eᵀ`` of each row, float64 [N]."""
    return ((error @ h) * error).sum(dim=1, dtype=torch.float64)
