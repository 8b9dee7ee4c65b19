"""Rotations: exactly orthogonal, of every size, and spreading what is concentrated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rotation_reference import paley_one, sylvester

from llmq.errors import SpecError
from llmq.transforms.hadamard import Kind, hadamard, rotation_fixing_mean, rotation_matrix

kinds = pytest.mark.parametrize("kind", ["hadamard", "random"])

# powers of two; Paley's first with a prime (12, 20, 44, 60, 68, 84, 108, 140) and a cube (28, 344), second with a prime
# (36, 76, 148) and a square (52, 100); these times powers of two; 28 · 68
SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 68, 72, 76, 80, 84, 100, 108, 140, 148, 344, 768, 1904]


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_is_of_signs_and_orthogonal(size: int) -> None:
    h = hadamard(size)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))  # whole numbers: exact


@pytest.mark.parametrize("power", range(6))
def test_powers_of_two_are_sylvesters(power: int) -> None:
    assert torch.equal(hadamard(2**power), sylvester(power))


@pytest.mark.parametrize("q", [11, 19, 43, 59])
def test_a_prime_gives_paleys_matrix(q: int) -> None:
    assert torch.equal(hadamard(q + 1), paley_one(q))


@pytest.mark.parametrize("size", [3, 6, 10, 92])
def test_a_size_without_construction_is_refused(size: int) -> None:
    with pytest.raises(SpecError, match=f"Hadamard matrix of size {size};"):
        hadamard(size)


@kinds
@given(size=st.integers(1, 130), seed=st.integers(0, 10**6))
def test_rotation_is_orthogonal_at_every_size(kind: Kind, size: int, seed: int) -> None:
    q = rotation_matrix(size, kind, seed)
    # each entry of Q Qᵀ is a sum of n products of entries below 1 in size, good to n·u; QR is backward stable
    assert (q @ q.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-13
    assert q.dtype == torch.float64


@given(size=st.integers(1, 130), seed=st.integers(0, 10**6))
def test_rotation_fixing_the_mean(size: int, seed: int) -> None:
    q = rotation_fixing_mean(size, seed)
    assert (q @ q.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-13
    assert (q.sum(dim=1) - 1).abs().max() < 1e-13
    assert (q.sum(dim=0) - 1).abs().max() < 1e-13


@kinds
def test_rotation_is_a_function_of_its_seed(kind: Kind) -> None:
    assert torch.equal(rotation_matrix(24, kind, 3), rotation_matrix(24, kind, 3))
    assert not torch.equal(rotation_matrix(24, kind, 3), rotation_matrix(24, kind, 4))
    assert torch.equal(rotation_fixing_mean(24, 3), rotation_fixing_mean(24, 3))
    assert not torch.equal(rotation_fixing_mean(24, 3), rotation_fixing_mean(24, 4))


def test_a_spike_is_spread_evenly() -> None:
    spike = torch.zeros(8, dtype=torch.float64)
    spike[5] = 8.0
    assert torch.allclose((spike @ rotation_matrix(8, "hadamard", 0)).abs(), torch.tensor(8 / 8**0.5).double())


def test_signs_keep_a_constant_vector_from_becoming_a_spike() -> None:
    flat = torch.ones(256, dtype=torch.float64)
    # without signs all of its length 16 would be in one entry; with them entries are normal, one of 256 below 5
    assert (flat @ rotation_matrix(256, "hadamard", 0)).abs().max() < 5
    assert (rotation_matrix(256, "hadamard", 0) @ flat).abs().max() == 16  # the signs are on the side of the input


@pytest.mark.parametrize("size", [3, 6, 14, 92])
def test_every_channel_reaches_every_other_without_a_hadamard_matrix(size: int) -> None:
    assert (rotation_matrix(size, "hadamard", 0) != 0).all()


def test_fixing_the_mean_spreads_a_spike_too() -> None:
    spike = torch.zeros(256, dtype=torch.float64)
    spike[7] = 16.0
    assert (spike @ rotation_fixing_mean(256, 0)).abs().max() < 5


def test_a_uniform_rotation_is_not_biased_by_qr() -> None:
    # without the signs LAPACK's R has a negative diagonal, and Q's first entry keeps one sign
    firsts = [float(rotation_matrix(3, "random", seed)[0, 0]) for seed in range(200)]
    assert 60 < sum(first > 0 for first in firsts) < 140  # 100 ± 6σ


@kinds
def test_what_makes_no_rotation_is_refused(kind: Kind) -> None:
    with pytest.raises(SpecError, match="size is 0"):
        rotation_matrix(0, kind, 0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="'fourier'; use hadamard or random"):
        rotation_matrix(4, "fourier", 0)  # type: ignore[arg-type]
