"""Learning a codebook: k-means in the metric of what an error costs.

Vector p of row n stands for the columns p·d … p·d + d - 1. Replacing ``v`` by ``s c`` (s the scale of the row, c an
entry) costs ``(v - s c) S_p (v - s c)ᵀ`` with one positive semidefinite S_p [d, d] per position. With S_p = I this is
k-means. With S_p a block of the Hessian it is the output error that the layer would have if inputs of different
positions were uncorrelated (Stock et al. 2020, "And the bit goes down", arXiv 1907.05686). Both steps are exact:

- every vector takes the entry that costs least;
- an entry becomes ``c = (Σ s² S_p)⁺ Σ s S_p v`` over its vectors: their plain mean where all weigh the same.

So the cost never rises. An entry that nothing takes moves to the vector that costs most of the entry with the most
weight: that splits the most loaded one and cannot raise the cost either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**19  # distances that are held at a time: what a core's cache holds
_ITERATIONS = 30
_SETTLED = 1e-4  # relative gain of an iteration below which it ends


@dataclass(frozen=True)
class Vectors:
    """Sub-vectors of a weight, and what errors in them cost."""

    values: Tensor  # float32 [P, N, d]
    scales: Tensor  # float32 [P, N], positive; what entries are multiplied by
    roots: Tensor  # float32 [P, d, d]: S_p = root rootᵀ


def vectors_of(w: Tensor, scales: Tensor, roots: Tensor) -> Vectors:
    """Return the sub-vectors of `w` [N, P·d], scaled by `scales` [N, P]; `roots` [P, d, d] as in `Vectors`."""
    n, d = len(w), roots.shape[1]
    return Vectors(w.view(n, -1, d).transpose(0, 1).contiguous(), scales.T.contiguous(), roots)


def nearest_entries(vectors: Vectors, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the code of the entry that costs least for each vector, int64 [P, N], and that cost, [P, N].

    Of entries that cost the same, the first is taken.
    """
    codes, costs = [], []
    for common, scales, distance in _distances(vectors, codebook):
        least, code = distance.min(dim=2)
        codes.append(code)
        costs.append((common + 2 * scales * least).clamp_(min=0))
    return torch.cat(codes), torch.cat(costs)


def least_costs(vectors: Vectors, codebook: Tensor) -> Tensor:
    """Return the second of `nearest_entries`, [P, N], in a third of the time."""
    return torch.cat(
        [
            (common + 2 * scales * distance.amin(dim=2)).clamp_(min=0)
            for common, scales, distance in _distances(vectors, codebook)
        ]
    )


def _distances(vectors: Vectors, codebook: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for some positions ‖t‖² [p, N], s [p, N] and x [p, N, k], where ‖t‖² + 2 s x is what each entry costs."""
    values, scales, roots = vectors.values, vectors.scales, vectors.roots
    step = max(1, _CHUNK // (values.shape[1] * len(codebook)))
    for v, s, root in zip(values.split(step), scales.split(step), roots.split(step), strict=True):
        seen, entries = v @ root, codebook @ root  # [p, N, d], [p, k, d]: cost is a plain distance there
        squares = entries.square().sum(dim=2)[:, None]
        # divided by s, so that rows of tiny scale keep their digits
        yield seen.square().sum(dim=2), s, torch.baddbmm(squares * (s[:, :, None] / 2), seen, entries.mT, alpha=-1)


def centroids(vectors: Vectors, codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best entries [k, d] for vectors with these `codes` [P, N], and the weight of each entry, [k].

    Entries that no vector takes stay as they are.
    """
    k, d = codebook.shape
    metric = (vectors.roots @ vectors.roots.mT).double()  # S_p
    weights, sums = loads(vectors, codes, k)
    matrix = torch.einsum("pk,pij->kij", weights, metric)
    right = torch.einsum("pki,pij->kj", sums, metric)
    found = (torch.linalg.pinv(matrix, hermitian=True) @ right[:, :, None])[:, :, 0].float()
    weight = matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    return torch.where((weight > 0)[:, None], found, codebook), weight / d


def loads(vectors: Vectors, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return Σ s² and Σ s v over the vectors of each position that have each code: float64 [P, k] and [P, k, d]."""
    p, _, d = vectors.values.shape
    flat = (codes + entries * torch.arange(p, device=codes.device)[:, None]).flatten()
    # in float64, in which the order of a sum, that GPUs leave open, does not show
    scales = vectors.scales.double()
    weights = scales.new_zeros(p * entries).index_add_(0, flat, scales.square().flatten())
    scaled = (vectors.values * scales[:, :, None]).flatten(0, 1)
    sums = scales.new_zeros(p * entries, d).index_add_(0, flat, scaled)
    return weights.view(p, entries), sums.view(p, entries, d)


def first_codebook(vectors: Vectors, entries: int) -> Tensor:
    """Return `entries` of the scaled vectors, evenly spaced among all by their distance from the mean.

    The distance is Mahalanobis', in which all directions vary alike (van Baalen et al. 2024, GPTVQ, arXiv 2402.15319,
    section 3.2): so some are near the middle and some far out, and the same ones every time.
    """
    points = (vectors.values / vectors.scales[:, :, None]).flatten(0, 1)
    centred = (points - points.mean(dim=0)).double()
    spread = torch.linalg.pinv(centred.T @ centred / len(points), hermitian=True)
    distance = ((centred @ spread) * centred).sum(dim=1)
    ranks = distance.argsort(stable=True)
    places = torch.linspace(0, len(points) - 1, entries, dtype=torch.float64, device=points.device).round().long()
    return points[ranks[places]]


def revived(vectors: Vectors, codebook: Tensor, codes: Tensor, costs: Tensor, weight: Tensor) -> Tensor:
    """Return `codebook` with each entry of no `weight` [k] moved to where an entry of much weight loses most."""
    empty = (weight <= 0).nonzero()[:, 0]
    if not len(empty):
        return codebook
    codebook = codebook.clone()
    heavy = weight.argsort(descending=True, stable=True)[: len(empty)]
    points = (vectors.values / vectors.scales[:, :, None]).flatten(0, 1)
    flat, flat_costs = codes.flatten(), costs.flatten()
    for entry, full in zip(empty.tolist(), heavy.tolist(), strict=True):
        worst = torch.where(flat == full, flat_costs, -1.0).argmax()
        if flat_costs[worst] > 0:
            codebook[entry] = points[worst]
    return codebook


def learn(vectors: Vectors, codebook: Tensor, iterations: int = _ITERATIONS) -> tuple[Tensor, list[float]]:
    """Return the codebook [k, d] after up to `iterations` of both steps, and the cost before each and at the end."""
    history: list[float] = []
    codes, costs = nearest_entries(vectors, codebook)
    history.append(float(costs.double().sum()))
    for _ in range(iterations):
        found, weight = centroids(vectors, codes, codebook)
        found = revived(vectors, found, codes, costs, weight)
        codes, costs = nearest_entries(vectors, found)
        cost = float(costs.double().sum())
        if cost > history[-1]:  # rounding, near the end
            break
        codebook = found
        history.append(cost)
        if history[-2] - cost <= _SETTLED * history[-2]:
            break
    return codebook, history
