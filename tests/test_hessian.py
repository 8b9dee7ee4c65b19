"""The Hessian sum counts what it should."""

import pytest
import torch
from hessian_cases import U, expected, whole
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import CalibrationError
from llmq.hessian import MAX_BAD_TOKENS, HessianSum

CPU = torch.device("cpu")


def summed(k: int, *parts: Tensor) -> HessianSum:
    total = HessianSum(k, CPU)
    for part in parts:
        total.add_(part)
    return total


def test_mean_is_twice_the_mean_outer_product() -> None:
    # H = 2 x xᵀ for one token; 64 tokens, so that the division is exact as well
    assert torch.equal(summed(2, torch.tensor([[1.0, 3.0]])).mean("x"), torch.tensor([[2.0, 6.0], [6.0, 18.0]]))
    x = whole(64, 5)
    h = summed(5, x).mean("x")
    assert h.dtype == torch.float32
    assert torch.equal(h.double(), expected(x))


@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 67, 520, 1030], ids=str)  # tiles of 512, strips of an eighth
def test_every_entry_is_summed_whatever_the_size(k: int) -> None:
    x, reference = whole(3, 5, k), whole(3, 5, k, seed=1)  # 15 tokens of at most 81 each: exact
    whole_sum, cross = expected(x.reshape(15, k)) * 15 / 2, (reference - x).reshape(15, k).double().T
    total = HessianSum(k, CPU, paired=True)
    for part, other in zip(x, reference, strict=True):
        lane = HessianSum(k, CPU, paired=True)
        lane.add_(part, None, None, other)
        total.absorb_(lane)
    scale = torch.tensor(2 / 15)
    assert torch.equal(total.mean("x"), whole_sum.float() * scale)
    assert torch.equal(total.cross("x"), (cross @ x.reshape(15, k).double()).float() * scale)


@pytest.mark.parametrize("k", [5, 67, 1030], ids=str)
def test_what_is_kept_is_the_whole_sum(k: int) -> None:
    x = whole(15, k)
    kept, counts = summed(k, x[:9]).state()
    assert torch.equal(kept.double(), x[:9].double().T @ x[:9].double())
    total = HessianSum.of_state(kept, counts)
    total.add_(x[9:])
    assert torch.equal(total.state()[0].double(), x.double().T @ x.double())
    empty, counts = HessianSum(k, CPU).state()
    assert (empty.shape, empty.any(), counts["tokens"]) == ((k, k), False, 0)


def test_sums_are_exactly_symmetric() -> None:
    x = torch.randn(999, 67, generator=torch.Generator().manual_seed(0))
    for h in (summed(67, x).mean("x"), summed(67, x).state()[0]):
        assert torch.equal(h, h.T)


def test_what_was_asked_for_does_not_change_and_costs_no_memory() -> None:
    x = whole(64, 5)
    total, other = weighted(x, None, reference=x + 1), weighted(x, None, reference=x)
    h, d = total.mean("x"), total.cross("x")
    assert (total.mean("x").data_ptr(), total.cross("x").data_ptr()) == (h.data_ptr(), d.data_ptr())
    assert torch.equal(total.mean("x").double(), expected(x))
    total.drop_cross()
    assert torch.equal(total.mean("x"), h)
    for change in (lambda: total.add_(x, None, None, x), lambda: total.absorb_(other), lambda: other.absorb_(total)):
        with pytest.raises(AssertionError, match="handed out"):
            change()


def test_nothing_that_is_given_is_written_to() -> None:
    x, reference, g = whole(64, 5), whole(64, 5, seed=1), torch.full((64,), 2.0)
    before = x.clone(), reference.clone()
    for weights in (None, g):
        weighted(x, weights, reference=reference)
    assert torch.equal(x, before[0])
    assert torch.equal(reference, before[1])


def test_values_whose_sum_overflows_are_finite() -> None:
    x = torch.zeros(4, 2)
    x[:, 0] = 1e19  # squares of 1e38, four of which no float32 holds: two tokens are enough
    total = summed(2, x[:2].clone())
    assert (total.tokens, total.dropped) == (2, 0)
    x[:, 1] = 3e38  # their own sum overflows
    total = HessianSum(2, CPU)
    total.add_(x)
    assert (total.tokens, total.dropped) == (4, 0)


def test_all_leading_dimensions_are_tokens() -> None:
    x = whole(4, 2, 8, 5)
    total = summed(5, x)
    assert total.tokens == 64
    assert torch.equal(total.mean("x").double(), expected(x.reshape(64, 5)))


def test_one_token_without_batch_is_one_token() -> None:
    total = summed(5, whole(5))
    assert (total.tokens, total.dropped) == (1, 0)
    assert torch.equal(total.mean("x").double(), expected(whole(1, 5)))


@pytest.mark.parametrize("sizes", [(30, 30, 4), (1, 63), (62, 1, 1)], ids=str)
def test_tokens_weigh_the_same_in_batches_of_any_size(sizes: tuple[int, ...]) -> None:
    x = whole(64, 5)
    x[-4:] *= 3  # a short last batch unlike the others: an average over batches would see it
    assert torch.equal(summed(5, *x.split(sizes)).mean("x").double(), expected(x))


def test_a_ragged_batch_is_the_concatenation_of_its_sequences() -> None:
    lengths = [7, 1, 4, 0]
    x = whole(4, 7, 5) * 100
    for side in ("left", "right"):
        valid = torch.zeros(4, 7, dtype=torch.bool)
        for row, length in enumerate(lengths):
            valid[row, 7 - length if side == "left" else 0 :][:length] = True
        padded = HessianSum(5, CPU)
        padded.add_(x, valid)
        singles = summed(5, *(x[row][valid[row]][None] for row in range(4)))
        assert padded.tokens == sum(lengths)
        assert torch.equal(padded.mean("x"), singles.mean("x"))


def test_a_mask_fits_flat_inputs_too() -> None:
    x, valid = whole(3, 4, 5), torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    batched, flat = HessianSum(5, CPU), HessianSum(5, CPU)
    batched.add_(x, valid)
    flat.add_(x.reshape(12, 5), valid)
    assert torch.equal(batched.mean("x"), flat.mean("x"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_are_taken_in_float32(dtype: torch.dtype) -> None:
    # 300² overflows float16, and neither half type holds it: 90 000 needs 14 bits. 128 of them are exact in float32.
    x = torch.full((128, 3), 300.0, dtype=dtype)
    assert torch.equal(summed(3, x).mean("x"), torch.full((3, 3), 180_000.0))


def test_inputs_may_require_gradients() -> None:
    total = summed(3, whole(4, 3).requires_grad_())
    assert not total.mean("x").requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_tokens_that_are_not_finite_are_left_out_and_counted(bad: float) -> None:
    x = whole(128, 5)
    broken = x.clone()
    broken[17, 3] = bad
    total = summed(5, broken)
    assert (total.tokens, total.dropped) == (127, 1)
    kept = torch.cat([x[:17], x[18:]])
    # the sum is exact; 2 / 127 is rounded, and the product with it
    torch.testing.assert_close(total.mean("x").double(), expected(kept), rtol=2 * U, atol=0)


def test_bad_tokens_under_the_mask_do_not_count() -> None:
    x, valid = whole(2, 64, 5), torch.ones(2, 64, dtype=torch.bool)
    x[1, 32:], valid[1, 32:] = float("nan"), False
    total = HessianSum(5, CPU)
    total.add_(x, valid)
    assert (total.tokens, total.dropped) == (96, 0)


def test_more_than_one_bad_token_in_a_hundred_is_an_error() -> None:
    x = whole(200, 5)
    x[:2, 0] = float("inf")
    assert MAX_BAD_TOKENS == 0.01
    assert summed(5, x).mean("layer").isfinite().all()
    total = summed(5, x, torch.full((1, 5), float("nan")))
    with pytest.raises(CalibrationError, match=r"layers\.3\.up_proj: 3 of 201 "):
        total.mean("layers.3.up_proj")


def test_only_bad_tokens_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="1 of 1 "):
        summed(3, torch.full((1, 3), float("nan"))).mean("layer")


def test_no_tokens_are_an_error() -> None:
    empty = HessianSum(3, CPU)
    with pytest.raises(CalibrationError, match=r"layers\.0\.experts\.7: no calibration token"):
        empty.mean("layers.0.experts.7")
    empty.add_(whole(2, 3), torch.tensor([False, False]))
    with pytest.raises(CalibrationError, match="no calibration token"):
        empty.mean("layer")


# ----------------------------------------------------------------------------------------------------------------------


def weighted(
    x: Tensor, weights: Tensor | None, valid: Tensor | None = None, reference: Tensor | None = None
) -> HessianSum:
    total = HessianSum(x.shape[-1], CPU, paired=reference is not None)
    total.add_(x, valid, weights, reference)
    return total


def expected_weighted(x: Tensor, weights: Tensor, left: Tensor | None = None) -> Tensor:
    """Return 2 Σ g l xᵀ / Σ g, float64, token by token; `left` is x itself by default."""
    x, g = x.reshape(-1, x.shape[-1]).double(), weights.flatten().double()
    left = x if left is None else left.reshape(x.shape).double()
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for i in range(len(x)):
        total += g[i] * left[i][:, None] * x[i]
    return 2 * total / g.sum()


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40), st.booleans(), st.booleans())
def test_weights_are_what_the_definition_says(seed: int, k: int, tokens: int, paired: bool, masked: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, reference = torch.randn(2, tokens, k, generator=draw)
    g = torch.rand(tokens, generator=draw) ** 4 * 100
    g[torch.rand(tokens, generator=draw) < 0.3] = 0
    g[0] = 2.5
    valid = torch.rand(tokens, generator=draw) < 0.7 if masked else torch.ones(tokens, dtype=torch.bool)
    valid[0] = True
    total = HessianSum(k, CPU, paired=paired)
    for part in torch.arange(tokens).split(7):
        total.add_(x[part], valid[part] if masked else None, g[part], reference[part] if paired else None)
    assert total.tokens == int((valid & (g > 0)).sum())
    h = total.mean("x")
    assert torch.equal(h, h.T)
    # every entry is a sum of `tokens` products with five roundings each, bounded by Cauchy-Schwarz as in test_factorize
    close = (tokens + 6) * U
    wanted = expected_weighted(x, g * valid)
    root = wanted.diagonal().sqrt()
    assert ((h - wanted).abs() <= close * root * root[:, None]).all()
    if paired:
        shift = reference.double() - x.double()
        norm = expected_weighted(shift, g * valid).diagonal().sqrt()
        # the difference itself is rounded once, relative to its larger term
        larger = norm + root + expected_weighted(reference, g * valid).diagonal().sqrt()
        wanted = expected_weighted(x, g * valid, shift)
        assert ((total.cross("x") - wanted).abs() <= close * larger[:, None] * root).all()


def test_weight_one_is_no_weight_to_the_bit() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted(x, torch.ones(300)).mean("x"), weighted(x, None).mean("x"))
    y = x + 1
    both = [weighted(x, g, reference=y).cross("x") for g in (torch.ones(300), None)]
    assert torch.equal(*both)


def test_only_ratios_of_weights_matter() -> None:
    x, g = whole(64, 5), torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted(x, g).mean("x"), weighted(x, g * 2.0**40).mean("x"))


def test_a_token_of_whole_weight_counts_so_often() -> None:
    x = whole(6, 5)
    g = torch.tensor([4.0, 1.0, 0.0, 9.0, 1.0, 1.0])  # squares: their roots are exact
    repeated = x.repeat_interleave(g.long(), dim=0)
    assert torch.equal(weighted(x, g).mean("x").double(), expected(repeated))


def test_tokens_of_no_weight_do_not_count_whatever_they_hold() -> None:
    x, g = whole(2, 64, 5), torch.ones(2, 64)
    x[1, 32:], g[1, 32:] = float("nan"), 0.0
    total = weighted(x, g)
    assert (total.tokens, total.dropped) == (96, 0)
    assert torch.equal(total.mean("x"), weighted(x.reshape(128, 5)[:96], None).mean("x"))


def test_a_mask_goes_before_weights() -> None:
    x, g = whole(4, 8, 5), torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(weighted(x, g, valid).mean("x"), weighted(x[valid], g[valid]).mean("x"))


def test_weights_of_any_float_type_are_taken() -> None:
    x, g = whole(8, 5), torch.tensor([4.0, 1.0, 0.0, 9.0, 1.0, 1.0, 16.0, 1.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(weighted(x.half(), g.to(dtype)).mean("x"), weighted(x, g).mean("x"))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")], ids=str)
def test_weights_that_are_none_are_refused(bad: float) -> None:
    g = torch.ones(8)
    g[3] = bad
    with pytest.raises(CalibrationError, match=rf"1 of 8 token weights are negative or not finite \(first {bad:g}\)"):
        weighted(whole(8, 5), g)


def test_all_weights_zero_are_no_tokens() -> None:
    with pytest.raises(CalibrationError, match="no calibration token"):
        weighted(whole(8, 5), torch.zeros(8)).mean("layer")


def test_the_cross_term_is_what_is_missing_times_the_input() -> None:
    x, reference = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    assert torch.equal(weighted(x, None, reference=reference).cross("x"), torch.tensor([[2.0, 6.0], [-4.0, -12.0]]))
    assert not weighted(x, None, reference=x).cross("x").any()


def test_halves_are_subtracted_in_float32() -> None:
    # bfloat16 would round 256 - 1.0078125 to 255
    x, reference = torch.tensor([[1.0078125]]), torch.tensor([[256.0]])
    found = weighted(x.bfloat16(), None, reference=reference.bfloat16()).cross("x")
    assert found.item() == 2 * 254.9921875 * 1.0078125


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_pair_with_a_token_that_is_not_finite_is_in_neither_sum(where: str) -> None:
    x, reference = whole(2, 64, 5), whole(2, 64, 5, seed=1)
    (x if where == "here" else reference)[1, 30, 2] = float("inf")
    total = weighted(x, torch.ones(2, 64), reference=reference)
    assert (total.tokens, total.dropped) == (127, 1)
    kept = torch.ones(2, 64, dtype=torch.bool)
    kept[1, 30] = False
    clean = weighted(x[kept], None, reference=reference[kept])
    assert torch.equal(total.mean("x"), clean.mean("x"))
    assert torch.equal(total.cross("x"), clean.cross("x"))


def test_pairs_have_the_plain_hessian() -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted(x, None, reference=x + 1).mean("x"), weighted(x, None).mean("x"))


def test_the_cross_term_checks_its_tokens_too() -> None:
    x = torch.full((1, 3), float("nan"))
    with pytest.raises(CalibrationError, match="layer: 1 of 1 "):
        weighted(x, None, reference=x).cross("layer")
