"""Graph tasks trained in several ways by both protocols, one table each: full, LoRA, ReLoRA* and SST, and the twins.

After table 4 of Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481), whose figures are shown beside ours. A
training that is in the output folder already is taken from there, so that a benchmark that was stopped goes on.
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
from lowrank_train.hyperbolic.graphs.config import GraphConfig, load_graph_config
from lowrank_train.hyperbolic.graphs.data import load_graph
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.report import SCORE_NAMES
from lowrank_train.hyperbolic.graphs.splits import PROTOCOLS
from lowrank_train.hyperbolic.graphs.train import train_graph

__all__ = ["PUBLISHED", "GraphBenchmark", "help_text", "load_benchmark", "measure_graphs"]

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


class _Run(NamedTuple):
    protocol: str
    recipe: str
    row: str
    seed: int
    config: GraphConfig


def load_benchmark(arguments: Sequence[str]) -> GraphBenchmark:
    """Settings from YAML files and ``key=value`` overrides.

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
    """Every key with its default and meaning."""
    usage = "usage: launch/benchmark.py hyperbolic configs/benchmark/hyperbolic.yaml [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(GraphBenchmark)])


def measure_graphs(settings: GraphBenchmark) -> str:
    """Train everything; write hyperbolic.json and hyperbolic.md into ``settings.output``.

    Returns:
        The tables, in Markdown.

    Raises:
        UserError: as ``train_graph``; a training in the folder was made with other settings.
    """
    folder = output_folder(settings.output)
    runs = [
        _Run(protocol, recipe, row, seed, _for_all_protocols(_config(settings, protocol, recipe, row, seed), settings))
        for protocol, seeds in settings.seeds.items()  # all are read before the first is trained
        for recipe in settings.recipes
        for row in settings.rows
        for seed in seeds
    ]
    records = [(run, finished_record(run.config, GraphRecord, train=train_graph)) for run in runs]
    figures = {
        "what": __doc__,
        "provenance": provenance(torch.device("cpu")),
        "settings": asdict(settings),
        "published": PUBLISHED,
        "runs": [_kept(run, record) for run, record in records],
    }
    write_text(folder / "hyperbolic.json", json.dumps(figures, indent=1) + "\n")
    tables = _tables(settings, records)
    write_text(folder / "hyperbolic.md", f"# Graphs\n\n{tables}\n")
    return tables


def _config(settings: GraphBenchmark, protocol: str, recipe: str, row: str, seed: int) -> GraphConfig:
    words = [settings.recipes[recipe], *settings.overrides, *settings.rows[row]]
    words += [f"data.folder={settings.folder}", f"data.protocol={protocol}", f"seed={seed}", "checkpoint_every=0"]
    words.append(f"run_dir={Path(settings.output) / f'{recipe}-{row}-{protocol}-{seed}'}")
    try:
        return load_graph_config(words)
    except UserError as error:
        raise UserError(f"recipe {recipe!r}, row {row!r}: {error}") from None


def _for_all_protocols(config: GraphConfig, settings: GraphBenchmark) -> GraphConfig:
    """Where the graph has a split of its own, which all protocols use: the training of the first of them, for all."""
    data: Any = config.data
    first = next(iter(settings.seeds))
    own_split = data.task == "node_classification" and load_graph(data.folder, data.graph).split is not None
    if own_split and data.protocol != first:
        config.run_dir = str(config.run_dir).replace(f"-{data.protocol}-", f"-{first}-")
        data.protocol = first
    return config


def _kept(run: _Run, record: GraphRecord) -> dict[str, Any]:
    """For the file: all but what its settings say already, and where things were."""
    figures = asdict(record)
    config = figures.pop("config")
    made = figures.pop("provenance")
    kept = {key: config[key] for key in ("margin", "clip", "epochs", "patience", "min_epochs")}
    return {
        "recipe": run.recipe,
        "row": run.row,
        **figures,
        "protocol": run.protocol,
        "epochs_at_most": kept.pop("epochs"),
        **kept,
        "model": config["model"],
        "commit": made["commit"],
    }


def _tables(settings: GraphBenchmark, records: list[tuple[_Run, GraphRecord]]) -> str:
    parts = []
    for protocol in settings.seeds:
        own = [(run, record) for run, record in records if run.protocol == protocol]
        parts += [f"**{protocol} protocol**", "", *_table(settings, own), ""]
        if protocol == "inherited":
            parts += [*_published_table(settings), ""]
    return "\n".join(parts).rstrip()


def _table(settings: GraphBenchmark, records: list[tuple[_Run, GraphRecord]]) -> list[str]:
    heads = []
    for recipe in settings.recipes:
        headline = next(record.headline for run, record in records if run.recipe == recipe)
        heads.append(f"{recipe}, {SCORE_NAMES[headline]}")
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in settings.rows:
        cells = [
            _cell([record for run, record in records if (run.recipe, run.row) == (recipe, row)])
            for recipe in settings.recipes
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def _cell(records: list[GraphRecord]) -> str:
    """Mean over the seeds, lowest and highest, and trainable parameters."""
    scores = [100 * record.test[record.headline] for record in records]
    spread = f" ({min(scores):.2f} to {max(scores):.2f})" if len(scores) > 1 else ""
    return f"{fmean(scores):.2f}{spread}, {records[0].trainable_parameters:,}"


def _published_table(settings: GraphBenchmark) -> list[str]:
    recipes = [recipe for recipe in settings.recipes if recipe in PUBLISHED]
    if not recipes:
        return []
    lines = ["| published, rank 2 | " + " | ".join(recipes) + " |", "| --- |" + " ---: |" * len(recipes)]
    lines += [
        f"| {row} | " + " | ".join(f"{PUBLISHED[recipe][row]:.2f}" for recipe in recipes) + " |"
        for row in ("full", "lora", "sst")
    ]
    return lines
