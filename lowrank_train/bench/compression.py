"""The compression benchmark: perplexity of one model compressed in several ways, at equal targets, not fine-tuned."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_train.bench.grid import Grid, Row, Run
from lowrank_train.bench.report import Panel, Report, markdown, origin, output_folder, publish
from lowrank_train.bench.trainings import Trainer, keep_record
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.common.record import perplexity, provenance
from lowrank_train.compress.command import CompressConfig, compressed, weights_hash
from lowrank_train.compress.ranks import rank_reduction
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.models.folders import load_model, model_folder
from lowrank_train.spectra.pruning import TextConfig, evaluation_blocks

__all__ = ["CompressionConfig", "help_text", "load", "measure", "report"]

_OF_A_ROW = ("method", "score", "classification", "whiten", "multiple", "floor", "ceiling", "owl_strength")

_LOGARITHMIC = 3.0
"""Times the perplexity before: a plot that reaches higher has a logarithmic axis."""


@dataclass
class Cell(CompressConfig):
    """One compressed model of the table."""

    model: str | None = setting(None, "folder of the model", path=True)
    subject: str = setting("", "digest of the model and the text")
    run_dir: str | None = setting(None, "folder of the record", path=True)


@dataclass
class CompressionConfig:
    """What is compared."""

    model: str | None = setting(None, "Hugging Face folder, or the folder of a finished run", path=True)
    ways: dict[str, Any] = setting({}, f"label -> settings of launch/compress.py: {', '.join(_OF_A_ROW)}")
    rank_reductions: list[float] = setting([0.1, 0.3, 0.5], "targets", above=0, below=1)
    sizes: list[str] = setting([], "further targets: bytes of the model's parameters, e.g. [80%, 60%]")
    data: TextConfig = field(default_factory=TextConfig)
    calibration_tokens: int = setting(
        16384, "tokens for whiten and owl, from the text that follows the evaluated one", at_least=1
    )
    micro_batch: int = setting(8, "sequences in one forward pass", at_least=1, at_most=10**6)
    layers: str | None = setting(
        None, "regular expression: which linear layers, by name; null: attention and feed-forward matrices"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    output: str = setting("runs/compression", "folder of the results", path=True)


def help_text() -> str:
    """Return every key with its default and meaning."""
    usage = "usage: launch/benchmark.py compression model=FOLDER [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(CompressionConfig)])


def load(arguments: Sequence[str]) -> CompressionConfig:
    """Read YAML files and overrides. Raises UserError for anything that does not fit."""
    settings = load_schema(CompressionConfig, arguments)
    if settings.model is None:
        raise UserError("no model given; expected model=FOLDER")
    settings.model = str(model_folder(settings.model, "model="))
    if not settings.ways:
        raise UserError("there are no ways to compare; give configs/benchmark/compression.yaml")
    for label, way in settings.ways.items():
        unknown = [key for key in way if key not in _OF_A_ROW]
        if unknown:
            raise UserError(f"ways.{label}.{unknown[0]}: unknown; expected one of {', '.join(_OF_A_ROW)}")
    if not settings.rank_reductions and not settings.sizes:
        raise UserError("no target given; expected rank_reductions=[...] or sizes=[...]")
    return settings


def measure(settings: CompressionConfig) -> str:
    """Compress in every way to every target; write compression.json, .md and .png into ``settings.output``.

    Returns:
        The table, in Markdown. A target that a way cannot reach is a cell without a figure.

    Raises:
        UserError: as ``launch/compress.py``; a cell in the folder was made with other settings, or of another model or
            text.
    """
    folder = output_folder(settings.output, "output")
    targets = [("rank_reduction", value) for value in settings.rank_reductions]
    targets += [("size", value) for value in settings.sizes]  # type: ignore[misc]
    with start(settings.device) as ranks:
        subject = ranks.first(lambda: _digest(settings))
        grid = Grid(
            rows=[Row({"way": way, key: value}) for way in settings.ways for key, value in targets],
            config=lambda way, **target: _config(settings, subject, way, target),
            trainer=Trainer(lambda cell: _compress(cell, ranks), needs=["perplexity", "perplexity_before", "why"]),
        )
        results = grid.train()
        made = provenance(ranks.device)
    reached = [record for result in results if (record := result.outcome.record) and record["why"] is None]
    if not reached:
        raise UserError(f"no target can be reached; the first: {results[0].run()['why']}")
    figures = {
        "what": "perplexity of compressed models, not fine-tuned",
        "perplexity_before": reached[0]["perplexity_before"],
        "settings": asdict(settings),
        "provenance": made,
        "cells": [result.run(_kept) for result in results],
    }
    return publish(folder, "compression", figures, report(figures))


def report(figures: Mapping[str, Any]) -> Report:
    """Return what compression.md shows, from the figures of compression.json."""
    before, settings, cells = figures["perplexity_before"], figures["settings"], figures["cells"]
    ways = list(dict.fromkeys(cell["way"] for cell in cells))
    found = {(cell["way"], cell.get("rank_reduction", cell.get("size"))): cell for cell in cells}
    targets = [*settings["rank_reductions"], *settings["sizes"]]
    head = [f"perplexity (before: {before:.4g})", *(f"-{100 * x:g} % ranks" for x in settings["rank_reductions"])]
    head += [f"size {size}" for size in settings["sizes"]]
    table = markdown(head, [[way, *(_shown(found[way, target]) for target in targets)] for way in ways])
    lines = {}
    for way in ways:
        points = [(0, before)] + [
            (100 * cell["reached_rank_reduction"], cell["perplexity"])
            for cell in cells
            if cell["way"] == way and "rank_reduction" in cell and cell["perplexity"]
        ]
        lines[way] = [x for x, _ in points], [y for _, y in points]
    is_wide = max(y for _, ys in lines.values() for y in ys) > _LOGARITHMIC * before
    panel = Panel("not fine-tuned", "ranks removed, %", "perplexity", lines, log_y=is_wide)
    reasons = dict.fromkeys(f"-: {cell['why']}" for cell in cells if cell.get("why"))
    notes = [*reasons, origin(figures["provenance"])]
    return Report("Compression", table, notes, [panel] * bool(settings["rank_reductions"]))


def _shown(cell: Run) -> str:
    return "-" if cell["perplexity"] is None else f"{cell['perplexity']:.4g}"


def _config(settings: CompressionConfig, subject: str, way: str, target: Mapping[str, Any]) -> Cell:
    shared = {f.name for f in dataclasses.fields(CompressConfig)} & {f.name for f in dataclasses.fields(settings)}
    (goal,) = target.values()
    own = {**settings.ways[way], **target, "run_dir": str(Path(settings.output, f"{way.replace('/', '_')}, {goal}"))}
    return Cell(
        **{**{name: getattr(settings, name) for name in shared}, **own, "model": settings.model, "subject": subject}
    )


def _digest(settings: CompressionConfig) -> str:
    """Of the model and the text: they may change under the same name."""
    folder, tokens = Path(str(settings.model)), settings.data.tokens + settings.calibration_tokens
    blocks, _ = evaluation_blocks(dataclasses.replace(settings.data, tokens=tokens), folder)
    return hashlib.blake2b(weights_hash(folder).encode() + blocks.numpy().tobytes(), digest_size=8).hexdigest()


def _compress(cell: Cell, ranks: Ranks) -> None:
    folder = Path(str(cell.model))
    figures: dict[str, Any] = {"perplexity": None, "perplexity_before": None, "why": None}
    try:
        result = compressed(load_model(folder).to(ranks.device), folder, cell, ranks)
    except ValueError as error:
        figures["why"] = str(error)
    else:
        assert result.loss_before is not None
        assert result.loss_after is not None
        figures |= {
            "perplexity": perplexity(result.loss_after),
            "perplexity_before": perplexity(result.loss_before),
            "reached_rank_reduction": rank_reduction(result.plan),
            "parameter_bytes": result.bytes_after,
            "parameter_share": result.bytes_after / result.bytes_before,
            "ranks": {matrix.name: matrix.rank for matrix in result.plan},
        }
    ranks.first(lambda: keep_record(cell, figures))


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("status", "perplexity_before") and (k, v) != ("why", None)}
