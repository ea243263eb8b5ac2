"""The low-rank reference against what the papers promise of it: the fast code shall be compared with something true."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import directions, low_rank
from tests.reference.adamw_in_dct import ReferenceDCTAdamW
from tests.reference.directions import Directions, Matrix

STEPS = 20
SHAPES = [(12, 24), (24, 12), (8, 8), (17, 6), (6, 17), (5, 4)]
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "betas": (0.8, 0.97),
    "eps": 1e-6,
    "refresh_interval": 7,
    "moments": "rotate",
}


def gradients(shape: tuple[int, int], seed: int = 0) -> list[Matrix]:
    """Of growing and shrinking size, so that the limiter of Fira and APOLLO is met on both sides."""
    random = np.random.default_rng(seed)
    return [(1 + 0.8 * np.sin(step)) * random.standard_normal(shape) for step in range(STEPS)]


def a_weight(shape: tuple[int, int]) -> Matrix:
    return np.random.default_rng(99).standard_normal(shape)


def reference_of(shape: tuple[int, int], **settings: Any) -> low_rank.ReferenceLowRankAdamW:
    return low_rank.ReferenceLowRankAdamW(a_weight(shape), **{**SETTINGS, **settings})


def power(d: int, r: int) -> directions.Chooser:
    return directions.iterated(np.random.default_rng(7).standard_normal((r, d)), rounds=1)


# -------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("d", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("vector", [directions.dct_vector, directions.hadamard_vector, directions.unit_vector])
def test_fixed_bases_are_orthonormal(vector: Any, d: int) -> None:
    Q = np.stack([vector(k, d) for k in range(d)])
    np.testing.assert_allclose(Q @ Q.T, np.eye(d), atol=1e-14)


def test_small_bases_by_hand() -> None:
    half = 2**-0.5
    for vector in (directions.dct_vector, directions.hadamard_vector):
        np.testing.assert_allclose([vector(0, 2), vector(1, 2)], [[half, half], [half, -half]], atol=1e-15)
    sylvester = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal([2 * directions.hadamard_vector(k, 4) for k in range(4)], sylvester)


def test_columns_are_ranked_by_energy_or_magnitude_and_ties_go_to_the_smaller() -> None:
    one_large = np.diag([3.0, 2.0, 2.0, 2.0])
    spread = np.zeros((4, 4))
    spread[:, 2] = 1.4  # |.| sums to 5.6, squares to 7.84; the large entry of column 0: 3 and 9
    A = one_large * [1, 0, 0, 0] + spread
    l1 = directions.strongest(directions.unit_vector, power=1)
    assert directions.identity(A, 1, None, 0).numbers == [0]
    assert l1(A, 1, None, 0).numbers == [2]
    assert directions.identity(one_large, 2, None, 0).numbers == [0, 1]
    assert directions.identity(np.ones((4, 4)), 3, None, 0).numbers == [0, 1, 2]


@pytest.mark.parametrize("d", [6, 8])
def test_iteration_from_anywhere_ends_in_the_singular_vectors(d: int) -> None:
    A = gradients((17, d))[0]
    exact = directions.svd(A, 3, None, 0).rows
    start = np.random.default_rng(1).standard_normal((3, d))
    iterated = directions.iterated(start, first=400)(A, 3, None, 0).rows
    np.testing.assert_allclose(exact @ exact.T, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(np.abs(exact @ iterated.T), np.eye(3), atol=1e-9)
    assert all(row[np.argmax(np.abs(row))] > 0 for row in exact)


def test_one_round_is_the_orthonormalised_product() -> None:
    """Gram-Schmidt by hand; the old directions, not the start, once there are some."""
    A = gradients((9, 5))[0]
    old = Directions(np.linalg.qr(gradients((5, 5))[1])[0][:2], None)
    Y = A.T @ A @ old.rows.T
    first = Y[:, 0] / low_rank.norm(Y[:, 0])
    second = Y[:, 1] - (first @ Y[:, 1]) * first
    got = directions.iterated(np.full((2, 5), np.nan), rounds=1)(A, 2, old, 5).rows
    np.testing.assert_allclose(got, [first, second / low_rank.norm(second)], atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refresh_interval", [1, 7])
def test_dct_with_nothing_kept_of_the_rest_is_the_reference_of_dct_adamw(shape: Any, refresh_interval: int) -> None:
    settings = {key: SETTINGS[key] for key in ("lr", "weight_decay", "betas", "eps")}
    older = ReferenceDCTAdamW(a_weight(shape), rank=2, refresh_interval=refresh_interval, **settings)
    reference = reference_of(shape, choose=directions.dct, residual="drop", rank=2, refresh_interval=refresh_interval)
    chosen = set()
    for gradient in gradients(shape):
        older.step(gradient)
        reference.step(gradient)
        assert reference.directions is not None
        chosen.add(tuple(reference.directions.numbers or ()))
        np.testing.assert_allclose(reference.weight, older.weight, rtol=1e-13, atol=1e-13)
    assert len(chosen) >= 2, "or refreshes are not tested"


def test_moments_turn_with_the_directions() -> None:
    """Directions permuted: so are the moments. Directions mixed: the mean turns, the variance adds up."""
    reference = reference_of((9, 5), choose=directions.svd, residual="drop", rank=3)
    for gradient in gradients((9, 5))[:5]:
        reference.step(gradient)
    b1, b2 = reference.betas
    old, M, V2 = reference.directions, reference.M.copy(), reference.V2.copy()
    assert old is not None
    reference.carry_moments_over(old, Directions(old.rows[[2, 0, 1]], None))
    np.testing.assert_allclose(reference.M, M[:, [2, 0, 1]], atol=1e-13)
    np.testing.assert_allclose(reference.V2, V2[:, [2, 0, 1]], atol=1e-13)

    reference.M, reference.V2 = M, V2
    c, s = np.cos(0.3), np.sin(0.3)
    mixed = np.stack([c * old.rows[0] + s * old.rows[1], -s * old.rows[0] + c * old.rows[1], old.rows[2]])
    reference.carry_moments_over(old, Directions(mixed, None))
    np.testing.assert_allclose(reference.M[:, 0], c * M[:, 0] + s * M[:, 1], atol=1e-13)
    mean, square = M / (1 - b1**5), V2 / (1 - b2**5)
    variance = square - mean**2
    expected = np.abs(c**2 * variance[:, 0] + s**2 * variance[:, 1] + (c * mean[:, 0] + s * mean[:, 1]) ** 2)
    np.testing.assert_allclose(reference.V2[:, 0], expected * (1 - b2**5), atol=1e-13)
    np.testing.assert_array_equal(reference.age, 5)


@pytest.mark.parametrize(("moments", "age"), [("keep", 8), ("reset", 1)])
def test_moments_are_kept_or_start_anew(moments: str, age: int) -> None:
    reference = reference_of((9, 5), choose=directions.svd, residual="drop", rank=2, moments=moments)
    sizes = []
    for gradient in gradients((9, 5))[:8]:
        reference.step(gradient)
        sizes.append(np.abs(reference.M).max())
    np.testing.assert_array_equal(reference.age, age)
    assert reference.directions is not None
    fresh = 0.2 * gradients((9, 5))[7] @ reference.directions.rows.T
    assert np.allclose(reference.M, fresh) == (moments == "reset")


# ----------------------------------------------------------------------------------------------------------- residuals


@pytest.mark.parametrize("residual", [*low_rank.COMPENSATED, "drop", "sign", "normalized", "fira", "fira_released"])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_unit_vectors_nothing_is_discarded(residual: str, shape: Any) -> None:
    """What is left is AdamW, as torch has it."""
    param = torch.nn.Parameter(torch.from_numpy(a_weight(shape)))
    adamw = torch.optim.AdamW([param], **{key: SETTINGS[key] for key in ("lr", "weight_decay", "betas", "eps")})
    reference = reference_of(shape, choose=directions.identity, residual=residual, rank=min(shape))
    for gradient in gradients(shape):
        param.grad = torch.from_numpy(gradient)
        adamw.step()
        reference.step(gradient)
        np.testing.assert_allclose(reference.weight, param.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_feedback_loses_nothing(shape: Any) -> None:
    """What was projected so far, and what is still owed, is the sum of all gradients."""
    reference = reference_of(shape, choose=directions.dct, residual="error_feedback", rank=2)
    total, projected = 0.0, 0.0
    for gradient in gradients(shape):
        G = gradient.T if reference.is_wide else gradient
        total, before = total + G, reference.E
        reference.step(gradient)
        assert reference.directions is not None
        V = reference.directions.rows
        projected = projected + (G + before) @ V.T @ V
        np.testing.assert_allclose(projected + reference.E, total, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_loses_no_momentum(shape: Any) -> None:
    """E + lift(M) / (1 - b1) + the sum of lift(M) of all steps before = the sum of all gradients.

    From (4) and (6c): what the change of directions takes from the momentum comes back, with the weight
    b1 + b1^2 + ... = b1 / (1 - b1) that it would have had in all later steps.
    """
    d = min(shape)
    reference = reference_of(shape, choose=power(d, 2), residual="ldadam", rank=2, refresh_interval=1)
    total, applied = 0.0, 0.0
    for gradient in gradients(shape):
        total = total + (gradient.T if reference.is_wide else gradient)
        reference.step(gradient)
        assert reference.directions is not None
        lifted = reference.M @ reference.directions.rows
        np.testing.assert_allclose(reference.E + lifted / (1 - 0.8) + applied, total, atol=1e-11)
        applied = applied + lifted


def test_rounding_of_the_error() -> None:
    X = gradients((6, 9))[0]
    X[2] = 0
    rounded = low_rank.quantized(X)
    assert not rounded[2].any()
    for exact, stored in zip(np.delete(X, 2, 0), np.delete(rounded, 2, 0), strict=True):
        largest = np.abs(exact).max()
        assert np.abs(stored - exact).max() <= largest / 254 * (1 + 1e-12)
        assert np.abs(stored).max() == pytest.approx(largest, rel=1e-14)
        assert np.abs(stored - exact).max() > largest / 1016
        np.testing.assert_allclose(stored / largest * 127, np.round(stored / largest * 127), atol=1e-12)


@pytest.mark.parametrize("residual", ["drop", "sign", "normalized", "fira", "fira_released", "apollo", "apollo_mini"])
def test_the_first_step_by_hand(residual: str) -> None:
    """One row in two dimensions, the first kept: at the first step u = 1, whatever the gradient."""
    reference = low_rank.ReferenceLowRankAdamW(
        np.zeros((2, 2)),
        choose=directions.identity,
        residual=residual,
        moments="keep",
        rank=1,
        lr=1.0,
        refresh_interval=9,
        eps=1e-30,
        scale=0.5,
        residual_scale=3.0,
    )
    reference.step(np.array([[4.0, 3.0], [0.0, 0.0]]))
    expected = {
        "drop": [0.5, 0],
        "sign": [0.5, 3],
        "normalized": [0.5, 3 * 0.5**0.5 * 2**0.5],  # sqrt((d - r) / d) D / rms(D), D = (0, 3), rms = 3 / sqrt(2)
        "fira": [0.5, 3 / 4],  # |u| / |g| = 1 / 4
        "fira_released": [0.5 + (4 - 2) / 4, 3 / 4],
        "apollo": [0.5, 0.5 * 3 / 4],
        "apollo_mini": [0.5, 0.5 * 3 / 4],
    }[residual]
    np.testing.assert_allclose(reference.weight, [[-x for x in expected], [0, 0]], atol=1e-8)


@pytest.mark.parametrize("residual", ["fira", "fira_released", "apollo", "apollo_mini"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scaled_part_grows_by_a_hundredth_per_step_at_most(residual: str, shape: Any) -> None:
    reference = reference_of(shape, choose=directions.svd, residual=residual, rank=2, scale=0.25)
    norms = []
    for gradient in gradients(shape):
        reference.step(gradient)
        norms.append(reference.n)
    growth = [after / before for before, after in pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, rel=1e-12), "the limiter must be met"
    assert min(growth) < 1, "and not always"


@pytest.mark.parametrize("residual", ["drop", "sign", "fira", "apollo", "error_feedback_8bit"])
def test_a_wide_matrix_is_a_tall_one_transposed(residual: str) -> None:
    settings = {**SETTINGS, "choose": directions.dct, "residual": residual, "rank": 2}
    tall = low_rank.run(a_weight((9, 5)), gradients((9, 5)), **settings)
    wide = low_rank.run(a_weight((9, 5)).T, [gradient.T for gradient in gradients((9, 5))], **settings)
    for one, other in zip(tall, wide, strict=True):
        np.testing.assert_array_equal(one, other.T)
