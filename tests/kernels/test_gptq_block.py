"""The kernel of GPTQ's column loop against `naive`, in the interpreter (or on a GPU, with TRITON_INTERPRET=0)."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from llmq_kernels import naive
from llmq_kernels.gptq_block import CONFIGS, MAX_COLUMNS, config, gptq_block

U = 2.0**-24
# B, N, bits, symmetric: one of each size, ragged tiles of either, whole ones; each row of CONFIGS, full and not. The
# interpreter takes some 2 ms per column and tile.
cases = pytest.mark.parametrize(
    ("b", "n", "bits", "symmetric"),
    [
        *((31, 5, bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
        (1, 1, 4, True),
        (1, 33, 2, False),
        (1, 130, 8, True),
        (32, 1, 2, True),
        (32, 130, 4, False),
        (33, 32, 3, True),
        (64, 5, 8, False),
        (65, 33, 2, True),
        (127, 1, 3, False),
        (128, 33, 4, True),
        (128, 33, 2, False),
        (128, 5, 8, True),
    ],
    ids=str,
)


@dataclass(frozen=True)
class Problem:
    """The arguments of `naive.gptq_block`."""

    w: Tensor  # [B, N]
    y: Tensor  # [B, N]
    r: Tensor  # [B, B], NaN below the diagonal
    scales: Tensor  # [G, N], of both signs
    zeros: Tensor  # [G, N]
    groups: Tensor  # [B], in no order
    lowest: int
    highest: int

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def random_problem(b: int, n: int, bits: int, symmetric: bool, exact: bool, seed: int = 0) -> Problem:
    """Return a block of columns that use every code, and are corrected by about a step.

    An `exact` one consists of multiples of 2**-8 below 2**6, of 1/4 in R, and of powers of two wherever something
    is divided by: all that float32 computes on it has at most 24 bits, in whatever order, and every third weight is
    halfway between two levels.
    """
    draw = torch.Generator().manual_seed(seed + 1000 * b + n)
    groups, half = 5, 2 ** (bits - 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw) * 2 - 1

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=draw).float()

    signs = torch.where(uniform(groups, n) < 0, -1.0, 1.0)
    if exact:
        scales = signs * 2.0 ** (integers(1, groups, n) - bits - 1)
        w, y = integers(96, b, n) / 2**8, integers(8, b, n) / 2**8
        w[::3] = (w[::3] / scales[0]).round() * scales[0] + scales[0] / 2
        r = integers(1, b, b) / 4 * (uniform(b, b) > 0.4)
        diagonal = 2.0 ** integers(1, b)
    else:
        scales = signs * (1.5 + uniform(groups, n)) / 2 / half
        w, y = uniform(b, n), uniform(b, n) / half
        r, diagonal = uniform(b, b) / b**0.5, 1.0 + uniform(b) / 2
    zeros = torch.randint(0, 2 * half + 1, (groups, n), generator=draw).float()
    r = r.triu(1) + torch.full((b, b), float("nan")).tril(-1) + diagonal.diag_embed()
    tensors = (w, y, r, scales, torch.full_like(zeros, half) if symmetric else zeros)
    picked = torch.randint(0, groups, (b,), generator=draw)
    return Problem(*(t.to(DEVICE) for t in (*tensors, picked)), lowest=0, highest=2 * half - 1)


def solve(p: Problem) -> tuple[Tensor, Tensor]:
    """Return codes and errors; fail if the kernel writes beside them, or leaves any of them out."""
    b, n = p.w.shape
    codes = torch.full((b + 2, n + 3), 77, dtype=torch.uint8, device=DEVICE)
    errors = torch.full((b + 2, n + 4), float("nan"), device=DEVICE)
    inside_codes, inside_errors = codes[1:-1, :n], errors[1:-1, :n]
    gptq_block(**vars(p), codes=inside_codes, errors=inside_errors)
    assert inside_errors.isfinite().all()
    results = inside_codes.clone(), inside_errors.clone()
    inside_codes.fill_(77)
    inside_errors.fill_(float("nan"))
    assert (codes == 77).all()
    assert errors.isnan().all()
    return results


def test_naive_moves_the_columns_that_are_left_to_their_least_squares_optimum() -> None:
    # With errors E on the columns before j, tr(E H Eᵀ) is least where those from j on are W + E H_PF H_FF⁻¹.
    k, n, cut = 12, 6, 5
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(k, m, generator=draw, dtype=torch.float64) for m in (40, n))
    h = x @ x.T
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(r @ r.T, h)
    scales, zeros = torch.rand(3, n, generator=draw) - 0.5, torch.randint(0, 8, (3, n), generator=draw)
    groups = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1])
    codes, errors = torch.empty(k, n, dtype=torch.uint8), torch.zeros(k, n, dtype=torch.float64)
    for at in (slice(0, cut), slice(cut, k)):
        y = r[: at.start, at].T @ errors[: at.start]
        codes[at], errors[at] = naive.gptq_block(w[at], y, r[at, at], scales, zeros, groups[at], 0, 7)

    free = w.clone()
    for j in range(k):
        scale, zero = scales[groups[j]].double(), zeros[groups[j]]
        code = ((free[j] / scale).round() + zero).clamp(0, 7)
        assert torch.equal(codes[j].double(), code)
        free[j] = (code - zero) * scale
        fixed = w[: j + 1] - free[: j + 1]
        torch.testing.assert_close(errors[: j + 1], fixed)
        free[j + 1 :] = w[j + 1 :] + torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, : j + 1] @ fixed)


@cases
def test_exact_arithmetic_gives_exactly_naive(b: int, n: int, bits: int, symmetric: bool) -> None:
    p = random_problem(b, n, bits, symmetric, exact=True)
    expected_codes, expected_errors = naive.gptq_block(**vars(p))
    codes, errors = solve(p)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(errors.double(), expected_errors)
    if codes.numel() >= 40 * 2**bits:
        assert len(codes.unique()) == 2**bits


@cases
def test_every_code_is_nearest_and_every_error_what_is_left(b: int, n: int, bits: int, symmetric: bool) -> None:
    p = random_problem(b, n, bits, symmetric, exact=False)
    codes, errors = solve(p)
    assert_follows_its_own_errors(p, codes, errors)
    # One weight in 1e5 is as near to a tie as float32 is inexact, and takes the rest of its row along.
    assert (codes != naive.gptq_block(**vars(p))[0]).any(0).sum() <= 1


def assert_follows_its_own_errors(p: Problem, codes: Tensor, errors: Tensor) -> None:
    """Fail unless each column is right given the errors of those before it, up to float32.

    So that one tie does not excuse what follows it. The sum of j products and y errs by at most (j + 1) u times that
    of their magnitudes A; the reciprocal, its product and the addition of w add 3 u A / R_jj and u |c|, the division
    u |c / s|. Altogether (j + 4) u A / (R_jj |s|) + 2 u |c / s| steps.
    """
    w, y, s, z = p.w.double(), p.y.double(), p.scales.double()[p.groups], p.zeros.double()[p.groups]
    r, e = p.r.double().triu(), errors.double()
    for j in range(len(w)):
        carried = (y[j] + r[:j, j] @ e[:j]) / r[j, j]
        magnitude = (y[j].abs() + r[:j, j].abs() @ e[:j].abs()) / r[j, j].abs()
        steps = (w[j] + carried) / s[j]
        slack = (j + 4) * U * magnitude / s[j].abs() + 2 * U * steps.abs()
        code = codes[j].double()
        off = steps + z[j] - code
        assert ((off >= -0.5 - slack) | (code == p.lowest)).all(), f"column {j}: a lower code is nearer"
        assert ((off <= 0.5 + slack) | (code == p.highest)).all(), f"column {j}: a higher code is nearer"
        level = (code - z[j]) * s[j]
        assert ((e[j] - (w[j] - level)).abs() <= U * (level.abs() + e[j].abs())).all(), f"column {j}: error"
    assert codes.min() >= p.lowest
    assert codes.max() <= p.highest


def test_the_first_code_may_be_out_of_use() -> None:
    p = replace(random_problem(31, 33, 3, True, exact=True), lowest=1)
    codes, errors = solve(p)
    expected_codes, expected_errors = naive.gptq_block(**vars(p))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(errors.double(), expected_errors)
    assert sorted(codes.unique().tolist()) == list(range(1, 8))


def test_division_rounds_as_that_of_pytorch() -> None:
    # Half a step away from levels, give or take one bit: whether a quotient is a tie is decided by its rounding.
    n = 4096
    draw = torch.Generator().manual_seed(0)
    scales = torch.rand(1, n, generator=draw) + 0.01
    w = scales * (torch.randint(0, 15, (1, n), generator=draw) + 0.5)
    w = torch.nextafter(w, w + torch.randint(-1, 2, (1, n), generator=draw))
    p = Problem(w, torch.zeros(1, n), torch.ones(1, 1), scales, torch.zeros(1, n), torch.zeros(1).long(), 0, 15)
    p = replace(p, **{name: tensor.to(DEVICE) for name, tensor in p.tensors().items()})
    codes, _ = solve(p)
    assert torch.equal(codes.cpu(), (w / scales).round().clamp(0, 15).to(torch.uint8))
    assert ((w / scales) % 1 == 0.5).float().mean() > 0.3


@pytest.mark.parametrize("far", [1e3, 3e5, 1e30])
def test_what_is_far_off_the_grid_takes_its_ends(far: float) -> None:
    p = random_problem(2, 5, 4, False, exact=False)
    r = torch.eye(2, device=DEVICE)
    p = replace(p, w=torch.full_like(p.w, far), groups=torch.zeros_like(p.groups), y=p.y.zero_(), r=r)
    codes, _ = solve(p)
    assert torch.equal(codes, torch.where(p.scales[0] > 0, 15, 0).to(torch.uint8).expand(2, 5))


def test_inputs_may_be_slices_of_larger_tensors() -> None:
    p = random_problem(32, 33, 4, False, exact=True)
    expected = solve(p)
    wide = {}
    for width, (name, tensor) in enumerate(p.tensors().items(), start=7):
        if name != "groups":
            larger = torch.full((tensor.shape[0] + 2, tensor.shape[1] + width), float("nan"), device=DEVICE)
            larger[1:-1, 3 : 3 - width] = tensor
            wide[name] = larger[1:-1, 3 : 3 - width]
    found = solve(replace(p, **wide))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_the_factor_may_be_stored_by_columns_or_by_rows() -> None:
    p = random_problem(33, 5, 4, False, exact=False)
    codes, errors = solve(p)
    by_columns = solve(replace(p, r=p.r.T.contiguous().T))
    assert torch.equal(by_columns[0], codes)
    assert torch.equal(by_columns[1], errors)


def test_rows_of_the_weight_do_not_know_of_each_other() -> None:
    p = random_problem(32, 70, 3, False, exact=False)
    codes, errors = solve(p)
    some = {name: getattr(p, name)[:, 30:37].contiguous() for name in ("w", "y", "scales", "zeros")}
    found = solve(replace(p, **some))
    assert torch.equal(found[0], codes[:, 30:37])
    assert torch.equal(found[1], errors[:, 30:37])


def test_no_rows_are_no_work() -> None:
    p = random_problem(4, 1, 4, True, exact=True)
    none = {name: getattr(p, name)[:, :0] for name in ("w", "y", "scales", "zeros")}
    codes, errors = solve(replace(p, **none))
    assert (codes.shape, errors.shape) == ((4, 0), (4, 0))


def test_blocks_get_the_smallest_tile_that_holds_them() -> None:
    assert [config(b).block_b for b in (1, 32, 33, 64, 65, 128)] == [32, 32, 64, 64, 128, 128]
    assert CONFIGS[-1].block_b == MAX_COLUMNS


def outputs(b: int, n: int) -> dict[str, Tensor]:
    return {
        "codes": torch.empty(b, n, dtype=torch.uint8, device=DEVICE),
        "errors": torch.empty(b, n, device=DEVICE),
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {"w": a["w"][0]}, r"w \[6\]: needs \[B, N\] with B from 1 to 128"),
        (lambda a: {"w": a["w"].repeat(33, 1)}, r"w \[132, 6\]: needs \[B, N\] with B from 1 to 128"),
        (lambda a: {"w": a["w"][:0]}, r"w \[0, 6\]: needs \[B, N\] with B from 1 to 128"),
        (lambda a: {"w": a["w"].double()}, r"w: torch.float64 \[4, 6\]; needs torch.float32 \[4, 6\]"),
        (lambda a: {"w": a["w"].T.contiguous().T}, r"w: .* with strides \[1, 4\], the last not 1; needs"),
        (lambda a: {"y": a["y"][:3]}, r"y: torch.float32 \[3, 6\]; needs torch.float32 \[4, 6\]"),
        (lambda a: {"r": a["r"][:, :3]}, r"r: torch.float32 \[4, 3\]; needs torch.float32 \[4, 4\]"),
        (lambda a: {"groups": a["groups"].repeat(2)[::2]}, r"groups: .* with strides \[2\], the last not 1; needs"),
        (lambda a: {"scales": a["scales"][:, :1]}, r"scales: torch.float32 \[5, 1\]; needs torch.float32 \[5, 6\]"),
        (lambda a: {"scales": a["scales"][:0]}, r"scales: torch.float32 \[0, 6\]; needs torch.float32 \[1, 6\]"),
        (lambda a: {"scales": a["scales"][0, 0]}, r"scales: torch.float32 \[\]; needs torch.float32 \[1, 6\]"),
        (lambda a: {"zeros": a["zeros"][:4]}, r"zeros: torch.float32 \[4, 6\]; needs torch.float32 \[5, 6\]"),
        (lambda a: {"groups": a["groups"].int()}, r"groups: torch.int32 \[4\]; needs torch.int64 \[4\]"),
        (lambda a: {"codes": a["codes"].char()}, r"codes: torch.int8 \[4, 6\]; needs torch.uint8 \[4, 6\]"),
        (lambda a: {"errors": a["errors"].half()}, r"errors: torch.float16 \[4, 6\]; needs torch.float32 \[4, 6\]"),
        (lambda a: {"y": a["y"].to("meta")}, r"y: on meta, but w is on c"),
        (lambda a: {"lowest": 15}, "codes 15 to 15: need 0 <= lowest < highest <= 255"),
        (lambda a: {"lowest": -1}, "codes -1 to 15: need 0 <= lowest < highest <= 255"),
        (lambda a: {"highest": 256}, "codes 0 to 256: need 0 <= lowest < highest <= 255"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, reason: str) -> None:
    arguments: dict[str, Any] = vars(random_problem(4, 6, 4, False, exact=True)) | outputs(4, 6)
    with pytest.raises(ValueError, match=reason):
        gptq_block(**(arguments | change(arguments)))
