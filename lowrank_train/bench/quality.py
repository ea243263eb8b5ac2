"""The quality benchmark: the same model on the same tokens with each optimizer, learning rates swept alike for all."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lowrank_train.bench.grid import Grid, Row
from lowrank_train.bench.quality_report import KEPT, quality_figures, report
from lowrank_train.bench.report import publish, rate
from lowrank_train.bench.trainings import Trainer, check_same
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.loading import load_schema
from lowrank_train.config.run_config import complete
from lowrank_train.config.schema import Config
from lowrank_train.config.settings import key_help, setting
from lowrank_train.memory.check import check_size
from lowrank_train.plan import Plan
from lowrank_train.train.loop import train

__all__ = ["QualityConfig", "help_text", "load", "measure", "plan", "report"]

NEEDED = (*KEPT, "steps", "tokens", "initial_perplexity", "data.sha1", "provenance.commit")
NO_MORE_USE = ("checkpoints", "huggingface", "report.md")
"""What a finished run leaves that takes space, and the report that points to it."""

_SET_BY_THE_BENCHMARK = {
    "run_dir": "output",
    "seed": "seeds",
    "optimizer.name": "optimizers.LABEL.name",
    "optimizer.lr": "optimizers.LABEL.lr",
    "optimizer.other_lr": "other_lr",
}
"""Keys of ``base`` that would be overwritten, and the key to use instead."""

_CHOICES = ("train", "precision", "weights")
"""Keys of a configuration, of a few values each, that a row may have its own of."""


@dataclass
class QualityConfig:
    """What is compared, and how."""

    base: Config = field(default_factory=Config)
    optimizers: dict[str, Any] = setting(
        {},
        "label -> name of an optimizer, lr: the rates to try (as many for every label), any other arguments of it, "
        "and perhaps model, train, precision or weights, instead of those of base; null leaves a label out",
    )
    other_lr: float | None = setting(
        None, "learning rate of all but the matrices (embeddings, head, norms), in all rows; null: as lr"
    )
    seeds: list[int] = setting(
        [0],
        "every rate is trained once with each: initial weights and order of the data",
        at_least=0,
        at_most=2**32 - 1,
    )
    output: str = setting("runs/quality", "folder of the trainings, their tokens and the results", path=True)
    jobs: int = setting(1, "trainings at one time, each on one thread", at_least=1, at_most=1000)


def load(arguments: Sequence[str]) -> QualityConfig:
    """Read the benchmark's YAML files and ``key=value`` overrides. Raises UserError for anything that does not fit."""
    quality = load_schema(QualityConfig, arguments)
    quality.optimizers = {label: row for label, row in quality.optimizers.items() if row is not None}
    _check(quality)
    return quality


def help_text() -> str:
    """Return every key with its default and meaning."""
    return "\n".join(
        ["usage: launch/benchmark.py quality [FILE.yaml ...] [key=value ...]", "", *key_help(QualityConfig)]
    )


def measure(quality: QualityConfig) -> str:
    """Train what is not trained yet and write quality.json, quality.md and quality.png into ``quality.output``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: a setting that does not fit (before any training), another benchmark in the same folder, or no
            training that finished.
    """
    grid = plan(quality)
    results = grid.train()
    if not any(result.outcome.record for result in results):
        raise UserError(f"no training finished; the first: {results[0].outcome.message}")
    check_same((result.outcome for result in results), "text", lambda record: record["data"]["sha1"])
    figures = quality_figures(results)
    return publish(Path(quality.output), "quality", figures, report(figures))


def plan(quality: QualityConfig) -> Grid[Config]:
    """Return all trainings, checked.

    Raises UserError, naming the label, for what can be known wrong before any of them.
    """
    rows = [Row({"label": label}, row["lr"], quality.seeds) for label, row in quality.optimizers.items()]
    trainer = Trainer(train, NEEDED, quality.jobs, NO_MORE_USE)
    grid = Grid(rows, lambda label, lr, seed: _run_config(quality, label, float(lr), seed), trainer)
    checked = {trial.keys["label"]: trial for trial in reversed(grid.trials())}
    for label, trial in reversed(checked.items()):
        try:
            check_size(trial.config, world_size=1)
            Plan.of(trial.config)
        except UserError as error:
            raise UserError(f"optimizers.{label}: {error}") from None
    return grid


def _run_config(quality: QualityConfig, label: str, lr: float, seed: int) -> Config:
    config = copy.deepcopy(quality.base)
    output = Path(quality.output)
    row = dict(quality.optimizers[label])
    for key in _CHOICES:
        setattr(config, key, row.pop(key, getattr(config, key)))
    config.model.name = row.pop("model", config.model.name)
    optimizer = {**config.optimizer, **row, "lr": lr}
    if quality.other_lr is not None:
        optimizer["other_lr"] = quality.other_lr
    config.data.folder = config.data.folder or str(output / "data")
    run_dir = str(output / label / f"lr={rate(lr)}-seed={seed}")
    try:
        return complete(replace(config, optimizer=optimizer, seed=seed, run_dir=run_dir))
    except UserError as error:
        raise UserError(f"optimizers.{label}: {error}") from None


def _check(quality: QualityConfig) -> None:
    for key, instead in _SET_BY_THE_BENCHMARK.items():
        if _value(quality.base, key) != _value(Config(), key):
            raise UserError(f"base.{key} is set by the benchmark; use {instead}")
    if not quality.optimizers:
        raise UserError("there are no optimizers to compare; expected e.g. optimizers.adamw.name=adamw and .lr=[1e-3]")
    for label, row in quality.optimizers.items():
        _check_row(label, row)
    counts = {label: len(row["lr"]) for label, row in quality.optimizers.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise UserError(f"learning rates must be swept equally for all; got rates per optimizer: {got}")
    if not quality.seeds or len(set(quality.seeds)) < len(quality.seeds):
        raise UserError(f"seeds={quality.seeds}; expected at least one, each once")


def _check_row(label: str, row: Any) -> None:
    where = f"optimizers.{label}"
    if not re.fullmatch(r"[\w+.-]*\w[\w+.-]*", label):
        raise UserError(f"{where}: the label names a folder; expected letters, digits and _ + . -")
    if not isinstance(row, dict) or "name" not in row or "lr" not in row:
        raise UserError(f"{where}={row}; expected the keys name (one of {', '.join(methods.names())}) and lr")
    if "other_lr" in row:
        raise UserError(f"{where}.other_lr: it is the same for all rows; give other_lr at the top")
    for key in _CHOICES:
        choices = get_args(get_type_hints(Config)[key])
        if key in row and row[key] not in choices:
            raise UserError(f"{where}.{key}={row[key]}; expected one of {', '.join(choices)}")
    if not isinstance(row.get("model", ""), str):
        raise UserError(f"{where}.model={row['model']}; expected the name of a size, or a folder")
    lrs = row["lr"]
    numbers = isinstance(lrs, list) and all(isinstance(lr, int | float) and not isinstance(lr, bool) for lr in lrs)
    if not numbers or not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise UserError(f"{where}.lr={lrs}; expected a list of numbers > 0, e.g. [5e-4,1e-3,2e-3]")
    if len({rate(lr) for lr in lrs}) < len(lrs):
        raise UserError(f"{where}.lr={lrs}; expected each rate once")


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node
