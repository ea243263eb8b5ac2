"""A translator trained in several ways, in both spaces, for equally many steps: full, LoRA, ReLoRA* and SST.

After the tables of translation of Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481), at a width that a CPU
core can train. Every row is trained with the first seed at as many learning rates of the linear maps; the one with the
best BLEU on validation is trained with the other seeds too, and shown. A training that is in the output folder already
is taken from there, so that a benchmark that was stopped goes on, and two processes, one for each space, can share the
work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_train.bench.grid import Grid, Group, Row, Run, failures, groups, sweep_panel, table
from lowrank_train.bench.report import Report, origin, output_folder, publish, spread
from lowrank_train.bench.trainings import Trainer, check_same, required
from lowrank_train.common.errors import UserError
from lowrank_train.common.record import provenance
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.spaces import SPACES
from lowrank_train.hyperbolic.translation.config import TranslationConfig
from lowrank_train.hyperbolic.translation.record import TranslationRecord
from lowrank_train.hyperbolic.translation.train import train_translation

__all__ = ["TranslationBenchmark", "help_text", "load", "measure", "report"]


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


def load(arguments: Sequence[str]) -> TranslationBenchmark:
    """Load settings from YAML files and ``key=value`` overrides.

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
    """Return every key with its default and meaning."""
    usage = "usage: launch/benchmark.py translation configs/benchmark/translation.yaml [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(TranslationBenchmark)])


def measure(settings: TranslationBenchmark) -> str:
    """Train everything; write multi30k.json, .md and .png into ``settings.output``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: as ``train_translation``; a training in the folder was made with other settings, or was stopped.
    """
    folder = output_folder(settings.output, "output")
    first, *others = settings.seeds
    grid = Grid(
        rows=[
            Row({"geometry": geometry, "row": row}, settings.rates[row], [first], others)
            for geometry in settings.geometries
            for row in settings.rows
        ],
        config=lambda **keys: _config(settings, **keys),
        trainer=Trainer(train_translation, needs=required(TranslationRecord)),
        score=_score,
        rate_key="rate",
    )
    results = grid.train()
    check_same((result.outcome for result in results), "text", lambda record: record["data"]["sha1"])
    figures = {
        "what": __doc__,
        "provenance": provenance(torch.device("cpu")),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("folder", "output")},
        "data": next((result.outcome.record["data"] for result in results if result.outcome.record), None),
        "runs": [result.run(_kept) for result in results],
    }
    return publish(folder, "multi30k", figures, report(figures))


def report(figures: Mapping[str, Any]) -> Report:
    """Return what multi30k.md shows, from the figures of multi30k.json."""
    rows = groups(figures["runs"], "geometry", "row", score=_score, rate_key="rate")
    head = ["space", "method", "test BLEU", "validation BLEU", "validation loss", "lr", "trainable parameters"]
    head += ["of them in layers", "farthest off the manifold"]

    def cells(row: Group) -> list[str]:
        scores = [spread(row.values("bleu", part)) for part in ("test", "validation")]
        sizes = [f"{row.values(key)[0]:,}" for key in ("trainable_parameters", "trainable_in_layers")]
        error = max(max(errors.values()) for errors in row.values("manifold_error"))
        return [*scores, f"{row.mean('validation_loss'):.3f}", f"{row.rate:g}", *sizes, f"{error:.1e}"]

    notes = [*failures(figures["runs"]), origin(figures["provenance"])]
    panel = sweep_panel("validation BLEU", {row.label: (row.rates, row.scores) for row in rows})
    return Report("Translation", table(head, rows, cells), notes, [panel])


def _score(run: Run) -> float:
    return run["bleu"]["validation"]


def _config(settings: TranslationBenchmark, geometry: str, row: str, rate: float, seed: int) -> TranslationConfig:
    words = [settings.recipe, *settings.overrides, *settings.rows[row], f"optimizer.lr={rate}"]
    words += [f"model.geometry={geometry}", f"data.folder={settings.folder}", f"seed={seed}", "checkpoint_every=0"]
    words.append(f"data.tokenizer_folder={Path(settings.output) / 'tokenizer'}")
    words.append(f"run_dir={Path(settings.output) / f'{geometry}-{row}-{rate:g}-{seed}'}")
    try:
        return load_recipe(TranslationConfig, words)
    except UserError as error:
        raise UserError(f"row {row!r}: {error}") from None


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """All but what other keys say already, and where things were."""
    config = {**record["config"]}
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("folder", "tokenizer_folder")}
    return {
        **{key: value for key, value in record.items() if key not in ("config", "provenance", "data")},
        "settings": {k: v for k, v in config.items() if k not in ("run_dir", "optimizer", "seed", "resume")},
        "commit": record["provenance"]["commit"],
    }
