"""The end of a run for people: a table, a plot of the losses, and report.md with both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_train.common.record import RunRecord
from lowrank_train.reports import drawing, plot_metric, write_table
from lowrank_train.train.metrics import read_metrics

__all__ = ["summary", "write_report"]


def summary(record: RunRecord, folder: Path, checkpoint: Path | None) -> list[tuple[str, str]]:
    """Return rows (what, value) of the table shown when a run ends."""
    rows = [
        ("status", record.status),
        ("model", f"{record.model}, {record.parameters:,} parameters"),
        ("optimizer", ", ".join(f"{key} {value}" for key, value in record.optimizer.items())),
        ("steps", f"{record.steps:,}" + (f" ({record.skipped_steps} skipped)" if record.skipped_steps else "")),
        ("tokens", f"{record.tokens:,}"),
        ("time", f"{_clock(record.seconds)} training, {record.tokens_per_second:,.0f} tokens/s"),
        (
            f"perplexity, step {record.validation_step}",
            f"{_number(record.perplexity)} on held-out text (at step 0: {_number(record.initial_perplexity)})",
        ),
        ("validation loss", f"{_number(record.validation_loss)} nats/token over {record.validation_tokens:,} tokens"),
        (
            "peak memory",
            f"{record.peak_memory_gib:.2f} GiB on rank 0" + _predicted(record.predicted_peak_gib),
        ),
        (
            "optimizer state",
            f"{record.optimizer_state_bytes:,} bytes on rank 0 (predicted {record.predicted_optimizer_state_bytes:,})",
        ),
        ("checkpoint", str(checkpoint) if checkpoint else "none"),
        ("TensorBoard", f"tensorboard --logdir {folder / 'tensorboard'}"),
        ("plot", str(folder / "loss.png")),
        ("report", str(folder / "report.md")),
    ]
    adapter = record.config.get("adapter", {}).get("name")
    if adapter is not None:
        trained = record.trained_parameters or 0
        share = 100 * trained / record.parameters
        rows.insert(2, ("adapter", f"{adapter}, {trained:,} parameters trained ({share:.3g} %)"))
    if (folder / "adapter").exists():
        rows.append(("peft folder", str(folder / "adapter")))
    if (folder / "huggingface").exists():
        rows.append(("Hugging Face folder", str(folder / "huggingface")))
    return rows


def write_report(record: RunRecord, folder: Path, checkpoint: Path | None) -> str:
    """Write record.json, loss.png and report.md into the run folder; returns the table as text for the terminal."""
    record.write(folder / "record.json")
    _plot(read_metrics(folder), folder / "loss.png")
    made = record.provenance
    how = f"seed {record.seed}; {record.world_size} rank(s) on {made.get('device')}, {record.precision}"
    return write_table(folder, summary(record, folder, checkpoint), ["![loss](loss.png)"], made, how)


def _predicted(gib: float | None) -> str:
    return "" if gib is None else f" (a step alone, predicted: {gib:.2f})"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    with drawing(path, (7, 4)) as axes:
        plot_metric(axes, rows, "train/loss", label="train/loss", linewidth=0.8)
        plot_metric(axes, rows, "eval/loss", label="eval/loss", marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        there, back = (lambda x: np.exp(np.clip(x, -50, 50))), (lambda x: np.log(np.clip(x, 1e-20, None)))
        perplexity = axes.secondary_yaxis("right", functions=(there, back))
        perplexity.set_ylabel("perplexity")
        perplexity.set_yscale("log")


def _number(value: float | None) -> str:
    return (
        "unknown" if value is None or not math.isfinite(value) else f"{value:.4g}" if value >= 100 else f"{value:.3f}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
