"""A translator trained in several ways, in both spaces, for equally many steps: full, LoRA, ReLoRA* and SST.

After the tables of translation of Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481), at a width that a CPU
core can train. Every row is trained with the first seed at as many learning rates of the linear maps; the one with the
best BLEU on validation is trained with the other seeds too, and shown. A training that is in the output folder already
is taken from there, so that a benchmark that was stopped goes on, and two processes, one for each space, can share the
work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lowrank_train.bench.finished_record import finished_record
from lowrank_train.bench.optimizer_step import output_folder
from lowrank_train.common.errors import UserError
from lowrank_train.common.record import provenance
from lowrank_train.common.small_files import write_text
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.hyperbolic.translation.config import TranslationConfig, load_translation_config
from lowrank_train.hyperbolic.translation.network import SPACES
from lowrank_train.hyperbolic.translation.record import TranslationRecord
from lowrank_train.hyperbolic.translation.train import train_translation

__all__ = ["TranslationBenchmark", "help_text", "load_benchmark", "measure_translation"]


@dataclass
class TranslationBenchmark:
    """What is trained."""

    folder: str = setting("data/multi30k", "folder of the pairs", path=True)
    recipe: str = setting("configs/hyperbolic/multi30k.yaml", "YAML file of launch/hyperbolic.py", path=True)
    rows: dict[str, list[str]] = setting({}, "name of a row -> its overrides, e.g. [optimizer.name=sst]")
    rates: dict[str, list[float]] = setting({}, "row -> values of optimizer.lr, equally many for every row", above=0)
    geometries: list[str] = setting(["euclidean", "lorentz"], "spaces")
    seeds: list[int] = setting([1234], "of initial weights, order and dropout", at_least=0, at_most=2**32 - 1)
    overrides: list[str] = setting([], "for all trainings, e.g. [steps=100]")
    output: str = setting("runs/translation", "folder of all trainings, of multi30k.json and multi30k.md", path=True)


class _Run(NamedTuple):
    geometry: str
    row: str
    rate: float
    seed: int
    config: TranslationConfig


def load_benchmark(arguments: Sequence[str]) -> TranslationBenchmark:
    """Settings from YAML files and ``key=value`` overrides.

    Raises:
        UserError: unreadable file, unknown key, wrong value; nothing to train; rows with more rates than others.
    """
    settings = load_schema(TranslationBenchmark, arguments)
    for key in ("rows", "geometries", "seeds"):
        if not getattr(settings, key):
            raise UserError(f"{key} is empty; expected at least one, as in configs/benchmark/translation.yaml")
    for geometry in settings.geometries:
        if geometry not in SPACES:
            raise UserError(f"geometries: unknown {geometry!r}; expected {' or '.join(SPACES)}")
    counts = {row: len(settings.rates.get(row, [])) for row in settings.rows}
    if min(counts.values()) < 1 or len(set(counts.values())) > 1:
        got = ", ".join(f"{row} {count}" for row, count in counts.items())
        raise UserError(f"rates: {got}; expected equally many for every row, at least one: otherwise one is tuned more")
    return settings


def help_text() -> str:
    """Every key with its default and meaning."""
    usage = "usage: launch/benchmark.py translation configs/benchmark/translation.yaml [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(TranslationBenchmark)])


def measure_translation(settings: TranslationBenchmark) -> str:
    """Train everything; write multi30k.json and multi30k.md into ``settings.output``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: as ``train_translation``; a training in the folder was made with other settings.
    """
    folder = output_folder(settings.output)
    first, *others = settings.seeds
    tried = [
        _run(settings, geometry, row, rate, first)  # all are read before the first is trained
        for geometry in settings.geometries
        for row in settings.rows
        for rate in settings.rates[row]
    ]
    records = [(run, _record(run)) for run in tried]
    for geometry in settings.geometries:
        for row in settings.rows:
            own = [(run, record) for run, record in records if (run.geometry, run.row) == (geometry, row)]
            best, _ = max(own, key=lambda pair: pair[1].bleu["validation"])
            again = [_run(settings, geometry, row, best.rate, seed) for seed in others]
            records += [(run, _record(run)) for run in again]
    figures = {
        "what": __doc__,
        "provenance": provenance(torch.device("cpu")),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("folder", "output")},
        "data": records[0][1].data,
        "runs": [_kept(run, record) for run, record in records],
    }
    write_text(folder / "multi30k.json", json.dumps(figures, indent=1) + "\n")
    table = _table(settings, records)
    write_text(folder / "multi30k.md", f"# Translation\n\n{table}\n")
    return table


def _record(run: _Run) -> TranslationRecord:
    return finished_record(run.config, TranslationRecord, train=train_translation)


def _run(settings: TranslationBenchmark, geometry: str, row: str, rate: float, seed: int) -> _Run:
    words = [settings.recipe, *settings.overrides, *settings.rows[row], f"optimizer.lr={rate}"]
    words += [f"model.geometry={geometry}", f"data.folder={settings.folder}", f"seed={seed}", "checkpoint_every=0"]
    words.append(f"data.tokenizer_folder={Path(settings.output) / 'tokenizer'}")
    words.append(f"run_dir={Path(settings.output) / f'{geometry}-{row}-{rate:g}-{seed}'}")
    try:
        return _Run(geometry, row, rate, seed, load_translation_config(words))
    except UserError as error:
        raise UserError(f"row {row!r}: {error}") from None


def _kept(run: _Run, record: TranslationRecord) -> dict[str, Any]:
    """For the file: without where things were."""
    figures = asdict(record)
    config, made = figures.pop("config"), figures.pop("provenance")
    figures.pop("data")
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("folder", "tokenizer_folder")}
    rest = {key: value for key, value in config.items() if key not in ("run_dir", "optimizer", "seed", "resume")}
    return {"row": run.row, "rate": run.rate, **figures, "settings": rest, "commit": made["commit"]}


def _table(settings: TranslationBenchmark, records: list[tuple[_Run, TranslationRecord]]) -> str:
    lines = [
        "| space | method | test BLEU | validation BLEU | validation loss | lr | trainable parameters "
        "| of them in layers | farthest off the manifold |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for geometry in settings.geometries:
        for row in settings.rows:
            own = [(run, record) for run, record in records if (run.geometry, run.row) == (geometry, row)]
            by_first = [(run, record) for run, record in own if run.seed == settings.seeds[0]]
            rate = max(by_first, key=lambda pair: pair[1].bleu["validation"])[0].rate
            best = [record for run, record in own if run.rate == rate]
            losses = [record.validation_loss for record in best if record.validation_loss is not None]
            error = max(max(record.manifold_error.values()) for record in best)
            lines.append(
                f"| {geometry} | {row} | {_spread([r.bleu['test'] for r in best])} "
                f"| {_spread([r.bleu['validation'] for r in best])} | {fmean(losses):.3f} | {rate:g} "
                f"| {best[0].trainable_parameters:,} | {best[0].trainable_in_layers:,} | {error:.1e} |"
            )
    return "\n".join(lines)


def _spread(scores: list[float]) -> str:
    """Mean over the seeds, lowest and highest."""
    spread = f" ({min(scores):.2f} to {max(scores):.2f})" if len(scores) > 1 else ""
    return f"{fmean(scores):.2f}{spread}"
