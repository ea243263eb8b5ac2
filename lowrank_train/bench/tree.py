"""A tree embedded in hyperbolic space: Riemannian AdamW with whole and low-rank moments, and geoopt's, side by side.

After section 4.1 of Nickel & Kiela (arXiv 1806.03417): the loss of an edge (u, v) is cross-entropy of -d(u, .) over v
and 10 drawn nodes, the score mean average precision, over all nodes u, of its neighbours among all nodes by distance.
Here: a tree whose nodes have three children, its edges in both directions, all of them at every step, on a hyperboloid
of 16 dimensions in float32 unless said otherwise. Every method gets the same learning rates, and the best of them by
mean score over the seeds. A run that became not a number scores 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_train import optim
from lowrank_train.bench.optimizer_step import output_folder, positive
from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.record import provenance
from lowrank_train.common.small_files import write_text

__all__ = ["METHODS", "embed_tree", "mean_average_precision", "measure_tree", "tree_edges"]

DIMENSIONS, CHILDREN, NEGATIVES, REFRESH_INTERVAL = 16, 3, 10, 50


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
    """Pairs (e, 2) of neighbours, in both directions, of a tree of ``depth`` generations below its root."""
    nodes = sum(CHILDREN**level for level in range(depth + 1))
    children = torch.arange(1, nodes)
    pairs = torch.stack([children, (children - 1) // CHILDREN], dim=1)
    return torch.cat([pairs, pairs.flip(1)])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """On the hyperboloid <x, x> = -1, of points (..., d) broadcast together."""
    return torch.acosh((x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1)).clamp_min(1 + 1e-6))


def mean_average_precision(points: Tensor, edges: Tensor) -> float:
    """Of every node's neighbours among all other nodes, the nearest first, in per cent; points (n, d)."""
    points, n = points.double(), len(points)
    neighbours = torch.zeros(n, n, dtype=torch.bool)
    neighbours[edges[:, 0], edges[:, 1]] = True
    product = points[:, :1] @ points[:, :1].mT - points[:, 1:] @ points[:, 1:].mT
    order = product.fill_diagonal_(torch.inf).argsort(dim=1)
    hits = neighbours.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, n + 1)
    return 100 * float(((precision * hits).sum(1) / hits.sum(1)).mean())


def embed_tree(name: str, depth: int, *, lr: float, steps: int, seed: int) -> dict[str, float]:
    """Train one method.

    Args:
        name: one of ``METHODS``.
        depth: of the tree, in generations.
        lr: learning rate, constant.
        steps: updates.
        seed: of initial points and of the drawn nodes.

    Returns:
        ``score`` in per cent; ``loss``, of the last step; ``off``, largest |<x, x> + 1| / x_0^2 of a
        stored point; ``state_bytes``; ``step_ms``, median time of an update. Of a run that became not a number,
        ``score`` is 0.
    """
    edges, generator = tree_edges(depth), torch.Generator().manual_seed(seed)
    nodes = int(edges.max()) + 1
    space = 0.01 * torch.randn(nodes, DIMENSIONS, generator=generator)
    param, optimizer = METHODS[name](torch.cat([(1 + space.square().sum(1, keepdim=True)).sqrt(), space], 1), lr)
    times = []
    for _ in range(steps):
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


def measure_tree(arguments: Sequence[str]) -> str:
    """Train every method at every rate and seed ``arguments`` ask for; write tree.json and tree.md into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: numbers out of range, an unwritable folder.
    """
    parser = argparse.ArgumentParser(prog="launch/benchmark.py tree", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=5, help="generations of the tree; default: 5, 364 nodes")
    parser.add_argument("--steps", type=int, default=600, help="default: 600")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-2, 1e-1, 3e-1], help="default: 0.03 0.1 0.3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", default="runs/tree", help="folder of tree.json and tree.md")
    given = parser.parse_args(arguments)
    positive("--depth", given.depth)
    positive("--steps", given.steps)
    if not all(0 < lr < math.inf for lr in given.lr):
        raise UserError(f"--lr {' '.join(map(str, given.lr))}; expected numbers > 0")
    folder = output_folder(given.out)
    jobs = [(name, lr, seed) for name in METHODS for lr in given.lr for seed in given.seeds]
    runs: list[dict[str, Any]] = []
    for name, lr, seed in show_progress(jobs, "training", "runs", active=True):
        found = embed_tree(name, given.depth, lr=lr, steps=given.steps, seed=seed)
        runs.append({"method": name, "lr": lr, "seed": seed, **found})
    about = {"provenance": provenance(torch.device("cpu")), "geoopt": geoopt.__version__}
    finite = [{key: None if value != value else value for key, value in run.items()} for run in runs]
    figures = {"what": __doc__, **about, **vars(given), "runs": finite}  # JSON has no nan
    write_text(folder / "tree.json", json.dumps(figures, indent=2) + "\n")
    table = _table(runs, given.lr)
    write_text(folder / "tree.md", f"# A tree in hyperbolic space\n\n{table}\n")
    return table


def _table(runs: list[dict[str, Any]], rates: Sequence[float]) -> str:
    lines = ["| method | precision, % | of each seed | loss | lr | state, bytes | step, ms | off the manifold |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in METHODS:
        by_rate = {lr: [run for run in runs if run["method"] == name and run["lr"] == lr] for lr in rates}
        best = max(rates, key=lambda lr: statistics.mean(run["score"] for run in by_rate[lr]))
        own = by_rate[best]
        scores = ", ".join(f"{run['score']:.1f}" for run in own)
        mean, loss, step = (statistics.mean(run[key] for run in own) for key in ("score", "loss", "step_ms"))
        off = max(run["off"] for run in own)
        state = f"{own[0]['state_bytes']:,}"
        lines.append(f"| {name} | {mean:.2f} | {scores} | {loss:.3f} | {best:g} | {state} | {step:.2f} | {off:.1e} |")
    return "\n".join(lines)
