"""What the quality benchmark found: one row for each optimizer at its best learning rate, a table, notes and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lowrank_train import optim
from lowrank_train.bench.grid import Group, Result, Run, failures, groups, sweep_panel
from lowrank_train.bench.report import Panel, Report, markdown, origin, rate, spread
from lowrank_train.common.record import perplexity
from lowrank_train.common.signals import typed_command
from lowrank_train.config.schema import Config
from lowrank_train.models.build import architecture, skeleton
from lowrank_train.plan import Plan
from lowrank_train.train.metrics import read_metrics

__all__ = ["BASELINE", "KEPT", "quality_figures", "report", "with_baseline"]

BASELINE = "adamw"

KEPT = (
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
"""Figures of a training that quality.json has."""


def quality_figures(results: Sequence[Result[Config]]) -> dict[str, Any]:
    """Return what quality.json holds; at least one training has finished."""
    records = [record for result in results if (record := result.outcome.record) is not None]
    one, runs = records[0], [_run(result) for result in results]
    model = skeleton(architecture(results[0].config.model), torch.float32)
    matrices = [group["params"] for group in optim.param_groups(model) if group["role"] == "matrix"]
    parameters = sum(param.numel() for params in matrices for _, param in params)
    config_of = {result.keys["label"]: result.config for result in results}
    rows = [
        _row(group, config_of[group.label], parameters)
        for group in groups(runs, "label", score=lambda run: -run["validation_loss"])
    ]
    return {
        "what": "the same model on the same tokens with each optimizer, learning rates swept equally",
        "command": typed_command(),
        "commits": sorted({str(record["provenance"]["commit"]) for record in records}),
        "provenance": {key: value for key, value in one["provenance"].items() if key not in ("command", "commit")},
        "model": one["model"],
        "parameters": one["parameters"],
        "matrix_parameters": parameters,
        "steps": one["steps"],
        "tokens": one["tokens"],
        "seeds": sorted({result.keys["seed"] for result in results}),
        "other_lr": one["optimizer"].get("other_lr"),
        "data": {key: value for key, value in one["data"].items() if key != "seed"},
        "validation_tokens": one["validation_tokens"],
        "untrained_perplexity": one["initial_perplexity"],
        "config": {key: value for key, value in one["config"].items() if key not in ("optimizer", "seed", "run_dir")},
        "rows": with_baseline(rows),
        "runs": runs,
    }


def _run(result: Result[Config]) -> dict[str, Any]:
    record = result.outcome.record or {}
    about = {"run_dir": result.config.run_dir, "status": result.outcome.status, "message": result.outcome.message}
    return {**result.keys, **about, **{key: record[key] for key in KEPT if record}}


def _row(group: Group, config: Config, matrix_parameters: int) -> dict[str, Any]:
    """One optimizer: figures at its best learning rate; speed over all its finished trainings."""
    finished = [run for run in group.runs if run["status"] == "finished"]
    losses = [None if score is None else -score for score in group.scores]
    index = group.index
    loss = None if index is None else losses[index]
    at_best = [perplexity(run["validation_loss"]) for run in group.best]

    def middle(key: str, over: str | None = None) -> float | None:
        return median(run[key] / (run[over] if over else 1) for run in finished) if finished else None

    return {
        "label": group.label,
        "optimizer": {key: value for key, value in config.optimizer.items() if key != "lr"},
        "lrs": group.rates,
        "losses": losses,
        "status": group.status,
        "best": index,
        "seeds": len({run["seed"] for run in group.runs}),
        "lowest_perplexity": min(at_best, default=None),
        "highest_perplexity": max(at_best, default=None),
        "versus_baseline_percent": None,
        "state_bytes": finished[0]["optimizer_state_bytes"] if finished else None,
        "matrix_state_bytes": Plan.of(config).state_bytes(matrices_only=True),
        "matrix_parameters": matrix_parameters,
        "tokens_per_second": middle("tokens_per_second"),
        "seconds": middle("seconds"),
        "optimizer_share": middle("optimizer_seconds", over="seconds"),
        "best_lr": group.rate,
        "is_on_edge": group.index in (0, len(group.rates) - 1),
        "perplexity": None if loss is None else perplexity(loss),
    }


def with_baseline(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, best first, each compared with the first row of the baseline, if there is one."""
    reference = next((row["perplexity"] for row in rows if row["optimizer"]["name"] == BASELINE), None)
    compared = [{**row, "versus_baseline_percent": _percent(row["perplexity"], reference)} for row in rows]
    return sorted(compared, key=lambda row: math.inf if row["perplexity"] is None else row["perplexity"])


def _percent(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else 100 * (value / reference - 1)


def report(figures: Mapping[str, Any]) -> Report:
    """Return what quality.md shows, from the figures of quality.json."""
    rows = figures["rows"]
    head = ["optimizer", "perplexity", "vs AdamW", "best lr", "lrs tried", "state MiB", "of matrices MiB"]
    head += ["B / matrix parameter", "tokens/s", "optimizer's share of time"]
    tried = {row["label"]: (row["lrs"], [None if x is None else perplexity(x) for x in row["losses"]]) for row in rows}
    panels = [_curves(rows, figures.get("runs", [])), sweep_panel("validation perplexity", tried, log_y=True)]
    return Report("Quality at equal tokens", markdown(head, map(_cells, rows)), _notes(figures), panels)


def _cells(row: Run) -> list[str]:
    """The baseline's are bold."""
    cells = [
        row["label"],
        row["status"] if row["perplexity"] is None else _perplexity(row),
        _shown("{:+.1f} %", row["versus_baseline_percent"]),
        "" if row["best_lr"] is None else rate(row["best_lr"]) + "*" * row["is_on_edge"],
        ", ".join(map(_tried, row["lrs"], row["losses"])),
        _shown("{:.2f}", row["state_bytes"], 2**-20),
        _shown("{:.2f}", row["matrix_state_bytes"], 2**-20),
        f"{row['matrix_state_bytes'] / row['matrix_parameters']:.2f}",
        _shown("{:,.0f}", row["tokens_per_second"]),
        _shown("{:.1f} %", row["optimizer_share"], 100),
    ]
    return [f"**{cell}**" if cell and row["versus_baseline_percent"] == 0 else cell for cell in cells]


def _shown(form: str, value: float | None, times: float = 1) -> str:
    return "" if value is None else form.format(times * value)


def _tried(lr: float, loss: float | None) -> str:
    return rate(lr) + (" (none)" if loss is None else "")


def _perplexity(row: Run) -> str:
    ends = [row["lowest_perplexity"], row["highest_perplexity"]]
    return spread(ends if row["seeds"] > 1 else ends[:1], ".4g", middle=row["perplexity"])


def _notes(figures: Mapping[str, Any]) -> list[str]:
    rows, data, other_lr, runs = figures["rows"], figures["data"], figures["other_lr"], figures.get("runs", [])
    commits, untrained = ", ".join(map(str, figures["commits"])), figures["untrained_perplexity"]
    made = {**figures["provenance"], "command": figures["command"], "commit": commits}
    return [
        f"{figures['model']}, {figures['parameters']:,} parameters ({figures['matrix_parameters']:,} in matrices); "
        f"{figures['steps']:,} steps, {figures['tokens']:,} tokens of {data['data.path']} (sha1 {data['sha1'][:12]}). "
        f"Perplexity after the last step on {figures['validation_tokens']:,} held-out tokens (before: "
        f"{'unknown' if untrained is None else f'{untrained:.4g}'}), the same that chose the best rate of each row. "
        f"Seeds: {', '.join(map(str, figures['seeds']))}.",
        "All rows start from the same weights and see the same tokens in the same order. Learning rate of all but the "
        f"matrices (embeddings, head, norms): {'as lr' if other_lr is None else rate(other_lr)}.",
        *["One seed: differences of a few per cent mean nothing."] * (len(figures["seeds"]) == 1),
        *["`*` the best rate is the lowest or highest tried: that row may still improve."]
        * any(row["is_on_edge"] for row in rows),
        *failures(runs),
        *[f"**These trainings are of several commits**: {commits}."] * (len(figures["commits"]) > 1),
        "\n".join(
            ["Settings, the learning rate aside:", ""]
            + [f"- {row['label']}: {', '.join(f'{k} {v}' for k, v in row['optimizer'].items())}" for row in rows]
        ),
        f"{origin(made)} Speeds are medians over a row's trainings; what else the machine did is in them.",
    ]


def _curves(rows: Sequence[Run], runs: Sequence[Run]) -> Panel:
    """Training losses of the first seed at the best rate."""
    lines, top = {}, None
    for row in rows:
        best = [run for run in runs if (run["label"], run["lr"]) == (row["label"], row["best_lr"])]
        steps, losses = _training_curve(Path(str(best[0]["run_dir"]))) if best else ([], [])
        if losses:
            lines[row["label"]] = steps, losses
            top = max(top or 0, losses[len(losses) // 10])  # the first tenth of a run is alike for all
    title, y = "at the best learning rate", "training loss, nats per token (running mean)"
    return Panel(title, "step", y, lines, markers="", linewidth=1, top=top)


def _training_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses, each the mean of the last fiftieth of the run up to it."""
    points = [(row["step"], row["train/loss"]) for row in read_metrics(folder) if row.get("train/loss") is not None]
    if not points:  # metrics.jsonl was deleted; the figures are in record.json
        return [], []
    window = max(1, len(points) // 50)
    means = np.convolve([loss for _, loss in points], np.ones(window) / window, mode="valid")
    return [step for step, _ in points[window - 1 :]], means.tolist()
