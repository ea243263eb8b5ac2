"""What was found in a model's spectra, and its plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lowrank_train.reports import drawing
from lowrank_train.spectra.history import Snapshot
from lowrank_train.spectra.pruning import Point
from lowrank_train.spectra.spectrum import Summary, summarize

__all__ = ["ModelSpectra", "plot_cosines", "plot_history", "plot_pruning", "plot_spectra"]

_LOWEST_PLOTTED = 1e-8
"""The share of sigma_1 below which the rounding of single-precision weights would fill the plot."""


@dataclass
class ModelSpectra:
    """What was found in one model; per matrix by its module's name."""

    label: str
    folder: Path
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(out, in)."""
    sigma: dict[str, Tensor] = field(default_factory=dict)
    """(k,), falling."""
    cosines: dict[str, Tensor] = field(default_factory=dict)
    """(top_k,), of the leading left singular vectors with those before; empty if there is no before."""
    points: list[Point] = field(default_factory=list)
    """The pruning curve; empty if it was not asked for."""

    def summaries(self) -> list[Summary]:
        """Return a summary for each matrix."""
        return [summarize(name, self.shapes[name], sigma) for name, sigma in self.sigma.items()]

    def intruders(self, epsilon: float) -> dict[str, int]:
        """Return how many of the leading left singular vectors are new."""
        return {name: int((cosines < epsilon).sum()) for name, cosines in self.cosines.items()}


def plot_spectra(model: ModelSpectra, path: Path) -> None:
    """Plot singular values on a logarithmic axis: a panel per kind of matrix, a line per layer."""
    colors = _layer_colors(model)

    def draw(axes: Any, matrices: list[tuple[int, str]]) -> None:
        for layer, name in matrices:
            sigma = model.sigma[name].numpy()
            visible = np.where(sigma > _LOWEST_PLOTTED * sigma[0], sigma, np.nan)
            axes.plot(np.arange(1, len(sigma) + 1), visible, color=colors.to_rgba(np.asarray(layer)), linewidth=1)
        if any(float(model.sigma[name][0]) > 0 for _, name in matrices):  # zeros alone have no logarithm
            axes.set_yscale("log")
        axes.set(xlabel="i", ylabel=r"$\sigma_i$")

    _panels(model, f"{model.label}: singular values", draw, path, colors)


def plot_history(label: str, snapshots: Sequence[Snapshot], path: Path) -> None:
    """Plot the effective rank, a share of the whole, over the steps of a run: a panel per kind of matrix, a line per
    layer.
    """
    last = ModelSpectra(label, path.parent, sigma=snapshots[-1].sigma)
    steps = [snapshot.step for snapshot in snapshots]
    shares = [{s.matrix: s.effective_rank / min(s.rows, s.columns) for s in one.summaries} for one in snapshots]
    colors = _layer_colors(last)

    def draw(axes: Any, matrices: list[tuple[int, str]]) -> None:
        for layer, name in matrices:
            line = [share[name] for share in shares]
            axes.plot(steps, line, color=colors.to_rgba(np.asarray(layer)), marker=".", linewidth=1)
        axes.set(xlabel="step", ylabel="effective rank / k", ylim=(0, 1.02))

    _panels(last, f"{label}: effective rank over the run", draw, path, colors)


def plot_cosines(model: ModelSpectra, epsilon: float, path: Path) -> None:
    """Plot the largest |cosine| of each leading left singular vector with those before: a panel per kind, a row per
    layer.
    """
    colors = ScalarMappable(Normalize(0, 1), "viridis")

    def draw(axes: Any, matrices: list[tuple[int, str]]) -> None:
        matrices = sorted(matrices)
        width = max(len(model.cosines[name]) for _, name in matrices)
        image = np.full((len(matrices), width), np.nan)
        for row, (_, name) in enumerate(matrices):
            image[row, : len(model.cosines[name])] = model.cosines[name].numpy()
        axes.imshow(image, norm=colors.norm, cmap=colors.cmap, aspect="auto", interpolation="nearest")
        rows, columns = np.nonzero(image < epsilon)
        axes.plot(columns, rows, "x", color="red", markersize=5)
        places = np.unique(np.linspace(0, len(matrices) - 1, 6).round().astype(int))
        axes.set_yticks(places, [str(matrices[i][0]) for i in places])
        places = np.unique(np.linspace(0, width - 1, 5).round().astype(int))
        axes.set_xticks(places, [str(i + 1) for i in places])
        axes.set(xlabel="left singular vector after", ylabel="layer")

    title = f"{model.label}: similarity to the model before (x: below {epsilon:g})"
    _panels(model, title, draw, path, colors, label="largest |cosine| with one before", whole=False, grid=None)


def plot_pruning(models: Sequence[ModelSpectra], path: Path) -> None:
    """Plot perplexity over the fraction of singular values dropped, a line per model."""
    with drawing(path, (7, 4), grid="both") as axes:
        for model in models:
            points = [(100 * p.dropped, p.perplexity) for p in model.points if math.isfinite(p.perplexity)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=model.label)
                axes.legend()
        axes.set(xlabel="singular values dropped, %", ylabel="perplexity", title="pruned by singular values")
        highest = [p.perplexity for model in models for p in model.points if math.isfinite(p.perplexity)]
        if highest and max(highest) > 10 * min(highest):
            axes.set_yscale("log")


def _layer_colors(model: ModelSpectra) -> Any:
    """Return the colors of the layers, from the first to the last."""
    layers = [layer for matrices in _by_kind(model.sigma).values() for layer, _ in matrices]
    return ScalarMappable(Normalize(min(layers), max(*layers, min(layers) + 1)), "viridis")


def _by_kind(names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """(layer, name) of the matrices of each kind: ``model.layers.3.self_attn.q_proj`` is a q_proj of layer 3."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
        kinds.setdefault(name.rpartition(".")[2], []).append((int(numbers[-1]) if numbers else 0, name))
    return kinds


def _panels(
    model: ModelSpectra,
    title: str,
    draw: Callable[[Any, list[tuple[int, str]]], None],
    path: Path,
    colors: Any,
    *,
    label: str = "layer",
    whole: bool = True,
    grid: str | None = "major",
) -> None:
    """One panel per kind of matrix, four in a row, and the bar of their common colors, in whole numbers or not."""
    kinds = _by_kind(model.sigma)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    with drawing(path, (3.4 * columns, 3 * rows + 0.5), rows=rows, columns=columns, grid=grid) as made:
        panels = np.ravel(made)
        for axes, (kind, matrices) in zip(panels, kinds.items(), strict=False):
            axes.set_title(kind, fontsize=10)
            draw(axes, matrices)
        for axes in panels[len(kinds) :]:
            axes.set_visible(False)
        figure = panels[0].figure
        ticks = MaxNLocator(5, integer=True) if whole else None
        figure.colorbar(colors, ax=panels.tolist(), label=label, ticks=ticks)
        figure.suptitle(title)
