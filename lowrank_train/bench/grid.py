"""A grid: rows x learning rates x seeds of trainings, what is missing of it trained, and the best rate of each row.

A run is what a table needs to know of one training: its keys (row, rate, seed) and its figures, as they are in the
benchmark's JSON file. Tables and plots are made of runs alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Generic, NamedTuple, TypeVar

from lowrank_train.bench.report import Panel, markdown
from lowrank_train.bench.trainings import Configured, Outcome, Trainer
from lowrank_train.common.errors import UserError

__all__ = [
    "Grid",
    "Group",
    "Result",
    "Row",
    "Run",
    "failures",
    "groups",
    "positive",
    "sweep_arguments",
    "sweep_panel",
    "table",
]

Run = Mapping[str, Any]
Score = Callable[[Run], float | None]
C = TypeVar("C", bound=Configured)


class Row(NamedTuple):
    """Trainings of one row of a table, or of one cell of it."""

    keys: Mapping[str, Any]
    """What names them: {"method": "sst"}."""
    rates: Sequence[float] = ()
    """Learning rates to try; none where the configuration has its own."""
    seeds: Sequence[int] = ()
    """Every rate is trained with each; none where nothing is drawn."""
    more_seeds: Sequence[int] = ()
    """The best rate alone is trained with these."""


@dataclass(frozen=True)
class Result(Generic[C]):
    """One training of a grid: keys of its row, rate and seed, its configuration, and how it ended."""

    keys: dict[str, Any]
    config: C
    outcome: Outcome = Outcome("failed")

    def run(self, figures: Callable[[Run], Run] = lambda record: record) -> dict[str, Any]:
        """Return keys and figures, the latter chosen from the record; without a record, why there is none."""
        if self.outcome.record is None:
            return {**self.keys, "status": self.outcome.status, "message": self.outcome.message}
        return {**self.keys, **figures(self.outcome.record), **self.keys}


@dataclass(frozen=True)
class Grid(Generic[C]):
    """What is trained.

    Args:
        rows: in the order of the table.
        config: the configuration of a training, from the keys of its row, its rate and its seed.
        trainer: does the trainings.
        score: of a record, as ``Group``'s; rows with ``more_seeds`` need it.
        rate_key: as ``Group``'s.
    """

    rows: Sequence[Row]
    config: Callable[..., C]
    trainer: Trainer[C]
    score: Score = lambda record: None
    rate_key: str = "lr"

    def trials(self) -> list[Result[C]]:
        """Return all trainings that are certain, none of them done. Raises UserError as ``config``."""
        return [
            self._trial(row, lr, seed)
            for row in self.rows
            for lr in row.rates or (None,)
            for seed in row.seeds or (None,)
        ]

    def train(self) -> list[Result[C]]:
        """Train what is missing, once every configuration is made and held against earlier ones.

        Raises UserError as ``config`` and ``Trainer.train_each``.
        """
        results = self._trained(self.trials())
        again = []
        for row in self.rows:
            runs = [result.run() for result in results if row.keys.items() <= result.keys.items()]
            best = Group((), runs, self.score, self.rate_key).rate if row.more_seeds else None
            again += [self._trial(row, best, seed) for seed in row.more_seeds if best is not None]
        return results + self._trained(again)

    def _trained(self, trials: Sequence[Result[C]]) -> list[Result[C]]:
        outcomes = self.trainer.train_each([trial.config for trial in trials])
        return [Result(trial.keys, trial.config, outcome) for trial, outcome in zip(trials, outcomes, strict=True)]

    def _trial(self, row: Row, lr: float | None, seed: int | None) -> Result[C]:
        keys = {**row.keys, self.rate_key: lr, "seed": seed}
        given = {key: value for key, value in keys.items() if value is not None}
        return Result(given, self.config(**given))


class Group:
    """Runs that a table shows in one row: every rate with every seed.

    Args:
        names: values of the keys that name the row.
        runs: at least one.
        score: of a finished run, the higher the better; None if it has none.
        rate_key: key of the learning rate; runs without it are all of one rate.

    Attributes:
        rates: ascending.
        scores: mean score at each rate, of the seeds that all rates have; None where one of them has no score.
        index: of the rate with the highest, the lowest rate of several; None if no rate has a score.
        rate: that rate.
        best: the runs at that rate.
        status: finished, or what became of every rate: diverged or failed.
    """

    def __init__(self, names: Sequence[Any], runs: Sequence[Run], score: Score, rate_key: str = "lr") -> None:
        self.names, self.runs, self.label = names, runs, " ".join(map(str, names))
        self.rates: list[Any] = sorted({run.get(rate_key) for run in runs})
        by_rate = [[run for run in runs if run.get(rate_key) == lr] for lr in self.rates]
        seeds = set.intersection(*({run.get("seed") for run in some} for some in by_rate))
        self.scores = [_mean([_score(run, score) for run in some if run.get("seed") in seeds]) for some in by_rate]
        known = [(score, -index) for index, score in enumerate(self.scores) if score is not None]
        self.index = -max(known)[1] if known else None
        self.rate: Any = None if self.index is None else self.rates[self.index]
        self.best: list[Run] = [] if self.index is None else by_rate[self.index]
        failed = any(run.get("status") == "failed" for run in runs)
        self.status = "finished" if known else "failed" if failed else "diverged"

    def values(self, *path: str) -> list[Any]:
        """Return one figure of every finished run at the best rate, found by its keys; NaN for what JSON lacks."""
        found = [_at(run, path) for run in self.best if _finished(run)]
        return [math.nan if value is None else value for value in found]

    def mean(self, *path: str) -> float:
        """Return the mean of that figure."""
        return fmean(self.values(*path))


def groups(runs: Iterable[Run], *keys: str, score: Score, rate_key: str = "lr") -> list[Group]:
    """Return groups of the runs that agree in some keys, in the order in which they come first."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.get(key) for key in keys), []).append(run)
    return [Group(names, own, score, rate_key) for names, own in found.items()]


def table(head: Sequence[str], rows: Iterable[Group], cells: Callable[[Group], Sequence[str]]) -> str:
    """Return a table in Markdown: names and cells of each group; of one without a result, what became of it."""
    return markdown(head, [[*row.names, *(cells(row) if row.best else [row.status])] for row in rows])


def failures(runs: Iterable[Run]) -> list[str]:
    """Return a note on the runs that did not finish; nothing if all did."""
    lines = [
        f"- {', '.join(f'{key} {run[key]}' for key in run if key not in ('status', 'message', 'run_dir'))}: "
        f"{run['status']}, {run['message']}"
        for run in runs
        if not _finished(run)
    ]
    return ["\n".join(["No result, because a training diverged or failed:", "", *lines])] if lines else []


def sweep_panel(
    y: str, tried: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], log_y: bool = False
) -> Panel:
    """Return a panel of what each row, by its label, has at each of its learning rates; None where it has nothing."""
    lines, missing = {}, {}
    for label, (rates, values) in tried.items():
        found = [(lr, value) for lr, value in zip(rates, values, strict=True) if value is not None]
        lines[label] = [lr for lr, _ in found], [value for _, value in found]
        missing[label] = [lr for lr, value in zip(rates, values, strict=True) if value is None]
    return Panel("learning rates tried (x: no result)", "learning rate", y, lines, missing, log_x=True, log_y=log_y)


def sweep_arguments(
    arguments: Sequence[str], name: str, about: str | None, counts: Mapping[str, tuple[int, str]], rates: list[float]
) -> argparse.Namespace:
    """Read the command line of a benchmark that has no configuration file.

    Args:
        arguments: as typed.
        name: of the benchmark.
        about: its docstring.
        counts: name of an option, which takes a whole number >= 1, -> its default and meaning.
        rates: default of ``--lr``.

    Raises:
        UserError: a number out of range.
    """
    parser = argparse.ArgumentParser(prog=f"launch/benchmark.py {name}", description=(about or "").splitlines()[0])
    for key, (default, meaning) in counts.items():
        parser.add_argument(f"--{key}", type=int, default=default, help=meaning)
    shown = " ".join(f"{lr:g}" for lr in rates)
    parser.add_argument("--lr", type=float, nargs="+", default=rates, help=f"default: {shown}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", default=f"runs/{name}", help=f"folder of {name}.json and {name}.md")
    given = parser.parse_args(arguments)
    for key in counts:
        positive(f"--{key}", getattr(given, key))
    if not all(0 < lr < math.inf for lr in given.lr):
        raise UserError(f"--lr {' '.join(map(str, given.lr))}; expected numbers > 0")
    return given


def positive(key: str, value: int) -> int:
    """Return the value. Raises UserError, naming the key, if it is below 1."""
    if value < 1:
        raise UserError(f"{key} {value}; expected a whole number >= 1")
    return value


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return fmean(known) if known and len(known) == len(scores) else None


def _score(run: Run, score: Score) -> float | None:
    value = score(run) if _finished(run) else None
    return value if value is not None and math.isfinite(value) else None


def _finished(run: Run) -> bool:
    return run.get("status", "finished") == "finished"


def _at(run: Any, path: Sequence[str]) -> Any:
    for key in path:
        run = run[key]
    return run
