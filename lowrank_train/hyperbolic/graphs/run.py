"""Everything a graph run consists of, built from its configuration, saved and restored as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.graphs.config import GraphConfig, GraphModelConfig
from lowrank_train.hyperbolic.graphs.data import Graph, components, depths, load_graph, with_binned_labels
from lowrank_train.hyperbolic.graphs.network import LINEAR_MAPS, GraphNetwork, NodeFeatures, with_degrees
from lowrank_train.hyperbolic.graphs.splits import PROTOCOLS
from lowrank_train.hyperbolic.graphs.tasks import TASKS, GraphTask
from lowrank_train.hyperbolic.recipes import build_method
from lowrank_train.hyperbolic.run import DTYPES, NetworkRun, Progress, load_saved, saved_model
from lowrank_train.train.checkpoint import Checkpoints

__all__ = ["GraphRun", "build_graph_run", "load_network"]


@dataclass
class GraphProgress(Progress):
    """Of epochs; the network of the best one is kept beside the one in training."""

    best_epoch: int = 0
    best_selection: float = -1.0
    """What the best epoch was chosen by, on validation."""
    waiting: int = 0
    """Epochs since the best one."""
    finished: bool = False
    validation: dict[str, float] = field(default_factory=dict)
    """Scores of the best epoch."""
    test: dict[str, float] = field(default_factory=dict)
    """Scores of the same epoch on the test part."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The network's state of the best epoch."""


@dataclass
class GraphRun(NetworkRun):
    """Built once."""

    unit = "epoch"

    config: GraphConfig
    model: GraphNetwork
    progress: GraphProgress
    graph: Graph
    task: GraphTask
    features: NodeFeatures
    adjacency: Adjacency

    def points(self) -> Tensor:
        """Return the points of all nodes, (n, width), by the network as it is; with dropout where it is in training."""
        points: Tensor = self.model(self.features, self.adjacency)
        return points

    @property
    def steps(self) -> int:
        """Epochs, at most."""
        return self.config.epochs

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has not become better for long."""
        return self.progress.finished

    def arguments(self) -> dict[str, Any]:
        """Return what ``load_network`` builds the network from, beside its weights."""
        features = self.features.points.shape[1] - self.model.geometry.extra
        return {**asdict(self.config.model), "features": features, "classes": self.task.classes}

    def greeting(self) -> str:
        """Return what is trained."""
        data, graph = self.config.data, self.graph
        task = f"{data.graph}, {data.task.replace('_', ' ')}, {data.protocol} protocol"
        return f"{task}: {graph.nodes:,} nodes, {len(graph.edges):,} edges; {self.config.model.geometry}"


def build_graph_run(config: GraphConfig, ranks: Ranks) -> GraphRun:
    """Build graph, task, network, layers and optimizer.

    Raises:
        UserError: whatever of them cannot be had.
    """
    data, dtype = config.data, DTYPES[config.precision]
    graph, task = _data(config)
    features = _row_normalized(graph.features) if data.normalize_features else graph.features
    if data.degree_features:
        features = with_degrees(features, task.known_edges)
    torch.manual_seed(config.seed)
    network = GraphNetwork(config.model, features.shape[1], task.classes).to(dtype)
    layers, optimizer = build_method(network, config.optimizer, LINEAR_MAPS)
    folder = Path(str(config.run_dir))
    checkpoints = Checkpoints(folder / "checkpoints", ranks, every=config.checkpoint_every, keep=2, asynchronous=False)
    torch.manual_seed(config.seed)  # dropout and negatives are the same for all methods
    adjacency = Adjacency(task.known_edges, graph.nodes, dtype)
    entered = NodeFeatures(network.geometry.enter(features.to(dtype)))
    return GraphRun(
        config=config,
        folder=folder,
        ranks=ranks,
        model=network,
        layers=layers,
        optimizer=optimizer,
        checkpoints=checkpoints,
        progress=GraphProgress(),
        sha1=graph.sha1,
        graph=graph,
        task=task,
        features=entered,
        adjacency=adjacency,
    )


def load_network(folder: Path) -> GraphNetwork:
    """Load the trained, plain network (``nn.Linear`` throughout) that a finished run left in its folder, for
    evaluation.

    Raises UserError if there is none, or it is of another version.
    """

    def build(about: dict[str, Any]) -> GraphNetwork:
        features, classes = about.pop("features"), about.pop("classes")
        return GraphNetwork(saved_model(GraphModelConfig, about), features, classes)

    return load_saved(folder, build)


def _data(config: GraphConfig) -> tuple[Graph, GraphTask]:
    data = config.data
    graph = load_graph(data.folder, data.graph)
    kind = TASKS[data.task]
    if data.label_column is not None and kind.needs_labels:
        graph = with_binned_labels(graph, data.label_column, data.label_bins)
    if data.root is not None:
        depths(graph, data.root)  # raises now rather than at the end
    pieces = components(graph)
    if data.connected and len(pieces) > 1:
        raise UserError(
            f"{graph.name} is not connected: {len(pieces)} pieces, of {pieces[0]:,}, {pieces[1]:,}"
            f"{', ...' if len(pieces) > 2 else ''} nodes; expected one. If edges are missing, mend the file; if it is "
            "as it should be, set data.connected=false"
        )
    validation = kind.validation_share if data.validation_share is None else data.validation_share
    test = kind.test_share if data.test_share is None else data.test_share
    return graph, kind(graph, PROTOCOLS[data.protocol](validation, test, data.split_seed))


def _row_normalized(features: Tensor) -> Tensor:
    """Rows divided by their sums; rows whose sum is zero become zero."""
    sums = features.sum(1, keepdim=True)
    return torch.where(sums != 0, features / sums, 0.0)
