"""Small trees as files, and graph runs in forked processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.data import Graph, make_graph
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.tasks import LinkPrediction
from lowrank_train.hyperbolic.graphs.train import train_graph
from lowrank_train.hyperbolic.recipes import load_recipe
from tests.distributed import run_distributed

LEVELS, CHILDREN = 4, 3


def tree_edges(levels: int = LEVELS, children: int = CHILDREN) -> np.ndarray:
    """Of a full tree, node 0 its root, level by level: (n - 1, 2)."""
    nodes = sum(children**level for level in range(levels + 1))
    return np.array([((child - 1) // children, child) for child in range(1, nodes)])


def tree_arrays() -> dict[str, np.ndarray]:
    """121 nodes; the class is the child of the root they are below, features say which grandchild, with noise."""
    edges = tree_edges()
    nodes = len(edges) + 1
    child, grandchild = np.zeros(nodes, dtype=np.int64), np.zeros(nodes, dtype=np.int64)
    for parent, node in edges.tolist():
        child[node] = node - 1 if parent == 0 else child[parent]
        grandchild[node] = node - 4 if 4 <= node < 13 else grandchild[parent]
    features = np.random.default_rng(0).normal(size=(nodes, 9), scale=0.3) + np.eye(9)[grandchild]
    return {"edges": edges, "features": features, "labels": child}


def tree() -> Graph:
    arrays = tree_arrays()
    return make_graph("tree", **arrays)


def tree_folder(folder: Path) -> Path:
    """Holds tree.npz."""
    np.savez(folder / "tree.npz", **tree_arrays())
    return folder


def words(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of 30 epochs on the tree."""
    return [
        f"data.folder={folder}",
        "data.graph=tree",
        "data.normalize_features=false",
        "data.validation_share=0.1",
        "model.width=6",
        "optimizer.lr=0.03",
        "epochs=30",
        "checkpoint_every=10",
        "log_every=1",
        f"run_dir={run_dir}",
        *more,
    ]


def train(
    arguments: Sequence[str], before: Callable[[], None] | None = None, *, plot: bool = False, world_size: int = 1
) -> GraphRecord:
    """Train in a forked process, after calling ``before`` in it."""
    records: list[GraphRecord] = run_distributed(_train, world_size, list(arguments), before, plot)
    return records[0]


def failure(arguments: Sequence[str], before: Callable[[], None] | None = None, *, world_size: int = 1) -> str:
    """The message of the UserError that the run raises."""
    message = run_distributed(_fail, world_size, list(arguments), before)[0]
    assert message is not None, "training was expected to fail"
    return str(message)


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """For ``train``: act when the loss of link prediction is computed for the n-th time in that process."""

    def install() -> None:
        original, calls = LinkPrediction.loss, [0]

        def loss(self: LinkPrediction, *arguments: object) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == number:
                act()
            return original(self, *arguments)  # type: ignore[arg-type]

        LinkPrediction.loss = loss  # type: ignore[method-assign, assignment]

    return install


def _train(arguments: list[str], before: Callable[[], None] | None, plot: bool) -> GraphRecord:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    if not plot:  # drawing takes longer than thirty tiny epochs
        Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    if before is not None:
        before()
    return train_graph(load_recipe(GraphConfig, arguments))


def _fail(arguments: list[str], before: Callable[[], None] | None) -> str | None:
    try:
        _train(arguments, before, plot=False)
    except UserError as error:
        return str(error)
    return None
