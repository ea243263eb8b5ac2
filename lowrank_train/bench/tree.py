"""A tree embedded in hyperbolic space: Riemannian AdamW with whole and low-rank moments, and geoopt's, side by side.

After section 4.1 of Nickel & Kiela (arXiv 1806.03417): the loss of an edge (u, v) is cross-entropy of -d(u, .) over v
and 10 drawn nodes, the score mean average precision, over all nodes u, of its neighbours among all nodes by distance.
Here: a tree whose nodes have three children, its edges in both directions, all of them at every step, on a hyperboloid
of 16 dimensions in float32 unless said otherwise. Every method gets the same learning rates, and the best of them by
mean score over the seeds. A run that became not a number scores 0.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_train import optim
from lowrank_train.bench.grid import Grid, Group, Row, failures, groups, sweep_arguments, sweep_panel, table
from lowrank_train.bench.report import Report, origin, output_folder, publish, rate
from lowrank_train.bench.trainings import Trainer, keep_record
from lowrank_train.common.record import provenance
from lowrank_train.config.settings import setting

__all__ = ["METHODS", "TreeConfig", "embed_tree", "mean_average_precision", "measure", "report", "tree_edges"]

DIMENSIONS, CHILDREN, NEGATIVES, REFRESH_INTERVAL = 16, 3, 10, 50

FIGURES = ("score", "loss", "off", "state_bytes", "step_ms")


@dataclass
class TreeConfig:
    """One training."""

    method: str = setting("riemannian_adamw", "one of METHODS")
    lr: float = setting(0.1, "learning rate, constant")
    seed: int = setting(0, "of initial points and of the drawn nodes")
    depth: int = setting(5, "generations of the tree below its root")
    steps: int = setting(600, "updates")
    run_dir: str | None = setting(None, "folder of the record", path=True)


def _ours(rank: int | None) -> Callable[[Tensor, float], tuple[Tensor, torch.optim.Optimizer]]:
    def build(points: Tensor, lr: float) -> tuple[Tensor, torch.optim.Optimizer]:
        param = nn.Parameter(points)
        groups = [{"params": [param], "manifold": ("lorentz", 1.0)}]
        settings: dict[str, Any] = {"point_rank": rank, "point_refresh_interval": REFRESH_INTERVAL}
        return param, optim.RiemannianAdamW(groups, lr=lr, **settings)

    return build


def _geoopt(dtype: torch.dtype) -> Callable[[Tensor, float], tuple[Tensor, torch.optim.Optimizer]]:
    def build(points: Tensor, lr: float) -> tuple[Tensor, torch.optim.Optimizer]:
        space = points[:, 1:].to(dtype)
        points = torch.cat([(1 + space.square().sum(1, keepdim=True)).sqrt(), space], dim=1)
        manifold = geoopt.Lorentz(torch.ones((), dtype=dtype))
        param = geoopt.ManifoldParameter(points, manifold=manifold)
        return param, geoopt.optim.RiemannianAdam([param], lr=lr, stabilize=10)

    return build


METHODS: dict[str, Callable[[Tensor, float], tuple[Tensor, torch.optim.Optimizer]]] = {
    "riemannian_adamw": _ours(None),
    "point_rank=8": _ours(8),
    "point_rank=4": _ours(4),
    "point_rank=2": _ours(2),
    "geoopt": _geoopt(torch.float32),
    "geoopt, float64": _geoopt(torch.float64),
}
"""Parameter and optimizer from points and a learning rate."""


def tree_edges(depth: int) -> Tensor:
    """Return pairs (e, 2) of neighbours, in both directions, of a tree of ``depth`` generations below its root."""
    nodes = sum(CHILDREN**level for level in range(depth + 1))
    children = torch.arange(1, nodes)
    pairs = torch.stack([children, (children - 1) // CHILDREN], dim=1)
    return torch.cat([pairs, pairs.flip(1)])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """On the hyperboloid <x, x> = -1, of points (..., d) broadcast together."""
    return torch.acosh((x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1)).clamp_min(1 + 1e-6))


def mean_average_precision(points: Tensor, edges: Tensor) -> float:
    """Return the mean average precision, in per cent, of every node's neighbours; points (n, d)."""
    points, n = points.double(), len(points)
    neighbours = torch.zeros(n, n, dtype=torch.bool)
    neighbours[edges[:, 0], edges[:, 1]] = True
    product = points[:, :1] @ points[:, :1].mT - points[:, 1:] @ points[:, 1:].mT
    order = product.fill_diagonal_(torch.inf).argsort(dim=1)
    hits = neighbours.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, n + 1)
    return 100 * float(((precision * hits).sum(1) / hits.sum(1)).mean())


def embed_tree(config: TreeConfig) -> dict[str, float]:
    """Train one method.

    Returns:
        ``score`` in per cent; ``loss``, of the last step; ``off``, largest |<x, x> + 1| / x_0^2 of a
        stored point; ``state_bytes``; ``step_ms``, median time of an update. Of a run that became not a number,
        ``score`` is 0.
    """
    edges, generator = tree_edges(config.depth), torch.Generator().manual_seed(config.seed)
    nodes = int(edges.max()) + 1
    space = 0.01 * torch.randn(nodes, DIMENSIONS, generator=generator)
    points = torch.cat([(1 + space.square().sum(1, keepdim=True)).sqrt(), space], 1)
    param, optimizer = METHODS[config.method](points, config.lr)
    times = []
    for _ in range(config.steps):
        drawn = torch.randint(nodes, (len(edges), NEGATIVES), generator=generator)
        points = param.as_subclass(Tensor)
        candidates = points[torch.cat([edges[:, 1:], drawn], dim=1)]
        scores = -distances(points[edges[:, :1]], candidates)
        loss = functional.cross_entropy(scores, torch.zeros(len(edges), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    final = param.detach().as_subclass(Tensor)
    whole = final.double()
    off = float(((whole[:, 1:].square().sum(1) + 1) / whole[:, 0].square() - 1).abs().max())
    score = mean_average_precision(final, edges) if final.isfinite().all() else 0.0
    return {
        "score": score,
        "loss": float(loss.detach()),
        "off": off,
        "state_bytes": optim.state_bytes(optimizer),
        "step_ms": 1e3 * statistics.median(times),
    }


def measure(arguments: Sequence[str]) -> str:
    """Train every method at every rate and seed ``arguments`` ask for; write tree.json, .md and .png into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: numbers out of range, an unwritable folder; a training in it was made with other settings.
    """
    counts = {"depth": (5, "generations of the tree; default: 5, 364 nodes"), "steps": (600, "default: 600")}
    given = sweep_arguments(arguments, "tree", __doc__, counts, [3e-2, 1e-1, 3e-1])
    folder = output_folder(given.out)

    def config(method: str, lr: float, seed: int) -> TreeConfig:
        run_dir = folder / f"{method}-lr={rate(lr)}-seed={seed}"
        return TreeConfig(method, lr, seed, given.depth, given.steps, str(run_dir))

    grid = Grid(
        rows=[Row({"method": method}, given.lr, given.seeds) for method in METHODS],
        config=config,
        trainer=Trainer(lambda config: keep_record(config, embed_tree(config)), needs=FIGURES),
    )
    runs = [result.run() for result in grid.train()]
    about = {"provenance": provenance(torch.device("cpu")), "geoopt": geoopt.__version__}
    figures = {"what": __doc__, **about, **vars(given), "runs": runs}
    return publish(folder, "tree", figures, report(figures))


def report(figures: Mapping[str, Any]) -> Report:
    """Return what tree.md shows, from the figures of tree.json."""
    rows = groups(figures["runs"], "method", score=lambda run: run["score"])
    head = ["method", "precision, %", "of each seed", "loss", "lr", "state, bytes", "step, ms", "off the manifold"]

    def cells(row: Group) -> list[str]:
        scores = ", ".join(f"{score:.1f}" for score in row.values("score"))
        learned = [f"{row.mean('score'):.2f}", scores, f"{row.mean('loss'):.3f}", f"{row.rate:g}"]
        cost = [f"{row.values('state_bytes')[0]:,}", f"{row.mean('step_ms'):.2f}"]
        return [*learned, *cost, f"{max(row.values('off')):.1e}"]

    notes = [*failures(figures["runs"]), f"geoopt {figures['geoopt']}. {origin(figures['provenance'])}"]
    panel = sweep_panel("mean average precision, %", {row.label: (row.rates, row.scores) for row in rows})
    return Report("A tree in hyperbolic space", table(head, rows, cells), notes, [panel])
