"""Decomposition against numpy's, and 8-bit vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_train.optim.linalg import decompose
from lowrank_train.optim.spectral.factors import decode, encode


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def with_values(out: int, width: int, values: list[float] | Tensor) -> Tensor:
    """A matrix with given singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return (orthonormal(out, len(values), 1) * values) @ orthonormal(width, len(values), 2).mT


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zero_row(weight: Tensor, row: int) -> Tensor:
    weight[row] = 0
    return weight


SHAPES = [(6, 20), (20, 6), (9, 9), (1, 7), (7, 1), (1, 1)]

WELL_CONDITIONED = {
    **{f"random {out}x{width}": random(out, width) for out, width in SHAPES if out != width},
    "spread": with_values(12, 12, torch.linspace(5.0, 0.5, 12)),
    "repeated": with_values(8, 12, [3.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0]),
    "identity": torch.eye(6, dtype=torch.float64),
    "tiny": 1e-20 * with_values(12, 8, torch.linspace(5.0, 0.5, 8)),
    "huge": 1e20 * with_values(8, 12, torch.linspace(5.0, 0.5, 8)),
}
HARD = {
    "random square": random(40, 40),
    "rank 2": with_values(9, 14, [3.0, 1.0]),
    "rank 2 tall": with_values(14, 9, [3.0, 1.0]),
    "rank 1 square": with_values(8, 8, [2.0]),
    "zero row": zero_row(random(6, 11), 2),
    "zero row square": zero_row(random(7, 7), 0),
    "zero row tall": zero_row(random(11, 6), 4),
    "zero column": zero_row(random(11, 6), 4).mT.contiguous(),
    "all zero": torch.zeros(4, 6, dtype=torch.float64),
    "over 10 decades": with_values(24, 30, torch.logspace(0, -10, 24)),
    "over 16 decades": with_values(30, 24, torch.logspace(0, -16, 24)),
    "over 16 decades, square": with_values(32, 32, torch.logspace(0, -16, 32)),
    "many near the root of eps": with_values(40, 40, torch.cat([torch.ones(8), 1e-8 * torch.linspace(2, 0.5, 32)])),
    "all small but one": with_values(40, 60, torch.cat([torch.ones(1), torch.full((39,), 1e-7)])),
    "just above where the way changes": with_values(64, 64, torch.logspace(0, -4.51, 64)),
    "just above it, many small ones": with_values(64, 96, torch.cat([torch.ones(4), torch.full((60,), 3.1e-5)])),
    "just above it, half of them": with_values(
        128, 128, torch.cat([torch.ones(64), 3.1e-5 * torch.linspace(1.0, 1.2, 64)])
    ),
    "just below it, many small ones": with_values(64, 96, torch.cat([torch.ones(4), torch.full((60,), 2.9e-5)])),
}


def check(weight: Tensor, orthogonality: float) -> None:
    """Orthonormal factors that fall and make up the weight, with the singular values numpy finds."""
    factors = decompose(weight)
    assert {value.dtype for value in factors.values()} == {torch.float64}
    u, sigma, v = (factors[key].numpy() for key in ("u", "sigma", "v"))
    k = min(weight.shape)
    assert (u.shape, sigma.shape, v.shape) == ((k, weight.shape[0]), (k,), (k, weight.shape[1]))
    assert all(factors[key].is_contiguous() for key in factors)
    assert (sigma >= 0).all()
    assert (np.diff(sigma) <= 0).all()
    exact = weight.double().numpy()
    expected = np.linalg.svd(exact, compute_uv=False)
    scale = expected[0] if expected[0] > 0 else 1.0
    assert np.abs(u @ u.T - np.eye(k)).max() < orthogonality
    assert np.abs(v @ v.T - np.eye(k)).max() < orthogonality
    assert np.linalg.norm((u.T * sigma) @ v - exact, 2) < 1e-12 * scale
    assert np.abs(sigma - expected).max() < 1e-12 * scale


@pytest.mark.parametrize("case", list(WELL_CONDITIONED))
def test_well_conditioned_to_rounding(case: str) -> None:
    check(WELL_CONDITIONED[case], 1e-12)


@pytest.mark.parametrize("case", list(HARD))
def test_ill_conditioned_to_seven_digits(case: str) -> None:
    check(HARD[case], 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_decomposed_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(random(*shape).to(dtype), 1e-7)


def test_strided_weights_and_the_weight_itself_is_left_alone() -> None:
    weight = random(12, 16)[::2, ::2].mT
    before = weight.clone()
    check(weight, 1e-7)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_signs_do_not_depend_on_rounding(shape: tuple[int, int]) -> None:
    """The largest entry of each u_i is positive."""
    weight = random(*shape)
    factors = decompose(weight)
    u = factors["u"]
    assert (u.gather(1, u.abs().argmax(1, keepdim=True)) > 0).all()
    again = decompose(weight * (1 + 1e-14 * random(*shape)))
    for key, value in factors.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_numbers_that_are_not_finite_are_refused(value: float, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        decompose(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 64, 500])
def test_8_bit_vectors_keep_their_length_and_err_by_half_a_level(dtype: torch.dtype, width: int) -> None:
    vectors = torch.nn.functional.normalize(random(20, width)).to(dtype)
    codes, scale = encode(vectors)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (20, 1))
    decoded = decode(codes, scale, dtype)
    assert decoded.dtype == dtype
    assert (torch.linalg.vector_norm(decoded, dim=1) - 1).abs().max() < 8 * torch.finfo(dtype).eps
    # half a level of rounding, and the length that was lost or won by it, at most as much in all: sqrt(width) / 2
    level = vectors.abs().amax(1, keepdim=True) / 127
    assert torch.linalg.vector_norm(decoded - vectors, dim=1).le(level[:, 0] * width**0.5).all()
    assert (decoded - vectors).abs().le(level * (0.5 + vectors.abs() * width**0.5)).all()


def test_8_bit_vectors_of_another_length_and_zero() -> None:
    vectors = torch.stack([3.0 * random(10), torch.zeros(10, dtype=torch.float64), 1e-30 * random(10)])
    decoded = decode(*encode(vectors), torch.float64)
    torch.testing.assert_close(decoded.norm(dim=1), vectors.norm(dim=1), rtol=1e-14, atol=0)
    assert torch.equal(decoded[1], vectors[1])


def test_encoding_again_changes_nothing() -> None:
    codes, scale = encode(torch.nn.functional.normalize(random(30, 48)))
    again, scale_again = encode(decode(codes, scale, torch.float64))
    assert torch.equal(again, codes)
    torch.testing.assert_close(scale_again, scale, rtol=1e-14, atol=0)


def test_decoding_without_a_scale_only_converts() -> None:
    vectors = random(3, 4)
    assert decode(vectors, None, torch.float64) is vectors
    assert torch.equal(decode(vectors.half(), None, torch.float32), vectors.half().float())
