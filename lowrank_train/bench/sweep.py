"""A sweep of learning rates: what was tried for each optimizer, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lowrank_train.bench.trainings import Outcome
from lowrank_train.common.record import perplexity
from lowrank_train.config.schema import Config

__all__ = ["Row", "Trial", "compare", "rate", "summarize"]


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    label: str
    """Of the optimizer with its settings: the row it belongs to."""
    lr: float
    seed: int
    config: Config


@dataclass
class Row:
    """One optimizer. Figures at its best learning rate; speed over all its finished trainings."""

    label: str
    optimizer: dict[str, Any]
    """Name and arguments, the learning rate aside."""
    lrs: list[float]
    """Tried, ascending."""
    losses: list[float | None]
    """Validation loss at each rate, mean over the seeds; None where one of them did not finish."""
    status: str
    """finished, or what became of every rate: diverged or failed."""
    best: int | None
    """Index of the best rate."""
    seeds: int
    lowest_perplexity: float | None
    """Of the seeds, at the best rate."""
    highest_perplexity: float | None
    versus_baseline_percent: float | None
    state_bytes: int | None
    matrix_state_bytes: int
    matrix_parameters: int
    tokens_per_second: float | None
    """Median."""
    seconds: float | None
    """Of the steps of one training; median."""
    optimizer_share: float | None
    """Of the time of a step; median."""

    @property
    def best_lr(self) -> float | None:
        """The learning rate with the lowest validation loss."""
        return None if self.best is None else self.lrs[self.best]

    @property
    def is_on_edge(self) -> bool:
        """Whether the best rate is the lowest or highest tried: a better one may lie beyond."""
        return self.best in (0, len(self.lrs) - 1)

    @property
    def perplexity(self) -> float | None:
        """At the best rate: exp of the mean loss."""
        loss = None if self.best is None else self.losses[self.best]
        return None if loss is None else perplexity(loss)


def summarize(runs: Sequence[tuple[Trial, Outcome]], matrix_state_bytes: int, matrix_parameters: int) -> Row:
    """The row of one optimizer.

    Args:
        runs: all of this optimizer's: every rate with every seed.
        matrix_state_bytes: optimizer state of the matrices alone.
        matrix_parameters: elements of the matrices.
    """
    one = runs[0][0]
    lrs = sorted({trial.lr for trial, _ in runs})
    by_lr = {lr: [outcome for trial, outcome in runs if trial.lr == lr] for lr in lrs}
    losses = {lr: [_loss(outcome) for outcome in by_lr[lr]] for lr in lrs}
    means = [None if None in losses[lr] else fmean(loss for loss in losses[lr] if loss is not None) for lr in lrs]
    tried = [(loss, index) for index, loss in enumerate(means) if loss is not None]
    best = min(tried)[1] if tried else None
    at_best = [perplexity(loss) for loss in losses[lrs[best]] if loss is not None] if best is not None else []
    records = [outcome.record for _, outcome in runs if outcome.record is not None]
    failed = any(outcome.status == "failed" for _, outcome in runs)
    return Row(
        label=one.label,
        optimizer={key: value for key, value in one.config.optimizer.items() if key != "lr"},
        lrs=lrs,
        losses=means,
        status="finished" if best is not None else "failed" if failed else "diverged",
        best=best,
        seeds=len({trial.seed for trial, _ in runs}),
        lowest_perplexity=min(at_best, default=None),
        highest_perplexity=max(at_best, default=None),
        versus_baseline_percent=None,
        state_bytes=records[0]["optimizer_state_bytes"] if records else None,
        matrix_state_bytes=matrix_state_bytes,
        matrix_parameters=matrix_parameters,
        tokens_per_second=median(r["tokens_per_second"] for r in records) if records else None,
        seconds=median(r["seconds"] for r in records) if records else None,
        optimizer_share=median(r["optimizer_seconds"] / r["seconds"] for r in records) if records else None,
    )


def compare(rows: Sequence[Row], baseline: str) -> list[Row]:
    """The rows, best first, each compared with the first row of the optimizer named ``baseline``, if there is one."""
    reference = next((row.perplexity for row in rows if row.optimizer["name"] == baseline), None)
    for row in rows:
        if reference is not None and row.perplexity is not None:
            row.versus_baseline_percent = 100 * (row.perplexity / reference - 1)
    return sorted(rows, key=lambda row: math.inf if row.perplexity is None else row.perplexity)


def rate(lr: float) -> str:
    """A learning rate in few characters: 2.5e-4."""
    mantissa, exponent = f"{lr:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _loss(outcome: Outcome) -> float | None:
    loss = None if outcome.record is None else outcome.record["validation_loss"]
    return loss if loss is not None and math.isfinite(loss) else None
