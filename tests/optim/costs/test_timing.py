"""Step times: what is measured, in what order, and how figures become ratios. Nothing here depends on a clock."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_train import optim
from lowrank_train.optim.costs import time as timing
from lowrank_train.optim.costs.time import BASELINES, StepTime, rank_argument, time_steps

SHAPES = [(12, 8), (8, 12)]


OF_MATRICES = optim.names(of_matrices=True)


def settings(*names: str) -> dict[str, dict[str, int]]:
    return {name: rank_argument(name, 2) for name in names or OF_MATRICES}


def test_every_optimizer_of_matrices_can_be_timed() -> None:
    times = time_steps(settings(), SHAPES, rounds=2, refreshes=1, interval=50)
    assert [time.name for time in times] == OF_MATRICES
    for time in times:
        assert time.first_seconds > 0
        assert time.ordinary_seconds > 0
        assert time.refresh_seconds >= 0
        for key in BASELINES:
            assert time.adamw_seconds[key] > 0
            assert time.quartiles[key][0] <= time.ordinary_ratio[key] <= time.quartiles[key][1]


@pytest.mark.parametrize("name", sorted(set(optim.names()) - set(OF_MATRICES)))
def test_an_optimizer_that_trains_layers_of_its_own_cannot_be_timed_on_matrices(name: str) -> None:
    """It could not update the same weights from the same gradients; the error says what it lacks."""
    with pytest.raises(ValueError, match=r"the model has no .*layers"):
        time_steps({name: {}}, SHAPES, rounds=1, refreshes=1)


def test_interval_is_the_given_one_where_there_is_one() -> None:
    times = {t.name: t for t in time_steps(settings(), SHAPES, rounds=1, refreshes=1, interval=50)}
    assert times["dct_adamw"].interval == 50
    assert times["adamw"].interval is None
    assert times["ldadam"].interval is None, "it chooses in every step: part of its ordinary step"
    own = time_steps({"dct_adamw": {"rank": 2, "refresh_interval": 30}}, SHAPES, rounds=1, refreshes=1)
    assert own[0].interval == 30


def fake_clock(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Any], float]) -> list[str]:
    """Steps are taken, and said to last ``seconds(optimizer)``; returns the list of who stepped."""
    log: list[str] = []

    def measured(step: Callable[[], Any], device: torch.device) -> float:
        optimizer = step.__self__  # type: ignore[attr-defined]
        step()
        log.append(type(optimizer).__name__)
        return seconds(optimizer)

    monkeypatch.setattr(timing, "_seconds", measured)
    return log


def test_ratios_are_medians_of_paired_ratios_and_refreshes_are_amortised(monkeypatch: pytest.MonkeyPatch) -> None:
    slowness = itertools.cycle([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0])  # of the machine, round by round

    def seconds(optimizer: Any) -> float:
        group = optimizer.param_groups[0]
        if type(optimizer) is torch.optim.AdamW:
            return (1.0 if group["fused"] else 2.0) * next(slowness)
        if optimizer.state[group["params"][0]]["step"] == 1:
            return 1000.0  # the first step
        return 3.0 * next(slowness) if group["refresh_interval"] > 1 else 43.0

    fake_clock(monkeypatch, seconds)
    (time,) = time_steps(settings("dct_adamw"), SHAPES, rounds=3, refreshes=1, interval=10)
    assert time.first_seconds == 1000
    assert time.ordinary_ratio == {"fused": 3.0, "foreach": 1.5}, "the slow round is slow for both"
    assert time.refresh_seconds == 40
    assert time.ordinary_seconds == 3
    assert time.adamw_seconds == {"fused": 1.0, "foreach": 2.0}
    assert time.amortised_ratio == {"fused": 3.0 + 4.0, "foreach": 1.5 + 2.0}


def test_a_round_times_every_adamw_beside_every_optimizer_in_turning_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_clock(monkeypatch, lambda optimizer: 1.0)
    time_steps(settings("adamw", "dct_adamw"), SHAPES, rounds=2, refreshes=1)
    pair = ["AdamW", "AdamW"]  # torch's
    first = ["AdamW", "DCTAdamW"]
    assert log == [*first, *pair, "AdamW", *pair, "DCTAdamW", "DCTAdamW", *pair, "DCTAdamW", *pair, "AdamW"]


def test_directions_change_in_refresh_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    def seconds(optimizer: Any) -> float:
        if isinstance(optimizer, optim.FRUGAL):
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            seen.append((int(state["step"]), bool((state["column_age"] == 1).all())))
        return 1.0

    fake_clock(monkeypatch, seconds)
    time_steps(settings("frugal"), SHAPES, rounds=3, refreshes=2)
    assert seen == [(1, True), (2, False), (3, True), (4, False), (5, True), (6, False)]


def test_gradients_are_left_alone_and_garbage_collection_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    grads: list[Any] = []

    def seconds(optimizer: Any) -> float:
        assert not gc.isenabled()
        grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return 1.0

    fake_clock(monkeypatch, seconds)
    time_steps(settings(), SHAPES, rounds=1, refreshes=1)
    assert gc.isenabled()
    for later in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], later, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert len(time_steps(settings("dct_adamw", "galore_adamw"), SHAPES, dtype=dtype, rounds=1, refreshes=1)) == 2


def test_rank_is_given_to_methods_that_leave_it_open() -> None:
    assert rank_argument("dct_adamw", 7) == {"rank": 7}
    assert rank_argument("dct_adamw", None) == {}
    assert rank_argument("apollo_mini", 7) == {}, "rank 1 is what makes it APOLLO-Mini"
    assert rank_argument("adamw", 7) == {}


def test_amortised_ratio_without_refreshes_is_the_ordinary_one() -> None:
    time = StepTime("x", None, 1.0, 1.0, 0.0, {"fused": 1.0}, {"fused": 2.0}, {"fused": (1.0, 3.0)})
    assert time.amortised_ratio == {"fused": 2.0}


def test_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    time_steps(settings("adamw"), SHAPES, rounds=2, refreshes=1, progress=print)
    assert capsys.readouterr().out.splitlines() == ["first step of adamw", "round 1 of 2", "round 2 of 2"]


@pytest.mark.parametrize(("rounds", "refreshes"), [(0, 1), (2, 0), (2, 3)])
def test_numbers_of_rounds_are_checked(rounds: int, refreshes: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1 <= refreshes <= rounds"):
        time_steps(settings("adamw"), SHAPES, rounds=rounds, refreshes=refreshes)


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="rank=9 exceeds"):
        time_steps({"dct_adamw": {"rank": 9}}, SHAPES)
    with pytest.raises(ValueError, match="unknown optimizer 'dct'"):
        time_steps({"dct": {}}, SHAPES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which only pytest -m gpu sees")
def test_cuda_steps_are_timed_on_the_device() -> None:
    times = time_steps(settings(), [(512, 256), (256, 512)], device="cuda", rounds=2, refreshes=1)
    assert all(0 < time.ordinary_seconds < 60 for time in times)
