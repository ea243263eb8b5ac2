"""What the quality benchmark leaves: quality.json with every figure, quality.md with the table, quality.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lowrank_train.bench.sweep import Row, Trial, rate
from lowrank_train.bench.trainings import Outcome
from lowrank_train.common.signals import typed_command
from lowrank_train.common.small_files import write_text
from lowrank_train.train.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import AutoLocator, NullFormatter

__all__ = ["table", "write_quality_report"]


def write_quality_report(
    rows: Sequence[Row], trials: Sequence[Trial], outcomes: Sequence[Outcome], folder: Path
) -> str:
    """Write the three files; returns the table.

    Args:
        rows: one per optimizer, in the order of the table.
        trials: all trainings.
        outcomes: how they ended, in the same order; at least one finished.
        folder: where the files go.
    """
    figures = _figures(rows, trials, outcomes)
    write_text(folder / "quality.json", json.dumps(_finite(figures), indent=2) + "\n")
    lines = ["# Quality at equal tokens", "", table(rows), "", *_notes(rows, figures), "", "![curves](quality.png)", ""]
    write_text(folder / "quality.md", "\n".join(lines))
    _plot(rows, trials, folder / "quality.png")
    return table(rows)


def table(rows: Sequence[Row]) -> str:
    """Markdown; the rows of the baseline bold, ``*`` where the best rate is at the edge of those tried."""
    head = [
        "optimizer",
        "perplexity",
        "vs AdamW",
        "best lr",
        "lrs tried",
        "state MiB",
        "of matrices MiB",
        "B / matrix parameter",
        "tokens/s",
        "optimizer's share of time",
    ]
    return "\n".join(_markdown(cells) for cells in [head, ["---"] * len(head), *map(_cells, rows)])


def _cells(row: Row) -> list[str]:
    percent, share, speed = row.versus_baseline_percent, row.optimizer_share, row.tokens_per_second
    cells = [
        row.label,
        row.status if row.perplexity is None else _number(row.perplexity) + _spread(row),
        "" if percent is None else f"{percent:+.1f} %",
        "" if row.best_lr is None else rate(row.best_lr) + ("*" if row.is_on_edge else ""),
        ", ".join(rate(lr) + (" (none)" if loss is None else "") for lr, loss in zip(row.lrs, row.losses, strict=True)),
        "" if row.state_bytes is None else f"{row.state_bytes / 2**20:.2f}",
        f"{row.matrix_state_bytes / 2**20:.2f}",
        f"{row.matrix_state_bytes / row.matrix_parameters:.2f}",
        "" if speed is None else f"{speed:,.0f}",
        "" if share is None else f"{100 * share:.1f} %",
    ]
    is_baseline = row.versus_baseline_percent == 0
    return [f"**{cell}**" if cell and is_baseline else cell for cell in cells]


def _notes(rows: Sequence[Row], figures: dict[str, Any]) -> list[str]:
    data, made, other_lr = figures["data"], figures["provenance"], figures["other_lr"]
    seeds = len(figures["seeds"])
    lines = [
        f"{figures['model']}, {figures['parameters']:,} parameters ({rows[0].matrix_parameters:,} in matrices); "
        f"{figures['steps']:,} steps, {figures['tokens']:,} tokens of {data['data.path']} (sha1 {data['sha1'][:12]}). "
        f"Perplexity after the last step on {figures['validation_tokens']:,} held-out tokens (before: "
        f"{_number(figures['untrained_perplexity'])}), the same that chose the best rate of each row. Seeds: "
        f"{', '.join(map(str, figures['seeds']))}.",
        "",
        "All rows start from the same weights and see the same tokens in the same order. Learning rate of all but the "
        f"matrices (embeddings, head, norms): {'as lr' if other_lr is None else rate(other_lr)}.",
        "",
    ]
    if seeds == 1:
        lines += ["One seed: differences of a few per cent mean nothing.", ""]
    if any(row.is_on_edge for row in rows):
        lines += ["`*` the best rate is the lowest or highest tried: that row may still improve.", ""]
    if any(None in row.losses for row in rows):
        lines += ["(none): no result at that rate, because a training diverged or failed:", ""]
        lines += [f"- {run['run_dir']}: {run['message']}" for run in figures["runs"] if run["status"] != "finished"]
        lines += [""]
    if len(figures["commits"]) > 1:
        lines += [f"**These trainings are of several commits**: {', '.join(map(str, figures['commits']))}.", ""]
    lines += ["Settings, the learning rate aside:", ""]
    lines += [f"- {row.label}: {', '.join(f'{k} {v}' for k, v in row.optimizer.items())}" for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return [
        *lines,
        "",
        f"Command: `{figures['command']}`; commit {', '.join(map(str, figures['commits']))}; {made['device']}, "
        f"{made['threads']} thread(s) per training; Python {made['python']}, {versions}. Speeds are medians over a "
        "row's trainings; what else the machine did is in them.",
    ]


def _figures(rows: Sequence[Row], trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    one = records[0]
    return {
        "what": "the same model on the same tokens with each optimizer, learning rates swept equally",
        "command": typed_command(),
        "commits": sorted({str(record["provenance"]["commit"]) for record in records}),
        "provenance": {key: value for key, value in one["provenance"].items() if key not in ("command", "commit")},
        "model": one["model"],
        "parameters": one["parameters"],
        "matrix_parameters": rows[0].matrix_parameters,
        "steps": one["steps"],
        "tokens": one["tokens"],
        "seeds": sorted({trial.seed for trial in trials}),
        "other_lr": one["optimizer"].get("other_lr"),
        "data": {key: value for key, value in one["data"].items() if key != "seed"},
        "validation_tokens": one["validation_tokens"],
        "untrained_perplexity": one["initial_perplexity"],
        "config": {key: value for key, value in one["config"].items() if key not in ("optimizer", "seed", "run_dir")},
        "rows": [
            {**asdict(row), "best_lr": row.best_lr, "is_on_edge": row.is_on_edge, "perplexity": row.perplexity}
            for row in rows
        ],
        "runs": [_run(trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True)],
    }


def _run(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    kept = (
        "perplexity",
        "validation_loss",
        "train_loss",
        "skipped_steps",
        "seconds",
        "optimizer_seconds",
        "tokens_per_second",
        "peak_memory_gib",
        "optimizer_state_bytes",
    )
    return {
        "label": trial.label,
        "lr": trial.lr,
        "seed": trial.seed,
        "run_dir": trial.config.run_dir,
        "status": outcome.status,
        "message": outcome.message,
        **{key: outcome.record[key] for key in kept if outcome.record is not None},
    }


def _plot(rows: Sequence[Row], trials: Sequence[Trial], path: Path) -> None:
    figure, (curves, sweep) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors
    highest = 0.0
    for number, row in enumerate(rows):
        style = {"color": colors[2 * number % 20 + (number >= 10)], "label": row.label}
        trial = next((t for t in trials if t.label == row.label and t.lr == row.best_lr), None)
        if trial is not None:
            steps, losses = _training_curve(Path(str(trial.config.run_dir)))
            if losses:
                curves.plot(steps, losses, linewidth=1, **style)
                highest = max(highest, losses[len(losses) // 10])
        tried = [(lr, math.exp(loss)) for lr, loss in zip(row.lrs, row.losses, strict=True) if loss is not None]
        if tried:
            sweep.plot(*zip(*tried, strict=True), marker="o", markersize=4, **style)
        missing = [lr for lr, loss in zip(row.lrs, row.losses, strict=True) if loss is None]
        sweep.plot(missing, [0.98] * len(missing), "x", color=style["color"], transform=sweep.get_xaxis_transform())
    curves.set(xlabel="step", ylabel="training loss, nats per token (running mean)", title="at the best learning rate")
    if highest:
        curves.set_ylim(top=highest)  # the first tenth of a run is alike for all
    sweep.set(xlabel="learning rate", ylabel="validation perplexity", title="learning rates tried (x: no result)")
    sweep.set_xscale("log")
    sweep.set_yscale("log")
    sweep.yaxis.set_major_locator(AutoLocator())  # a logarithmic axis labels powers of ten, of which there is none here
    sweep.yaxis.set_major_formatter("{x:g}")
    sweep.yaxis.set_minor_formatter(NullFormatter())
    for axes in (curves, sweep):
        axes.grid(alpha=0.3, which="both")
    figure.legend(*sweep.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _training_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses, each the mean of the last fiftieth of the run up to it."""
    points = [(row["step"], row["train/loss"]) for row in read_metrics(folder) if row.get("train/loss") is not None]
    if not points:  # metrics.jsonl was deleted; the figures are in record.json
        return [], []
    window = max(1, len(points) // 50)
    means = np.convolve([loss for _, loss in points], np.ones(window) / window, mode="valid")
    return [step for step, _ in points[window - 1 :]], means.tolist()


def _spread(row: Row) -> str:
    if row.seeds == 1 or row.lowest_perplexity is None or row.highest_perplexity is None:
        return ""
    return f" ({_number(row.lowest_perplexity)} to {_number(row.highest_perplexity)})"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
