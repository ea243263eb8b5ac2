"""Ranks under a budget: against a literal search, the properties that make them fair, and each score by hand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.spectral.ranks import SCORES, allocate_ranks, scores
from tests.reference.rank_allocation import allocate_ranks as reference


def spectrum(k: int, seed: int, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(k, dtype=torch.float64, generator=generator) + 0.05
    return (values * torch.arange(1, k + 1, dtype=torch.float64) ** -decay).sort(descending=True).values


def factor_costs(m: int, n: int) -> Tensor:
    """Numbers stored at ranks 0 .. k: of the factors, or of the matrix where that is fewer."""
    return torch.tensor([min(r * (m + n), m * n) for r in range(min(m, n) + 1)])


def spent(ranks: list[int], costs: list[Tensor]) -> int:
    return sum(int(cost[rank]) for cost, rank in zip(costs, ranks, strict=True))


SHAPES = [(8, 8), (8, 20), (12, 8), (5, 30), (16, 16), (3, 3)]


def problem(score: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of many shapes; two have one spectrum, so that there are ties under every score."""
    shapes = [*SHAPES, (8, 8)]
    costs = [factor_costs(m, n) for m, n in shapes]
    sigma = [spectrum(min(shape), seed + i, decay=i % 3 / 2) for i, shape in enumerate(shapes)]
    sigma[-1] = sigma[0]
    return [scores(score, s, cost) for s, cost in zip(sigma, costs, strict=True)], costs


# ---------------------------------------------------------------------------------------------------- literal reference


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("limits", [{}, {"multiple": 4}, {"multiple": 3, "floor": 2}, {"floor": 3, "ceiling": 6}])
def test_the_ranks_are_those_of_the_literal_search(score: str, limits: dict[str, int]) -> None:
    found = set()
    for seed in range(2):
        values, costs = problem(score, seed)
        total = sum(int(cost[-1]) for cost in costs)
        for budget in range(0, total + 50, 53):
            expected = reference([v.tolist() for v in values], [c.tolist() for c in costs], budget, **limits)
            if expected is None:
                with pytest.raises(ValueError, match="is too small: the least ranks cost"):
                    allocate_ranks(values, costs, budget, **limits)
            else:
                assert allocate_ranks(values, costs, budget, **limits) == expected
            found.add(tuple(expected or ()))
    assert len(found) > 3  # different answers were compared


def test_the_ranks_are_those_of_the_literal_search_with_many_ties() -> None:
    """Scores of few values, costs that are level in places: where an order of sorting would show."""
    chooser = random.Random(0)
    for _ in range(40):
        ks = [chooser.randint(1, 6) for _ in range(4)]
        values = [torch.tensor(sorted(chooser.choices([0.0, 0.5, 1.0], k=k), reverse=True)) for k in ks]
        costs = [torch.tensor([0, *itertools.accumulate(chooser.choices([0, 1, 2], k=k))]) for k in ks]
        for budget in range(sum(int(cost[-1]) for cost in costs) + 1):
            expected = reference([v.tolist() for v in values], [c.tolist() for c in costs], budget)
            if expected is not None:
                assert allocate_ranks(values, costs, budget) == expected


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("score", SCORES)
def test_equal_spectra_get_equal_ranks_at_every_budget(score: str) -> None:
    values, costs = problem(score, 0)
    least = len(values)
    for budget in range(spent([1] * least, costs), sum(int(cost[-1]) for cost in costs) + 1, 11):
        ranks = allocate_ranks(values, costs, budget)
        assert ranks[0] == ranks[-1]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("limits", [{}, {"multiple": 4}, {"floor": 2, "ceiling": 7}])
def test_a_larger_budget_takes_rank_from_no_matrix_and_none_is_exceeded(score: str, limits: dict[str, int]) -> None:
    values, costs = problem(score, 1)
    before = [0] * len(values)
    total = sum(int(cost[-1]) for cost in costs)
    for budget in [*range(0, total, 13), total]:
        try:
            ranks = allocate_ranks(values, costs, budget, **limits)
        except ValueError:
            assert before == [0] * len(values)  # too small only ever below the first that fits
            continue
        assert spent(ranks, costs) <= budget
        assert all(now >= then for now, then in zip(ranks, before, strict=True))
        before = ranks
    if not limits:
        assert before == [len(value) for value in values]


@pytest.mark.parametrize("score", SCORES)
def test_what_is_left_of_the_budget_is_less_than_the_next_tie(score: str) -> None:
    """With a rank of cost 1 and no ties, the budget is spent to the last."""
    sigma = [spectrum(k, seed) for seed, k in enumerate((6, 9, 14))]
    costs = [torch.arange(len(s) + 1) for s in sigma]
    values = [scores(score, s, cost) for s, cost in zip(sigma, costs, strict=True)]
    pooled = torch.cat([value[1:] for value in values])
    largest_tie = int(pooled.unique(return_counts=True)[1].max())
    for budget in range(3, 30):
        assert budget - largest_tie < spent(allocate_ranks(values, costs, budget), costs) <= budget


def test_the_order_of_the_matrices_does_not_matter() -> None:
    values, costs = problem("minmax", 2)
    for budget in (200, 400, 700):
        forward = allocate_ranks(values, costs, budget)
        assert allocate_ranks(values, costs, budget) == forward
        assert allocate_ranks(values[::-1], costs[::-1], budget) == forward[::-1]


def test_tied_scores_stay_or_go_together() -> None:
    """Four matrices, each with a second value of the same score: not one of them alone is kept."""
    values, costs = [torch.tensor([1.0, 0.5])] * 4, [torch.arange(3)] * 4
    assert [sum(allocate_ranks(values, costs, budget)) for budget in range(4, 9)] == [4, 4, 4, 4, 8]


def test_ranks_are_multiples_between_the_floor_and_the_ceiling() -> None:
    values, costs = problem("relative", 3)
    for budget in range(650, 1200, 50):
        for rank, value in zip(allocate_ranks(values, costs, budget, multiple=4), values, strict=True):
            assert rank % 4 == 0 or rank == len(value)
        for rank, value in zip(allocate_ranks(values, costs, budget, floor=3), values, strict=True):
            assert rank >= min(3, len(value))
        for rank, value in zip(allocate_ranks(values, costs, budget, multiple=4, floor=3), values, strict=True):
            assert rank >= min(4, len(value))
    everything = sum(int(cost[-1]) for cost in costs)
    assert allocate_ranks(values, costs, everything, ceiling=5) == [min(5, len(value)) for value in values]
    sizes = [len(value) for value in values]
    assert sizes == [8, 8, 8, 5, 16, 3, 8]
    assert allocate_ranks(values, costs, everything, multiple=4, ceiling=7) == [4, 4, 4, 5, 4, 3, 4]
    assert allocate_ranks(values, costs, everything, multiple=4, ceiling=4) == [4, 4, 4, 4, 4, 3, 4]


def test_a_ceiling_no_matrix_reaches_changes_nothing() -> None:
    """Also where a whole rank is no multiple: 5 and 3 are below the ceiling, and so may be kept whole."""
    values, costs = problem("relative", 3)
    everything = sum(int(cost[-1]) for cost in costs)
    for budget in (700, everything):
        free = allocate_ranks(values, costs, budget, multiple=4)
        assert allocate_ranks(values, costs, budget, multiple=4, ceiling=1000) == free
    assert free == [len(value) for value in values]


def test_beyond_the_break_even_rank_the_rest_is_free() -> None:
    """A square matrix costs as much at half its rank as whole; the budget of that half buys the whole."""
    costs = [factor_costs(10, 10)]
    values = [torch.ones(10, dtype=torch.float64)]
    assert allocate_ranks(values, costs, 100) == [10]
    assert allocate_ranks([spectrum(10, 0)], costs, 99) == [4]


# --------------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand() -> None:
    sigma, costs = torch.tensor([4.0, 3.0, 0.0]), torch.tensor([0, 10, 20, 20])
    assert scores("minmax", sigma, costs).tolist() == [1, 0.75, 0]
    assert scores("relative", sigma, costs).tolist() == [1, 0.75, 0]
    assert scores("energy", sigma, costs).tolist() == pytest.approx([0.64, 0.36, 0])
    assert scores("energy_per_cost", sigma, costs).tolist() == pytest.approx([0.064, 0.036, 0])
    assert scores("uniform", sigma, costs).tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    shifted = sigma + 4
    assert scores("minmax", shifted, costs).tolist() == [1, 0.75, 0]
    assert scores("relative", shifted, costs).tolist() == pytest.approx([1, 7 / 8, 1 / 2])


@pytest.mark.parametrize("score", SCORES)
def test_scores_never_rise_and_do_not_know_the_scale(score: str) -> None:
    for seed in range(5):
        sigma = spectrum(17, seed)
        costs = factor_costs(17, 40)
        values = scores(score, sigma, costs)
        assert values.dtype == torch.float64
        assert (values.diff() <= 0).all()
        torch.testing.assert_close(scores(score, sigma * 2.0**70, costs), values, rtol=1e-12, atol=0)
        assert torch.equal(scores(score, sigma.float(), costs), scores(score, sigma.float().double(), costs))


def test_uniform_takes_the_same_share_whatever_the_spectrum() -> None:
    shapes = [(10, 10), (20, 20), (40, 50), (30, 10)]
    costs = [torch.arange(min(shape) + 1) for shape in shapes]
    values = [
        scores("uniform", spectrum(min(s), i, decay=i), c) for i, (s, c) in enumerate(zip(shapes, costs, strict=True))
    ]
    for tenths in range(1, 11):
        budget = tenths * sum(min(shape) for shape in shapes) // 10
        assert allocate_ranks(values, costs, budget) == [tenths * min(shape) // 10 for shape in shapes]


def test_a_flat_spectrum_is_as_dear_as_the_largest_value_under_minmax() -> None:
    costs = [torch.arange(5), torch.arange(5)]
    values = [scores("minmax", torch.full((4,), 0.3), costs[0]), scores("minmax", spectrum(4, 0), costs[1])]
    assert values[0].tolist() == [1, 1, 1, 1]
    assert allocate_ranks(values, costs, 5) == [4, 1]


@pytest.mark.parametrize("score", [name for name in SCORES if name != "uniform"])
def test_a_matrix_of_zeros_keeps_no_more_than_the_floor(score: str) -> None:
    """It has nothing to keep, and must not take rank from the others."""
    costs = [torch.arange(5), torch.arange(5)]
    values = [scores(score, torch.zeros(4), costs[0]), scores(score, spectrum(4, 0), costs[1])]
    assert torch.isfinite(values[0]).all()
    assert allocate_ranks(values, costs, 4) == [1, 3]


def test_a_single_singular_value_is_kept() -> None:
    for score in SCORES:
        assert allocate_ranks([scores(score, torch.ones(1), torch.arange(2))], [torch.arange(2)], 1) == [1]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("score", "sigma", "message"),
    [
        ("minmx", [1.0], "score='minmx'; expected one of minmax, relative"),
        ("minmax", [float("nan"), 1.0], "singular values that are not finite"),
        ("minmax", [float("inf"), 1.0], "singular values that are not finite"),
        ("minmax", [1.0, 2.0], "from the largest to the smallest, none below 0"),
        ("minmax", [1.0, -2.0], "from the largest to the smallest, none below 0"),
        ("minmax", [], "from the largest to the smallest, none below 0"),
    ],
)
def test_spectra_that_are_none(score: str, sigma: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores(score, torch.tensor(sigma), torch.arange(len(sigma) + 1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"multiple": 0}, "multiple=0; expected a whole number >= 1"),
        ({"multiple": 1.5}, "multiple=1.5; expected a whole number >= 1"),
        ({"floor": -1}, "floor=-1; expected a whole number >= 1"),
        ({"floor": True}, "floor=True; expected a whole number >= 1"),
        ({"ceiling": 0}, "ceiling=0"),
        ({"ceiling": 2, "floor": 3}, "ceiling=2 is below floor=3"),
    ],
)
def test_limits_out_of_range(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_ranks([torch.ones(4)], [torch.arange(5)], 4, **limits)


def test_a_budget_below_the_least_says_what_the_least_is() -> None:
    with pytest.raises(ValueError, match="a budget of 7 is too small: the least ranks cost 8"):
        allocate_ranks([torch.ones(4)] * 4, [torch.arange(5) * 2] * 4, 7)
