"""A weight on a codebook to one that loses less: entries, scales and codes in turn, each with the others fixed.

All of it lowers ``tr((W - Q) H (W - Q)ᵀ)`` with the whole H, positive semidefinite, where learning a codebook knew only
its diagonal blocks:

- *entries*: for fixed codes the loss is a parabola in all k·d numbers of the codebook at once. Its lowest point solves
  normal equations that are never formed: conjugate gradients, with the diagonal blocks of `codebooks.centroids` as
  preconditioner, need one product with H per step and lower the loss in each.
- *scales*: each is a parabola on its own, given all others.
- *codes*: a vector takes the entry that lowers the loss most, given all other vectors (coordinate descent over blocks).

Entries are rounded to whole numbers and scales to what files hold; either is taken only where the loss falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.grids.scales import half_precision
from llmq.grids.vq import MAX_ENTRY, VectorGrid, VectorWeight, whole_vectors
from llmq.vectors.codebooks import loads, vectors_of
from llmq.vectors.metrics import blocks_of, filled
from llmq.vectors.placing import per_vector

_LEAF = 8  # vectors of a row that are decided one by one before the gradient hears of it
_SOLVED = 1e-10  # of the energy of the first residual: what is left of it is float32's, and may grow again
_STEPS = 12  # of conjugate gradients: the last one gains less than a thousandth of the first


@dataclass(frozen=True)
class State:
    """A weight on a codebook and the slope of its loss, all columns filled up to whole vectors."""

    weight: VectorWeight
    w: Tensor  # float32 [N, P·d]
    h: Tensor  # float32 [P·d, P·d]
    gradient: Tensor  # (W - Q) H, [N, P·d]


def begin(q: VectorWeight, w: Tensor, h: Tensor) -> State:
    """Return the state of `q`, for weights `w` float32 [N, K] and the Hessian `h` float32 [K, K]."""
    d = q.codebook.shape[1]
    return _at(q, whole_vectors(w, d), filled(h, d))


def loss(state: State) -> float:
    """Return ``tr((W - Q) H (W - Q)ᵀ)``."""
    return float(((state.w - _values(state.weight)) * state.gradient).double().sum())


def refined(q: VectorWeight, w: Tensor, h: Tensor, rounds: int) -> VectorWeight:
    """Return `q` after `rounds` rounds of entries, scales and codes; it ends where one changes nothing.

    Args:
        q: the weight on its codebook.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], symmetric positive semidefinite.
        rounds: at most so many; 0 returns `q`.
    """
    if rounds == 0:
        return q
    state = begin(q, w, h)
    for _ in range(rounds):
        before = state.weight
        state = descended(rescaled(refit(state)))
        if state.weight is before:
            break
    return state.weight


def refit(state: State) -> State:
    """Return `state` with the entries of least loss for its codes, rounded, if that is less than before."""
    found = least_squares(state).round().clamp_(-MAX_ENTRY, MAX_ENTRY)
    after = _at(replace(state.weight, codebook=found), state.w, state.h)
    return after if loss(after) < loss(state) else state


def least_squares(state: State, steps: int = _STEPS) -> Tensor:
    """Return the entries [k, d] of least loss for the codes of `state`, as far as `steps` of conjugate gradients go."""
    q, h = state.weight, state.h
    k, d = q.codebook.shape
    scales = _scales(q)
    roots = torch.zeros(len(h) // d, d, d, device=h.device)  # only the counts are wanted
    weights, _ = loads(vectors_of(state.w, scales, roots), q.codes.T.long(), k)
    blocks = blocks_of(h, d)
    inverse = torch.linalg.pinv(torch.einsum("pk,pij->kij", weights, blocks.double()), hermitian=True).float()

    def adjoint(rows: Tensor) -> Tensor:
        parts = (rows.view(len(rows), -1, d) * scales[:, :, None]).double()
        return parts.new_zeros(k, d).index_add_(0, q.codes.int().flatten(), parts.flatten(0, 1)).float()

    x, residual = q.codebook.clone(), adjoint(state.gradient)
    step = (inverse @ residual[:, :, None])[:, :, 0]
    energy = float((residual * step).sum())
    first = energy
    for _ in range(steps):
        image = adjoint(_values(replace(q, codebook=step)) @ h)
        curvature = float((step * image).sum())
        if not curvature > 0 or energy <= _SOLVED * first:
            break
        x = x + step * (energy / curvature)
        residual = residual - image * (energy / curvature)
        preconditioned = (inverse @ residual[:, :, None])[:, :, 0]
        before, energy = energy, float((residual * preconditioned).sum())
        step = preconditioned + step * (energy / before)
    return x


def rescaled(state: State) -> State:
    """Return `state` with each scale at its best, given all others, where that lowers the loss; one group at a time."""
    q, size = state.weight, state.weight.group_size
    scales, gradient = q.scales.clone(), state.gradient.clone()
    units = _units(q)
    moved = False
    for group in range(scales.shape[1]):
        columns = slice(group * size, min((group + 1) * size, units.shape[1])) if scales.shape[1] > 1 else slice(None)
        u = units[:, columns]
        curvature = ((u @ state.h[columns, columns]) * u).sum(dim=1)
        slope = (u * gradient[:, columns]).sum(dim=1)
        old = scales[:, group]
        wanted = old + torch.where(curvature > 0, slope / curvature, 0.0)
        new = half_precision(torch.where(wanted > 0, wanted, old))
        change = new - old
        take = (change * curvature - 2 * slope) * change < 0
        change = torch.where(take, change, 0.0)
        scales[:, group] = torch.where(take, new, old)
        gradient -= (u * change[:, None]) @ state.h[columns]
        moved |= bool(take.any())
    return replace(state, weight=replace(q, scales=scales), gradient=gradient) if moved else state


def descended(state: State) -> State:
    """Return `state` after one pass over the codes of every row, from left to right."""
    q, h = state.weight, state.h
    d = q.codebook.shape[1]
    scales, codes, gradient = _scales(q), q.codes.clone(), state.gradient.clone()
    rows = torch.arange(len(codes), device=h.device)
    for start in range(0, codes.shape[1], _LEAF):
        stop = min(start + _LEAF, codes.shape[1])
        leaf = slice(start * d, stop * d)
        slope, changes = gradient[:, leaf].clone(), torch.zeros(len(codes), leaf.stop - leaf.start, device=h.device)
        for p in range(start, stop):
            own, block = slice((p - start) * d, (p - start + 1) * d), slice(p * d, p * d + d)
            metric, old, s = h[block, block], codes[:, p].long(), scales[:, p, None]
            image = q.codebook @ metric
            squares = (image * q.codebook).sum(dim=1)
            # of taking each entry, up to what they have in common, over s
            pull = slope[:, own] + s * image[old]
            cost = torch.addmm(squares * (s / 2), pull, q.codebook.T, alpha=-1)
            least, best = cost.min(dim=1)
            best = torch.where(least < cost[rows, old], best, old)
            change = s * (q.codebook[best] - q.codebook[old])
            changes[:, own] = change
            codes[:, p] = best.to(codes.dtype)
            slope -= change @ h[block, leaf]
        gradient -= changes @ h[leaf]
    if torch.equal(codes, q.codes):
        return state
    return replace(state, weight=replace(q, codes=codes), gradient=gradient)


def _at(q: VectorWeight, w: Tensor, h: Tensor) -> State:
    return State(q, w, h, (w - _values(q)) @ h)


def _values(q: VectorWeight) -> Tensor:
    """Return what the codes stand for, [N, P·d]: with what reaches beyond the end of a row."""
    return replace(q, in_features=q.codes.shape[1] * q.codebook.shape[1]).dequantize()


def _units(q: VectorWeight) -> Tensor:
    """Return `_values` before they are scaled."""
    return q.codebook[q.codes.int()].flatten(1)


def _scales(q: VectorWeight) -> Tensor:
    assert isinstance(q.grid, VectorGrid), "vectors are on such a grid"
    return per_vector(q.scales, q.grid, q.group_size, q.codes.shape[1])
