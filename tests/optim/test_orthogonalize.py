"""Newton-Schulz through the Gram matrix: the numbers of the plain iteration, in float32 and for bad spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_train.optim.orthogonalize import gram_polynomial, orthogonalized
from lowrank_train.optim.shards.blocks import chunks
from tests.reference.muon import newton_schulz

SPECTRA = {
    "flat": torch.linspace(0.2, 1, 64),
    "two decades": torch.logspace(0, -2, 64),
    "five decades": torch.logspace(0, -5, 64),
    "rank deficient": torch.cat([torch.ones(32), torch.zeros(32)]),
}


def with_spectrum(values: Tensor, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, len(values))
    )
    return left * values.double() @ right.mT


def reference(X: Tensor) -> Tensor:
    return torch.from_numpy(newton_schulz(X.double().numpy()))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows", [64, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_equals_the_plain_iteration(spectrum: str, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """Rounding of the Gram matrix is multiplied by up to 3.4445^10 = 2e5; of float32's 6e-8 little is lost."""
    X = with_spectrum(SPECTRA[spectrum], rows).to(dtype)
    got = X @ gram_polynomial(X.mT @ X)
    assert got.dtype == dtype
    assert relative_error(got, reference(X)) < tolerance


def test_five_steps_bring_singular_values_near_one() -> None:
    X = with_spectrum(torch.logspace(0, -1.5, 64), 200)
    values = torch.linalg.svdvals(X @ gram_polynomial(X.mT @ X))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_singular_vectors_stay() -> None:
    X = with_spectrum(SPECTRA["flat"], 100)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    turned = U.mT @ (X @ gram_polynomial(X.mT @ X)) @ Vh.mT
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-12)


def test_the_length_of_the_input_does_not_matter() -> None:
    X = with_spectrum(SPECTRA["flat"], 100)
    expected = X @ gram_polynomial(X.mT @ X)
    for factor in (1e-6, 1e6):
        Y = factor * X
        torch.testing.assert_close(Y @ gram_polynomial(Y.mT @ Y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero(dtype: torch.dtype) -> None:
    X = torch.zeros(5, 3, dtype=dtype)
    assert torch.equal(X @ gram_polynomial(X.mT @ X), X)


def test_an_empty_and_a_zero_block_of_rows_take_part() -> None:
    X = with_spectrum(SPECTRA["flat"], 100)
    polynomial = gram_polynomial(X.mT @ X)
    assert (X[:0] @ polynomial).shape == (0, 64)
    assert not (torch.zeros_like(X) @ polynomial).any()


def test_a_batch_equals_one_at_a_time() -> None:
    blocks = [with_spectrum(values, rows) for values, rows in zip(SPECTRA.values(), (64, 65, 100, 200), strict=True)]
    params = [torch.empty(block.shape) for block in blocks]
    for block, got in zip(blocks, orthogonalized(params, blocks), strict=True):
        torch.testing.assert_close(got, reference(block), rtol=0, atol=1e-11)


def test_sizes_and_types_may_be_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.randn(m, d, generator=generator, dtype=dtype)
        for m, d, dtype in [(9, 4, torch.float32), (7, 7, torch.float64), (9, 4, torch.float64), (3, 1, torch.float32)]
    ]
    results = orthogonalized([torch.empty(block.shape) for block in blocks], blocks)
    for block, got in zip(blocks, results, strict=True):
        assert got.dtype == block.dtype
        assert relative_error(got, reference(block)) < 1e-3


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_full_float32_and_the_users_choice_comes_back(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    inside = []

    def spy(gram: Tensor, *, unit: float) -> Tensor:
        inside.extend(backend.fp32_precision for backend in backends)
        return gram_polynomial(gram, unit=unit)

    monkeypatch.setattr("lowrank_train.optim.orthogonalize.gram_polynomial", spy)
    X = with_spectrum(SPECTRA["flat"], 200).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = [backend.fp32_precision for backend in backends]
        orthogonalized([X], [X])
        assert inside == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == outside
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_chunks_bound_the_workspace_and_keep_the_order() -> None:
    numbers = [4, 4, 4, 25, 1, 9, 1]
    found = list(chunks(numbers, numbers, 10))
    assert found == [[4, 4], [4], [25], [1, 9], [1]]
    assert list(chunks([], [], 10)) == []


def test_coefficients_are_the_published_ones() -> None:
    """p(1)^2 of one step from a 1 x 1 matrix, whose normalised Gram matrix is 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    assert math.isclose(gram_polynomial(one, steps=1).item(), 3.4445 - 4.7750 + 2.0315, rel_tol=1e-15)
    np.testing.assert_allclose(gram_polynomial(4 * one).item(), newton_schulz(np.full((1, 1), 2.0)).item() / 2)
