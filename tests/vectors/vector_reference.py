"""Codebooks of vectors in float64, slowly, as the formulas read: what `llmq.vectors` is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_inputs(k: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """Return a Hessian float32 [K, K] of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * k, k, generator=draw) @ (torch.randn(k, k, generator=draw) / k**0.5 + torch.eye(k))
    return 2 * x.T @ x / len(x)


def random_weight(n: int, k: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, k, generator=draw) * torch.rand(n, 1, generator=draw).add(0.2)


def decoded(codes: Tensor, scales: Tensor, book: Tensor, group_size: int, k: int) -> Tensor:
    """Return the float64 weight [N, K], entry by entry."""
    n, d = len(codes), book.shape[1]
    found = torch.zeros(n, k, dtype=torch.float64)
    for row in range(n):
        for j in range(k):
            found[row, j] = float(book[int(codes[row, j // d]), j % d]) * float(scales[row, j // group_size])
    return found


def loss(w: Tensor, q: Tensor, h: Tensor) -> float:
    e = w.double() - q.double()
    return float((e @ h.double() * e).sum())


def costs_of(values: Tensor, scales: Tensor, roots: Tensor, book: Tensor) -> Tensor:
    """Return (v - s c) S_p (v - s c)ᵀ of every vector and entry, float64 [P, N, k]."""
    metric = roots.double() @ roots.double().mT
    error = values.double()[:, :, None] - scales.double()[:, :, None, None] * book.double()
    return torch.einsum("pnki,pij,pnkj->pnk", error, metric, error)


def best_entries(values: Tensor, scales: Tensor, roots: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Return the entries [k, d] of least cost for fixed codes: one least-squares problem each, rows s·rootᵀ."""
    p, n, d = values.shape
    found = torch.full((entries, d), torch.nan, dtype=torch.float64)
    for entry in range(entries):
        rows, right = [], []
        for i in range(p):
            for j in range(n):
                if int(codes[i, j]) == entry:
                    rows.append(scales[i, j].double() * roots[i].double().T)
                    right.append(roots[i].double().T @ values[i, j].double())
        if rows:
            found[entry] = torch.linalg.pinv(torch.cat(rows)) @ torch.cat(right)
    return found


def swept_by_inverse(w: Tensor, h: Tensor, scales: Tensor, book: Tensor, order: list[int]) -> Tensor:
    """Return the codes [N, P] of block GPTQ in its textbook form: the inverse of what is left, computed anew each time.

    Replacing block B by q costs ``(w_B - q) ((H⁻¹)_BB)⁻¹ (w_B - q)ᵀ`` once all weights that are left have answered, and
    they answer by ``-(w_B - q) ((H⁻¹)_BB)⁻¹ (H⁻¹)_B:``. `w` and `h` are of whole vectors; scales are [N, P].
    """
    w, h, d = w.double().clone(), h.double(), book.shape[1]
    codes = torch.zeros(len(w), len(order), dtype=torch.int64)
    left = list(order)
    for p in order:
        columns = [q * d + i for q in left for i in range(d)]
        inverse = torch.linalg.inv(h[columns][:, columns])
        own = [columns.index(p * d + i) for i in range(d)]
        block = torch.linalg.inv(inverse[own][:, own])
        mine = [p * d + i for i in range(d)]
        for row in range(len(w)):
            error = w[row, mine] - scales[row, p].double() * book.double()
            codes[row, p] = (error @ block * error).sum(dim=1).argmin()
            w[row, columns] -= error[codes[row, p]] @ block @ inverse[own]
        left.remove(p)
    return codes


def descended_by_loss(w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, book: Tensor) -> Tensor:
    """Return codes [N, P] after a pass in which each vector takes the entry of least whole loss; of ties its own."""
    codes = codes.clone().long()
    w, h, book = w.double(), h.double(), book.double()
    for row in range(len(w)):
        for p in range(codes.shape[1]):
            mine = codes[row].repeat(len(book), 1)
            mine[:, p] = torch.arange(len(book))
            error = w[row] - (book[mine] * scales[row].double()[:, None]).flatten(1)
            tried = (error @ h * error).sum(dim=1)
            best = int(tried.argmin())
            if tried[best] < tried[int(codes[row, p])]:
                codes[row, p] = best
    return codes


def least_entries(w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, k: int, d: int) -> tuple[Tensor, float]:
    """Return the entries [k, d] of least ``tr((W - Q) H (W - Q)ᵀ)`` and that loss, by one dense problem."""
    root = torch.linalg.cholesky(h.double() + 1e-12 * torch.eye(len(h)).double())
    rows, right = [], []
    for row in range(len(w)):
        design = torch.zeros(len(h), k * d, dtype=torch.float64)
        for p in range(codes.shape[1]):
            for i in range(d):
                design[p * d + i, int(codes[row, p]) * d + i] = float(scales[row, p])
        rows.append(root.T @ design)
        right.append(root.T @ w[row].double())
    a, b = torch.cat(rows), torch.cat(right)
    found = torch.linalg.pinv(a) @ b
    return found.view(k, d), float((a @ found - b).square().sum())
