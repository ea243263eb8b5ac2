"""Properties every basis must have, and the formulas of each."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from optim import Basis, DCTBasis
from optim.basis import dct_matrix
from tests.reference.adamw_in_dct import dct_column

CPU = torch.device("cpu")
BASES = [pytest.param(DCTBasis(), id="dct")]
SIZES = [(1, 1), (2, 1), (5, 3), (8, 8), (31, 7), (64, 16)]

every_basis = pytest.mark.parametrize("basis", BASES)
every_size = pytest.mark.parametrize(("d", "r"), SIZES)


def random_state(basis: Basis, d: int, r: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return basis.choose(basis.statistics(torch.randn(d + 3, d, dtype=dtype)), r)


def directions(basis: Basis, state: dict[str, Tensor], d: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Q_r (d, r)."""
    return basis.lift(torch.eye(r, dtype=dtype), state, d).mT


@every_basis
@every_size
def test_orthonormal(basis: Basis, d: int, r: int) -> None:
    assert basis.is_orthonormal
    q = directions(basis, random_state(basis, d, r), d, r)
    assert q.shape == (d, r)
    assert (q.mT @ q - torch.eye(r, dtype=q.dtype)).abs().max() < 1e-12


@every_basis
def test_orthonormal_in_float32_at_width_1024(basis: Basis) -> None:
    q = directions(basis, random_state(basis, 1024, 256, torch.float32), 1024, 256, torch.float32).double()
    # Rounding each of 1024 entries to 2^-24 relative: sqrt(1024) 2^-24 / 32 on average, far below this bound.
    assert (q.mT @ q - torch.eye(256, dtype=q.dtype)).abs().max() < 1e-6


@every_basis
@every_size
def test_project_is_the_adjoint_of_lift(basis: Basis, d: int, r: int) -> None:
    state, gradient = random_state(basis, d, r), torch.randn(5, d, dtype=torch.float64)
    q = directions(basis, state, d, r)
    torch.testing.assert_close(basis.project(gradient, state), gradient @ q, rtol=1e-12, atol=1e-12)


@every_basis
@every_size
def test_lifting_a_projection_is_idempotent(basis: Basis, d: int, r: int) -> None:
    state, gradient = random_state(basis, d, r), torch.randn(5, d, dtype=torch.float64)
    once = basis.lift(basis.project(gradient, state), state, d)
    twice = basis.lift(basis.project(once, state), state, d)
    assert (once - twice).abs().max() < 1e-12
    if r < d:
        assert (once - gradient).abs().max() > 1e-3
    else:
        assert (once - gradient).abs().max() < 1e-12


@every_basis
@pytest.mark.parametrize("parts", [[4, 5], [0, 9], [3, 3, 3], [9]])
def test_statistics_add_over_row_shards(basis: Basis, parts: list[int]) -> None:
    gradient = torch.randn(9, 6, dtype=torch.float64)
    summed = sum(basis.statistics(part) for part in gradient.split(parts))
    torch.testing.assert_close(summed, basis.statistics(gradient), rtol=1e-12, atol=1e-12)


@every_basis
def test_statistics_of_nothing_are_zero_and_of_something_are_not(basis: Basis) -> None:
    assert not basis.statistics(torch.zeros(4, 6)).any()
    assert basis.statistics(torch.randn(4, 6)).any()
    assert not basis.statistics(torch.zeros(0, 6)).any()


@every_basis
@every_size
def test_transport_is_the_rotation_between_the_directions(basis: Basis, d: int, r: int) -> None:
    old, new = random_state(basis, d, r), random_state(basis, d, r)
    rotation = directions(basis, old, d, r).mT @ directions(basis, new, d, r)
    moments = torch.randn(5, r, dtype=torch.float64)
    torch.testing.assert_close(basis.transport(moments, old, new), moments @ rotation, rtol=1e-12, atol=1e-12)


@every_basis
def test_transport_to_the_same_directions_is_exact_in_any_dtype(basis: Basis) -> None:
    state = random_state(basis, 12, 5)
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        moments = (torch.randn(3, 5) * 100).to(dtype)
        carried = basis.transport(moments, state, state)
        assert carried.dtype == dtype
        assert torch.equal(carried, moments)


@every_basis
@every_size
def test_choose_returns_what_state_tensors_declares(basis: Basis, d: int, r: int) -> None:
    declared, state = basis.state_tensors(d, r), random_state(basis, d, r)
    assert {key: (spec.shape, spec.dtype) for key, spec in declared.items()} == {
        key: (tuple(value.shape), value.dtype) for key, value in state.items()
    }


@every_basis
def test_a_basis_built_on_fake_tensors_does_not_reach_real_ones(basis: Basis) -> None:
    """Memory prediction runs whole steps on fake tensors; a cache must not hand those to a real step."""
    d = 13  # used by no other test, so that nothing is cached yet
    with FakeTensorMode():
        basis.statistics(torch.randn(4, d))
    assert type(basis.statistics(torch.randn(4, d))) is Tensor


def test_dct_keeps_the_columns_with_the_most_energy() -> None:
    basis, d, r = DCTBasis(), 6, 2
    gradient = torch.randn(9, d, dtype=torch.float64)

    def discarded(indices: tuple[int, ...]) -> float:
        state = {"basis_index": torch.tensor(indices, dtype=torch.int32)}
        return (gradient - basis.lift(basis.project(gradient, state), state, d)).norm().item()

    chosen = tuple(basis.choose(basis.statistics(gradient), r)["basis_index"].tolist())
    assert chosen == min(itertools.combinations(range(d), r), key=discarded)


def test_dct_ties_go_to_the_lower_frequency() -> None:
    def chosen(energies: Tensor, r: int) -> list[int]:
        return DCTBasis().choose(energies, r)["basis_index"].tolist()

    assert chosen(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 2) == [1, 2]
    assert chosen(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 4) == [0, 1, 2, 3]
    assert chosen(torch.ones(5000), 3) == [0, 1, 2]  # long enough for an unstable sort to show


def test_dct_columns_without_a_past_are_exactly_zero() -> None:
    old = {"basis_index": torch.tensor([1, 4, 6], dtype=torch.int32)}
    new = {"basis_index": torch.tensor([0, 4, 7], dtype=torch.int32)}
    carried = DCTBasis().transport(torch.tensor([[1.0, 2.0, float("nan")]]), old, new)
    assert carried.tolist() == [[0.0, 2.0, 0.0]]


@pytest.mark.parametrize("d", [1, 2, 3, 16, 63])
def test_dct_matrix_equals_the_formula(d: int) -> None:
    expected = torch.stack([torch.from_numpy(dct_column(k, d)) for k in range(d)])
    assert (dct_matrix(d, CPU, torch.float64) - expected).abs().max() < 1e-12


def test_dct_matrix_is_accurate_in_float32_at_width_2048() -> None:
    """Angles computed in float32 would be off by about 1e-3 here."""
    d = 2048
    rows = dct_matrix(d, CPU, torch.float32)
    assert rows.dtype == torch.float32
    for k, i in [(1, 0), (1023, 77), (2047, 2047), (2000, 1999), (0, 5)]:
        scale = math.sqrt((1 if k == 0 else 2) / d)
        expected = scale * math.cos(math.pi * k * (2 * i + 1) / (2 * d))
        assert abs(rows[k, i].item() - expected) < 1e-7 * scale
