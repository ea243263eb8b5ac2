"""Which singular triplets are drawn: probabilities, distinct and sorted indices, every rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.spectral.sampling import SAMPLERS, sample

every_rule = pytest.mark.parametrize("rule", list(SAMPLERS))


def falling(k: int) -> Tensor:
    return torch.linspace(3.0, 0.1, k, dtype=torch.float64)


def frequencies(rule: str, sigma: Tensor, r: int, draws: int) -> Tensor:
    """How often each index is drawn."""
    counts = torch.zeros(len(sigma), dtype=torch.float64)
    for seed in range(draws):
        counts[sample(rule, sigma, r, iteration=seed, seed=seed)] += 1
    return counts / draws


@every_rule
@pytest.mark.parametrize(("k", "r"), [(1, 1), (5, 1), (7, 3), (8, 4), (6, 6)])
def test_as_many_distinct_sorted_indices_as_asked_for(rule: str, k: int, r: int) -> None:
    for iteration in range(12):
        chosen = sample(rule, falling(k), r, iteration=iteration, seed=iteration)
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == r
        assert chosen.min() >= 0
        assert chosen.max() < k


@every_rule
def test_equal_arguments_draw_the_same_whatever_the_global_generator_does(rule: str) -> None:
    first = sample(rule, falling(20), 5, iteration=3, seed=7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(sample(rule, falling(20), 5, iteration=3, seed=7), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", ["multinomial", "uniform"])
def test_other_seeds_draw_otherwise(rule: str) -> None:
    drawn = {tuple(sample(rule, falling(20), 5, iteration=0, seed=seed).tolist()) for seed in range(20)}
    assert len(drawn) >= 18


@every_rule
def test_float32_draws_as_float64(rule: str) -> None:
    sigma = falling(12).float()
    for seed in range(10):
        in_float32 = sample(rule, sigma, 4, iteration=seed, seed=seed)
        assert torch.equal(in_float32, sample(rule, sigma.double(), 4, iteration=seed, seed=seed))


def test_multinomial_draws_one_by_equation_16() -> None:
    """p_i = (1 / k + sigma_i / sum sigma) / 2; 4000 draws, so a standard deviation below 0.008."""
    sigma = torch.tensor([6.0, 3.0, 1.0, 0.0])
    expected = torch.tensor([0.425, 0.275, 0.175, 0.125], dtype=torch.float64)
    assert (frequencies("multinomial", sigma, 1, 4000) - expected).abs().max() < 0.03


def test_multinomial_is_without_replacement() -> None:
    """Of r = 2, P(i) = p_i + sum_{j != i} p_j p_i / (1 - p_j)."""
    sigma = torch.tensor([6.0, 3.0, 1.0, 0.0])
    p = [0.425, 0.275, 0.175, 0.125]
    expected = torch.tensor(
        [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)], dtype=torch.float64
    )
    assert (frequencies("multinomial", sigma, 2, 4000) - expected).abs().max() < 0.035


@pytest.mark.parametrize(("rule", "sigma"), [("multinomial", [0.0] * 4), ("uniform", [9.0, 1.0, 0.0, 0.0])])
def test_without_weights_all_are_alike(rule: str, sigma: list[float]) -> None:
    assert (frequencies(rule, torch.tensor(sigma), 1, 4000) - 0.25).abs().max() < 0.03


def test_a_zero_singular_value_can_still_be_drawn() -> None:
    sigma = torch.zeros(5)
    sigma[0] = 1.0
    assert len(sample("multinomial", sigma, 5, iteration=0, seed=0)) == 5
    assert (frequencies("multinomial", sigma, 1, 500) > 0).all()


def test_top_takes_the_largest_and_of_equals_the_first() -> None:
    assert sample("top", torch.tensor([1.0, 5.0, 2.0, 5.0, 4.0]), 3, iteration=0, seed=0).tolist() == [1, 3, 4]
    assert sample("top", torch.ones(5), 2, iteration=0, seed=0).tolist() == [0, 1]


@pytest.mark.parametrize(("k", "r"), [(9, 3), (8, 3), (7, 1), (4, 4), (5, 4), (6, 5)])
def test_sequential_gives_every_triplet_a_turn_in_any_round(k: int, r: int) -> None:
    """Places are drawn, contents change places: in any ceil(k / r) iterations on end all contents were active."""
    places, turns = list(range(k)), -(-k // r)
    active = []
    for iteration in range(3 * turns):
        chosen = sample("sequential", falling(k), r, iteration=iteration, seed=0).tolist()
        arriving = [i for i in chosen if i >= r]
        leaving = [i for i in range(r) if i not in chosen]
        for i, j in zip(leaving, arriving, strict=True):
            places[i], places[j] = places[j], places[i]
        active.append(set(places[:r]))
    for start in range(2 * turns + 1):
        window = active[start : start + turns]
        assert set().union(*window) == set(range(k)), start
        if k % r == 0:
            assert sum(len(one) for one in window) == k
