"""Time of an optimizer's step, measured against torch's AdamW, interleaved in one process.

All optimizers update the same weights from the same gradients, round after round, and each of their steps is taken
beside one of every AdamW: what else the machine does, and how warm its caches are, then falls on both sides of a ratio,
and the median over the rounds is what is reported. Seconds measured one optimizer after the other can differ by more
than the optimizers do.

    ordinary     a step in the present directions
    refresh      what a step takes more when it chooses new directions, from old ones
    amortised    (ordinary + refresh / interval) / AdamW, for one refresh every ``interval`` steps

The very first step also fills memory and chooses directions from nothing; it is reported, and part of no ratio.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.methods import create, find

__all__ = ["BASELINES", "StepTime", "rank_argument", "refresh_interval", "time_steps"]

BASELINES: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
"""The AdamW that steps are compared with: arguments of ``torch.optim.AdamW``."""

_COMMON: dict[str, Any] = {"lr": 1e-4, "weight_decay": 1e-2}
"""Weight decay of every optimizer and of AdamW: decay costs a pass over the weights, so all have it or none."""

_NEVER = 2**62


@dataclass(frozen=True)
class StepTime:
    """One optimizer. Seconds are medians over rounds, ratios medians of what each round gives."""

    name: str
    interval: int | None
    """Steps from one choice of directions to the next; None: it makes none, or one in every step."""
    first_seconds: float
    ordinary_seconds: float
    refresh_seconds: float
    """More than an ordinary step's."""
    adamw_seconds: dict[str, float]
    """By the names of ``BASELINES``, taken beside this optimizer's steps."""
    ordinary_ratio: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    """The spread of the ratio over the rounds: how far to trust it."""

    @property
    def amortised_ratio(self) -> dict[str, float]:
        """The ratio of a mean step, by the names of ``BASELINES``."""
        share = self.refresh_seconds / self.interval if self.interval else 0.0
        return {key: ratio + share / self.adamw_seconds[key] for key, ratio in self.ordinary_ratio.items()}


def time_steps(
    settings: Mapping[str, Mapping[str, Any]],
    shapes: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    interval: int | None = None,
    rounds: int = 10,
    refreshes: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> list[StepTime]:
    """Time the optimizers of ``settings`` on matrices of the given shapes.

    Args:
        settings: name -> arguments of the optimizer; learning rate and weight decay are the same for all.
        shapes: of the matrices.
        dtype: of weights and gradients.
        device: a CPU or a CUDA device.
        interval: steps between two refreshes to count with; None: each optimizer's own.
        rounds: steps of every optimizer, after the first.
        refreshes: in so many rounds, directions are chosen anew.
        progress: told what is going on.

    Raises:
        ValueError: arguments that do not fit an optimizer or a shape (named).
    """
    if rounds < 1 or not 1 <= refreshes <= rounds:
        raise ValueError(f"rounds={rounds} and refreshes={refreshes}; expected 1 <= refreshes <= rounds")
    device = torch.device(device)
    params = _weights_with_gradients(shapes, dtype, device)
    timers = [_Timer(name, arguments, params, interval) for name, arguments in settings.items()]
    adamw = {key: torch.optim.AdamW(params, **{**_COMMON, **flags}) for key, flags in BASELINES.items()}
    for baseline in adamw.values():
        baseline.step()
    with _no_garbage_collection():
        for timer in timers:
            progress(f"first step of {timer.name}")
            timer.first = timer.seconds()
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            turn = i % len(timers)  # so that none always follows the same other
            for timer in timers[turn:] + timers[:turn]:
                timer.take({key: _seconds(baseline.step, device) for key, baseline in adamw.items()}, i < refreshes)
    return [timer.result() for timer in timers]


def rank_argument(name: str, rank: int | None) -> dict[str, int]:
    """Return ``rank`` as an argument of an optimizer; nothing for one that takes none or has a default rank."""
    parameter = inspect.signature(find(name)).parameters.get("rank")
    return {} if rank is None or parameter is None or parameter.default is not None else {"rank": rank}


def refresh_interval(optimizer: MatrixOptimizer) -> int | None:
    """Return the steps between two choices of a basis, where the user sets them; else None."""
    if "refresh_interval" not in inspect.signature(type(optimizer)).parameters:
        return None
    return int(optimizer.param_groups[0]["refresh_interval"])


class _Timer:
    """One optimizer and what was measured of it."""

    def __init__(self, name: str, arguments: Mapping[str, Any], params: Sequence[Tensor], interval: int | None) -> None:
        groups = [{"params": [(f"matrix {i}", p) for i, p in enumerate(params)], "role": "matrix"}]
        self.name = name
        self.device = params[0].device
        self.optimizer = create(name, groups, **{**_COMMON, **arguments})
        own = refresh_interval(self.optimizer)
        self.interval = own if own is None or interval is None else interval
        self.first = 0.0
        self.ordinary: list[float] = []
        self.refreshes: list[float] = []
        self.adamw: dict[str, list[float]] = {key: [] for key in BASELINES}

    def seconds(self) -> float:
        return _seconds(self.optimizer.step, self.device)

    def take(self, adamw: Mapping[str, float], with_refresh: bool) -> None:
        """One round: an ordinary step beside those of AdamW, and perhaps one that refreshes beside it."""
        self._refresh_every(_NEVER)
        self.ordinary.append(self.seconds())
        for key, seconds in adamw.items():
            self.adamw[key].append(seconds)
        if with_refresh and self.interval is not None:
            self._refresh_every(1)
            self.refreshes.append(self.seconds() - self.ordinary[-1])

    def _refresh_every(self, interval: int) -> None:
        if self.interval is not None:
            for group in self.optimizer.param_groups:
                group["refresh_interval"] = interval

    def result(self) -> StepTime:
        ratios = {key: [o / a for o, a in zip(self.ordinary, self.adamw[key], strict=True)] for key in BASELINES}
        return StepTime(
            name=self.name,
            interval=self.interval,
            first_seconds=self.first,
            ordinary_seconds=statistics.median(self.ordinary),
            refresh_seconds=max(0.0, statistics.median(self.refreshes)) if self.refreshes else 0.0,
            adamw_seconds={key: statistics.median(seconds) for key, seconds in self.adamw.items()},
            ordinary_ratio={key: statistics.median(values) for key, values in ratios.items()},
            quartiles={key: _quartiles(values) for key, values in ratios.items()},
        )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _weights_with_gradients(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.randn(*shape, generator=generator, device=device, dtype=dtype).requires_grad_()
        param.grad = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        params.append(param)
    return params


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Of one step, on the device: CUDA only queues work, so its own clock is read, from idle to done."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1000  # milliseconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Or one optimizer would be charged with collecting what all have left."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
