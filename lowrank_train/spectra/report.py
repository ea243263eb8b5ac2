"""What the spectrum command leaves: tables as text, CSV and JSON, singular values as .npz, and the plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_train.optim.costs.table import aligned
from lowrank_train.reports import write_csv, write_json
from lowrank_train.spectra.history import Snapshot, history_table
from lowrank_train.spectra.plots import ModelSpectra, plot_cosines, plot_history, plot_pruning, plot_spectra
from lowrank_train.spectra.pruning import Point
from lowrank_train.spectra.spectrum import Summary

__all__ = ["tables", "write_history", "write_report"]


def tables(models: Sequence[ModelSpectra], epsilon: float, notes: Sequence[str]) -> str:
    """Return all results as text."""
    parts = []
    for model in models:
        parts += [f"{model.label}: {model.folder}", _summary_table(model.summaries())]
    for model in models:
        if model.cosines:
            parts += [_intruder_table(model, epsilon)]
    if models[0].points:
        parts += [_pruning_table(models)]
    return "\n\n".join([*parts, *notes])


def write_report(
    models: Sequence[ModelSpectra],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    made: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write all files into ``folder`` and return the tables as text.

    Args:
        models: at least one, with different labels, all with the same parts.
        settings: all keys of the command, kept in the JSON; ``epsilon`` is used.
        notes: lines below the tables.
        made: command, commit, versions and hardware.
        folder: exists.

    Raises:
        OSError: a file cannot be written.
    """
    epsilon = float(settings["epsilon"])
    rows = [{"model": model.label, **asdict(summary)} for model in models for summary in model.summaries()]
    write_csv(folder / "spectrum.csv", rows)
    for model in models:
        values: dict[str, Any] = {name: sigma.numpy() for name, sigma in model.sigma.items()}
        np.savez(folder / f"spectra-{model.label}.npz", **values)
        plot_spectra(model, folder / f"spectra-{model.label}.png")
        if model.cosines:
            plot_cosines(model, epsilon, folder / f"intruders-{model.label}.png")
    if models[0].cosines:
        write_csv(folder / "intruders.csv", [row for model in models for row in _intruder_rows(model, epsilon)])
    if models[0].points:
        points = [{"model": model.label, **_point(point)} for model in models for point in model.points]
        write_csv(folder / "pruning.csv", points)
        plot_pruning(models, folder / "pruning.png")
    figures = {
        "what": "singular values of the matrices of models",
        "settings": dict(settings),
        "provenance": dict(made),
        "notes": list(notes),
        "models": [_figures(model, epsilon) for model in models],
    }
    write_json(folder / "spectrum.json", figures)
    return tables(models, epsilon, notes)


def write_history(
    label: str, snapshots: Sequence[Snapshot], settings: Mapping[str, Any], made: Mapping[str, Any], folder: Path
) -> str:
    """Write history.csv, .json and .png into ``folder`` and return the table as text; arguments as above."""
    rows = [{"step": one.step, **asdict(summary)} for one in snapshots for summary in one.summaries]
    write_csv(folder / "history.csv", rows)
    plot_history(label, snapshots, folder / "history.png")
    figures = {"what": "spectra over the checkpoints of a run", "settings": dict(settings), "provenance": dict(made)}
    write_json(folder / "history.json", {**figures, "rows": rows})
    return history_table(snapshots)


# -------------------------------------------------------------------------------------------------------------- tables


def _summary_table(summaries: Sequence[Summary]) -> str:
    head = ["matrix", "shape", "sigma_1", "stable rank", "effective rank", "hold 90 %"]
    rows = [
        [
            s.matrix,
            f"{s.rows} x {s.columns}",
            f"{s.sigma_1:.4g}",
            f"{s.stable_rank:.1f}",
            f"{s.effective_rank:.1f}",
            f"{s.count_90}",
        ]
        for s in summaries
    ]
    return aligned([head, *rows])


def _intruder_table(model: ModelSpectra, epsilon: float) -> str:
    counts = model.intruders(epsilon)
    looked_at = sum(len(cosines) for cosines in model.cosines.values())
    rows = [
        [name, str(count), f"{float(model.cosines[name].min()):.3f}", f"{float(model.cosines[name].mean()):.3f}"]
        for name, count in counts.items()
    ]
    total = (
        f"{model.label}: {sum(counts.values())} intruder dimensions among the {looked_at} leading left "
        f"singular vectors of {len(counts)} matrices (largest |cosine| with those before below {epsilon:g})"
    )
    return total + "\n\n" + aligned([["matrix", "intruders", "lowest |cosine|", "mean |cosine|"], *rows])


def _pruning_table(models: Sequence[ModelSpectra]) -> str:
    head = ["kept of the sum"]
    head += [cell for model in models for cell in (f"dropped, {model.label}", f"perplexity, {model.label}")]
    rows = []
    for points in zip(*(model.points for model in models), strict=True):
        cells = [cell for point in points for cell in (f"{100 * point.dropped:.1f} %", f"{point.perplexity:.4g}")]
        rows.append([f"{points[0].keep_percent:g} %", *cells])
    return aligned([head, *rows], left=())


def _intruder_rows(model: ModelSpectra, epsilon: float) -> list[dict[str, Any]]:
    return [
        {
            "model": model.label,
            "matrix": name,
            "intruders": count,
            **{f"cosine_{j}": float(cosine) for j, cosine in enumerate(model.cosines[name], start=1)},
        }
        for name, count in model.intruders(epsilon).items()
    ]


def _point(point: Point) -> dict[str, Any]:
    """JSON knows neither infinity nor NaN: None for a model that was broken by pruning."""
    figures = {**asdict(point), "perplexity": point.perplexity}
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def _figures(model: ModelSpectra, epsilon: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "label": model.label,
        "folder": str(model.folder),
        "matrices": [asdict(summary) for summary in model.summaries()],
    }
    if model.cosines:
        counts = model.intruders(epsilon)
        figures["intruders"] = {"total": sum(counts.values()), "matrices": counts}
        figures["best_cosines"] = {name: cosines.tolist() for name, cosines in model.cosines.items()}
    if model.points:
        figures["pruning"] = [_point(point) for point in model.points]
    return figures
