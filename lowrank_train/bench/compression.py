"""The compression benchmark: perplexity of one model compressed in several ways, at equal targets, not fine-tuned."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib

from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.ranks import start
from lowrank_train.common.record import perplexity, provenance
from lowrank_train.common.small_files import write_text
from lowrank_train.compress.command import CompressConfig, compressed
from lowrank_train.compress.ranks import rank_reduction
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.layers.choice import BLOCK_MATRICES
from lowrank_train.models.folders import load_model, model_folder
from lowrank_train.optim.costs.table import aligned
from lowrank_train.spectra.pruning import TextConfig

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["CompressionConfig", "help_text", "load_settings", "measure_compression"]

_OF_A_ROW = ("method", "score", "classification", "whiten", "multiple", "floor", "ceiling", "owl_strength")


_LOGARITHMIC = 3.0
"""Times the perplexity before: a plot that reaches higher has a logarithmic axis."""


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
    layers: str = setting(BLOCK_MATRICES, "regular expression: which linear layers, by name")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    output: str = setting("runs/compression", "folder of the results", path=True)


def help_text() -> str:
    """Every key with its default and meaning."""
    usage = "usage: launch/benchmark.py compression model=FOLDER [FILE.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *key_help(CompressionConfig)])


def load_settings(arguments: Sequence[str]) -> CompressionConfig:
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


def measure_compression(settings: CompressionConfig) -> str:
    """Compress in every way to every target; writes compression.json and compression.png, returns the table.

    Raises:
        UserError: as ``launch/compress.py``; a target that one way cannot reach is a cell without a figure.
    """
    targets = [("rank_reduction", value) for value in settings.rank_reductions]
    targets += [("size", value) for value in settings.sizes]  # type: ignore[misc]
    cells: list[dict[str, Any]] = []
    before = math.nan
    out = Path(settings.output)
    with start(settings.device) as ranks:
        jobs = [(label, key, value) for label in settings.ways for key, value in targets]
        for label, key, value in show_progress(jobs, "compressing", "models"):
            config = _config(settings, label, key, value)
            model = load_model(Path(str(settings.model))).to(ranks.device)
            try:
                result = compressed(model, Path(str(settings.model)), config, ranks)
            except ValueError as error:
                cells.append({"way": label, key: value, "perplexity": None, "why": str(error)})
                continue
            assert result.loss_before is not None
            assert result.loss_after is not None
            before = perplexity(result.loss_before)
            after = perplexity(result.loss_after)
            cells.append(
                {
                    "way": label,
                    key: value,
                    "perplexity": after if math.isfinite(after) else None,
                    "reached_rank_reduction": rank_reduction(result.plan),
                    "parameter_bytes": result.bytes_after,
                    "parameter_share": result.bytes_after / result.bytes_before,
                    "ranks": {matrix.name: matrix.rank for matrix in result.plan},
                }
            )
        made = provenance(ranks.device)
    table = _table(settings, targets, cells, before)
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures = {"what": "perplexity of compressed models, not fine-tuned", "perplexity_before": before}
        figures |= {"settings": asdict(settings), "provenance": made, "cells": cells}
        write_text(out / "compression.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
        if settings.rank_reductions:
            _plot(settings, cells, before, out / "compression.png")
    except OSError as error:
        raise UserError(f"cannot write to output={out}: {error}; set output to another folder") from None
    return table


def _config(settings: CompressionConfig, label: str, key: str, value: float | str) -> CompressConfig:
    common = {
        f.name: getattr(settings, f.name) for f in dataclasses.fields(CompressConfig) if hasattr(settings, f.name)
    }
    own = {**settings.ways[label], key: value}
    return CompressConfig(**{**common, **own})


def _table(
    settings: CompressionConfig, targets: Sequence[tuple[str, Any]], cells: Sequence[dict[str, Any]], before: float
) -> str:
    head = [f"perplexity (before: {before:.4g})"]
    head += [f"-{100 * value:g} % ranks" if key == "rank_reduction" else f"size {value}" for key, value in targets]
    rows = [[label, *(_cell(cells, label, key, value) for key, value in targets)] for label in settings.ways]
    return aligned([head, *rows])


def _cell(cells: Sequence[dict[str, Any]], label: str, key: str, value: Any) -> str:
    cell = next(cell for cell in cells if cell["way"] == label and cell.get(key) == value)
    return "-" if cell["perplexity"] is None else f"{cell['perplexity']:.4g}"


def _plot(settings: CompressionConfig, cells: Sequence[dict[str, Any]], before: float, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = pyplot.get_cmap("tab20")
    for index, label in enumerate(settings.ways):
        mine = [cell for cell in cells if cell["way"] == label and "rank_reduction" in cell and cell["perplexity"]]
        axes.plot(
            [0, *(100 * cell["reached_rank_reduction"] for cell in mine)],
            [before, *(cell["perplexity"] for cell in mine)],
            marker="o",
            markersize=4,
            linewidth=1.2,
            color=colors(index % 20),
            label=label,
        )
    axes.set(xlabel="ranks removed, %", ylabel="perplexity")
    highest = max((cell["perplexity"] or 0 for cell in cells if "rank_reduction" in cell), default=0)
    if highest > _LOGARITHMIC * before:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
