"""The end of a graph run for people: a table, curves, a picture of the points, distance to the root against depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.patches import Circle
from torch import Tensor

from lowrank_train.hyperbolic.graphs.data import depths, middle
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.run import GraphRun
from lowrank_train.reports import drawing, plot_metric, write_table
from lowrank_train.train.metrics import read_metrics

__all__ = ["SCORE_NAMES", "spearman", "write_graph_report"]

SCORE_NAMES = {"roc_auc": "ROC AUC", "ap": "average precision", "f1": "F1 (micro)"}
"""Score -> what tables call it."""

_MOST_EDGES = 30_000
"""More are not drawn."""


def write_graph_report(record: GraphRecord, run: GraphRun, points: Tensor) -> str:
    """Write record.json, points.npz, three plots and report.md into the run folder; returns the table as text.

    ``points`` (n, width) are those of the best epoch.
    """
    folder, geometry = run.folder, run.model.geometry
    root = middle(run.graph) if run.config.data.root is None else run.config.data.root
    depth = depths(run.graph, root)
    reached = depth >= 0
    distances = geometry.distance(points.double(), points.double()[root])
    record.depth_correlation = spearman(distances[reached], depth[reached])
    record.write(folder / "record.json")
    arrays = {"points": points.numpy(), "depth": depth.numpy(), "distance_to_root": distances.numpy()}
    if run.graph.labels is not None:
        arrays["labels"] = run.graph.labels.numpy()
    np.savez_compressed(folder / "points.npz", allow_pickle=False, **arrays)

    _plot_curves(read_metrics(folder), folder / "curves.png")
    _plot_points(run, geometry.picture(points), depth, folder / "points.png")
    _plot_depth(distances[reached], depth[reached], root, record, folder / "depth.png")

    rows = _summary(record, run, root)
    pictures = ["![curves](curves.png)", "![points](points.png)", "![depth](depth.png)"]
    return write_table(folder, rows, pictures, record.provenance, record.how)


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Return the correlation of ranks of two (n,), equal values at their mean rank; None where all values of one are
    equal.
    """
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(centred, dim=1)
    return float(centred[0] @ centred[1] / lengths.prod()) if bool((lengths > 0).all()) else None


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]


def _summary(record: GraphRecord, run: GraphRun, root: int) -> list[tuple[str, str]]:
    data, folder = record.data, run.folder
    parts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in run.task.facts().items())
    rows = [
        ("status", record.status),
        ("graph", f"{record.graph}, {data['nodes']:,} nodes, {data['edges']:,} edges"),
        ("task", f"{record.task.replace('_', ' ')}, **{record.protocol} protocol**: {parts}"),
        ("space", f"{record.geometry}, {run.config.model.width} coordinates"),
        ("optimizer", ", ".join(f"{key} {value}" for key, value in record.optimizer.items())),
    ]
    rows += [(f"test {SCORE_NAMES[name]}", f"{100 * score:.2f} %") for name, score in record.test.items()]
    rows += [(f"validation {SCORE_NAMES[name]}", f"{100 * score:.2f} %") for name, score in record.validation.items()]
    share = record.trainable_parameters / record.parameters
    correlation = "undefined" if record.depth_correlation is None else f"{record.depth_correlation:.3f}"
    return [
        *rows,
        ("epochs", f"{record.epochs:,}, best on validation: {record.best_epoch:,}"),
        ("time", f"{record.seconds:.0f} s"),
        ("trainable parameters", f"{record.trainable_parameters:,} ({100 * share:.0f} % of {record.parameters:,})"),
        (
            "farthest off the manifold",
            f"{record.manifold_error:.1e} (largest |<x, x> / k + 1|); {record.time_error:.1e} of its x_0",
        ),
        ("distance and depth", f"rank correlation {correlation}, root {root}"),
        ("optimizer state", f"{record.optimizer_state_bytes:,} bytes"),
        ("TensorBoard", f"tensorboard --logdir {folder / 'tensorboard'}"),
        ("report", str(folder / "report.md")),
    ]


def _plot_curves(rows: list[dict[str, Any]], path: Any) -> None:
    with drawing(path, (9, 3.5), columns=2) as (left, right):
        plot_metric(left, rows, "train/loss", linewidth=0.8)
        left.set(xlabel="epoch", ylabel="training loss")
        for name, label in SCORE_NAMES.items():
            plot_metric(right, rows, f"eval/{name}", linewidth=0.8, label=label)
        right.set(xlabel="epoch", ylabel="score on validation")


def _plot_points(run: GraphRun, places: Tensor, depth: Tensor, path: Any) -> None:
    """Coloured by class where the task has classes, else by depth."""
    at, edges = places.numpy(), run.graph.edges
    by_class = run.task.classes is not None and run.graph.labels is not None
    colours = run.graph.labels if by_class else depth
    assert colours is not None
    with drawing(path, (6.5, 6), grid=None, dpi=130) as axes:
        if len(edges) <= _MOST_EDGES:
            axes.add_collection(LineCollection(at[edges.numpy()], colors="grey", linewidths=0.2, alpha=0.4))
        shown = axes.scatter(
            at[:, 0], at[:, 1], c=colours.numpy(), s=4, cmap="tab10" if by_class else "viridis", zorder=2
        )
        label = "class" if by_class else "depth below the root"
        axes.figure.colorbar(shown, ax=axes, shrink=0.7, label=label, ticks=colours.unique().tolist())
        if run.model.geometry.extra:  # the edge of the world
            axes.add_patch(Circle((0, 0), 1, fill=False, color="black", linewidth=0.8))
            axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), title="Poincare disk, two principal directions")
        else:
            axes.autoscale_view()
            axes.set_title("two principal components")
        axes.set_aspect("equal")
        axes.set_axis_off()


def _plot_depth(distances: Tensor, depth: Tensor, root: int, record: GraphRecord, path: Any) -> None:
    levels = [int(level) for level in depth.unique()]
    at_levels = [distances[depth == level].numpy() for level in levels]
    correlation = "" if record.depth_correlation is None else f", rank correlation {record.depth_correlation:.3f}"
    with drawing(path, (6, 4)) as axes:
        axes.boxplot(at_levels, positions=levels, widths=0.6, whis=(5, 95), sym="")
        axes.set(
            xlabel=f"depth below the root (node {root}), edges",
            ylabel="distance to the root's point",
            title=f"{record.graph}, {record.geometry}{correlation}",
        )
