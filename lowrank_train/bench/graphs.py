"""Graph tasks trained in several ways by both protocols, one table each: full, LoRA, ReLoRA* and SST, and the twins.

After table 4 of Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481), whose figures are shown beside ours. A
training that is in the output folder already is taken from there, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_train.bench.grid import Grid, Group, Row, Run, failures, groups
from lowrank_train.bench.report import Panel, Report, markdown, origin, output_folder, publish, spread
from lowrank_train.bench.trainings import Trainer, required
from lowrank_train.common.errors import UserError
from lowrank_train.common.record import provenance
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.data import load_graph
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.report import SCORE_NAMES
from lowrank_train.hyperbolic.graphs.splits import PROTOCOLS
from lowrank_train.hyperbolic.graphs.train import train_graph
from lowrank_train.hyperbolic.recipes import load_recipe

__all__ = ["PUBLISHED", "GraphBenchmark", "help_text", "load", "measure", "report"]

PUBLISHED: dict[str, dict[str, float]] = {
    "airport_lp": {"full": 95.77, "lora": 94.75, "sst": 95.59},
    "cora_lp": {"full": 94.62, "lora": 88.8, "sst": 91.89},
    "disease_lp": {"full": 91.49, "lora": 91.38, "sst": 94.83},
    "airport_nc": {"full": 92.88, "lora": 89.06, "sst": 87.92},
    "cora_nc": {"full": 81.13, "lora": 64.73, "sst": 77.5},
}
"""Recipe -> row -> per cent, of 3 seeds, rank 2, inherited protocol: Zhao et al., tables of HyboNet at width 16. Their
"test precision" of link prediction is taken to be average precision, the score of ours that is nearest."""


@dataclass
class GraphBenchmark:
    """What is trained."""

    folder: str = setting("data/graphs", "folder of the .npz files of graphs", path=True)
    recipes: dict[str, str] = setting(
        {}, "name of a column -> its recipe, a YAML file of launch/hyperbolic.py", path=True
    )
    rows: dict[str, list[str]] = setting(
        {}, "name of a row -> its overrides, e.g. [optimizer.name=sst, optimizer.rank=2]"
    )
    seeds: dict[str, list[int]] = setting(
        {},
        "protocol of the splits -> seeds of initial weights, dropout and negatives; the splits stay the same",
        at_least=0,
        at_most=2**32 - 1,
    )
    overrides: list[str] = setting([], "for all trainings, e.g. [epochs=100]")
    output: str = setting(
        "runs/hyperbolic", "folder of all trainings, and of hyperbolic.json and hyperbolic.md", path=True
    )


def load(arguments: Sequence[str]) -> GraphBenchmark:
    """Load settings from YAML files and ``key=value`` overrides.

    Raises:
        UserError: unreadable file, unknown key, wrong value; nothing to train.
    """
    settings = load_schema(GraphBenchmark, arguments)
    for key in ("recipes", "rows", "seeds"):
        if not getattr(settings, key):
            raise UserError(f"{key} is empty; expected at least one, as in configs/benchmark/hyperbolic.yaml")
    for protocol, seeds in settings.seeds.items():
        if protocol not in PROTOCOLS:
            raise UserError(f"seeds: unknown protocol {protocol!r}; expected {' or '.join(PROTOCOLS)}")
        if not seeds:
            raise UserError(f"seeds.{protocol} is empty; expected at least one number, or leave the protocol out")
    return settings


def help_text() -> str:
    """Return every key with its default and meaning."""
    usage = "usage: launch/benchmark.py hyperbolic configs/benchmark/hyperbolic.yaml [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(GraphBenchmark)])


def measure(settings: GraphBenchmark) -> str:
    """Train everything; write hyperbolic.json, .md and .png into ``settings.output``.

    Returns:
        The tables, in Markdown.

    Raises:
        UserError: as ``train_graph``; a training in the folder was made with other settings, or was stopped.
    """
    folder = output_folder(settings.output, "output")
    grid = Grid(
        rows=[
            Row({"protocol": protocol, "recipe": recipe, "row": row}, seeds=seeds)
            for protocol, seeds in settings.seeds.items()
            for recipe in settings.recipes
            for row in settings.rows
        ],
        config=lambda **keys: _config(settings, **keys),
        trainer=Trainer(train_graph, needs=required(GraphRecord)),
    )
    results = grid.train()
    figures = {
        "what": __doc__,
        "provenance": provenance(torch.device("cpu")),
        "settings": asdict(settings),
        "published": PUBLISHED,
        "runs": [result.run(_kept) for result in results],
    }
    return publish(folder, "hyperbolic", figures, report(figures))


def report(figures: Mapping[str, Any]) -> Report:
    """Return what hyperbolic.md shows, from the figures of hyperbolic.json: a table for each protocol."""
    recipes, published, parts, panels = list(figures["settings"]["recipes"]), figures["published"], [], []
    for protocol in figures["settings"]["seeds"]:
        runs = [run for run in figures["runs"] if run["protocol"] == protocol]
        cells = {cell.names: cell for cell in groups(runs, "row", "recipe", score=_score)}
        rows = list(dict.fromkeys(row for row, _ in cells))
        lines = [[row, *(_cell(cells[row, recipe]) for recipe in recipes)] for row in rows]
        parts += [f"**{protocol} protocol**", markdown(["method", *(_head(runs, recipe) for recipe in recipes)], lines)]
        known = [recipe for recipe in recipes if recipe in published and protocol == "inherited"]
        lines = [[row, *(f"{published[recipe][row]:.2f}" for recipe in known)] for row in ("full", "lora", "sst")]
        parts += [markdown(["published, rank 2", *known], lines)] * bool(known)
        means = {row: [(r, cell.scores[0]) for r in recipes if (cell := cells[row, r]).best] for row in rows}
        points = {row: ([recipe for recipe, _ in found], [mean for _, mean in found]) for row, found in means.items()}
        panels.append(Panel(f"{protocol} protocol", "", "score on the test part, %", points, linewidth=0))
    notes = [*failures(figures["runs"]), origin(figures["provenance"])]
    return Report("Graphs", "\n\n".join(parts), notes, panels)


def _score(run: Run) -> float:
    """Per cent."""
    return 100 * run["test"][run["headline"]]


def _head(runs: Sequence[Run], recipe: str) -> str:
    names = [SCORE_NAMES[run["headline"]] for run in runs if run["recipe"] == recipe and "headline" in run]
    return ", ".join([recipe, *names[:1]])


def _cell(cell: Group) -> str:
    """Mean over the seeds, lowest and highest, and trainable parameters."""
    if not cell.best:
        return cell.status
    return f"{spread([_score(run) for run in cell.best])}, {cell.values('trainable_parameters')[0]:,}"


def _config(settings: GraphBenchmark, protocol: str, recipe: str, row: str, seed: int) -> GraphConfig:
    words = [settings.recipes[recipe], *settings.overrides, *settings.rows[row]]
    words += [f"data.folder={settings.folder}", f"data.protocol={protocol}", f"seed={seed}", "checkpoint_every=0"]
    words.append(f"run_dir={Path(settings.output) / f'{recipe}-{row}-{protocol}-{seed}'}")
    try:
        config = load_recipe(GraphConfig, words)
    except UserError as error:
        raise UserError(f"recipe {recipe!r}, row {row!r}: {error}") from None
    return _for_all_protocols(config, next(iter(settings.seeds)))


def _for_all_protocols(config: GraphConfig, first: str) -> GraphConfig:
    """Return the configuration; of a graph that comes with a split with the first protocol, as all of them use it."""
    data: Any = config.data
    own_split = data.task == "node_classification" and load_graph(data.folder, data.graph).split is not None
    if own_split and data.protocol != first:
        config.run_dir = str(config.run_dir).replace(f"-{data.protocol}-", f"-{first}-")
        data.protocol = first
    return config


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """All but what the settings say already, and where things were."""
    config = record["config"]
    return {
        **{key: value for key, value in record.items() if key not in ("config", "provenance")},
        "epochs_at_most": config["epochs"],
        **{key: config[key] for key in ("margin", "clip", "patience", "min_epochs", "model")},
        "commit": record["provenance"]["commit"],
    }
