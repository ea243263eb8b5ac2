"""Learning-rate schedules: shape, ends, and what the trainer makes of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from lowrank_train.config.schema import ScheduleConfig
from lowrank_train.train.schedule import learning_rate_factor

STEPS = 50


def factors(steps: int = STEPS, **settings: Any) -> list[float]:
    factor = learning_rate_factor(ScheduleConfig(**settings), steps)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_warm_up_is_linear_and_never_zero(name: str, warmup: int) -> None:
    rates = factors(name=name, warmup_steps=warmup)
    assert rates[0] == pytest.approx(1 / (warmup + 1))
    assert rates[: warmup + 1] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup + 1)])
    assert rates[warmup] == max(rates) == 1.0


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_smallest_rate(name: str, min_ratio: float) -> None:
    rates = factors(name=name, warmup_steps=5, min_ratio=min_ratio)
    assert rates[-1] == pytest.approx(min_ratio, abs=1e-12)
    assert min(rates[5:]) == rates[-1]


def test_cosine_is_the_textbook_curve() -> None:
    rates = factors(name="cosine", warmup_steps=9, min_ratio=0.2)
    for step in range(9, STEPS):
        done = (step - 9) / (STEPS - 1 - 9)
        assert rates[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2)


def test_wsd_is_flat_and_then_a_line_over_its_last_share() -> None:
    rates = factors(name="wsd", warmup_steps=5, min_ratio=0.1, decay_fraction=0.2)
    assert rates[5:40] == [1.0] * 35
    falls = [before - after for before, after in pairwise(rates[39:])]
    assert falls == pytest.approx([0.9 / 10] * 10)


def test_constant_stays() -> None:
    assert factors(name="constant", warmup_steps=5)[5:] == [1.0] * (STEPS - 5)


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 10), (2, 1), (5, 100)])
def test_runs_shorter_than_their_warm_up(name: str, steps: int, warmup: int) -> None:
    rates = factors(steps, name=name, warmup_steps=warmup)
    assert all(0 < rate <= 1 for rate in rates)
    if steps <= warmup and name != "wsd":  # wsd decays in its last share all the same
        assert rates == sorted(rates)
