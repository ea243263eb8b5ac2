"""Everything a graph run consists of, built from its configuration, saved and restored as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import optim
from lowrank_train import methods
from lowrank_train.checkpoint import Checkpoints
from lowrank_train.errors import UserError
from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.geometry import GEOMETRIES
from lowrank_train.hyperbolic.graph_config import GraphConfig
from lowrank_train.hyperbolic.graph_network import ACTIVATIONS, LINEAR_MAPS, GraphNetwork, NodeFeatures, with_degrees
from lowrank_train.hyperbolic.graph_splits import PROTOCOLS
from lowrank_train.hyperbolic.graph_tasks import TASKS, GraphTask
from lowrank_train.hyperbolic.graphs import Graph, components, depths, load_graph, with_binned_labels
from lowrank_train.hyperbolic.recipes import build_method
from lowrank_train.parallel import Ranks
from lowrank_train.parametrization import Parametrization

__all__ = ["GraphProgress", "GraphRun", "build_graph_run", "load_network", "network_arguments"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class GraphProgress:
    """Where a run stands; saved in every checkpoint."""

    epoch: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_selection: float = -1.0
    """What the best epoch was chosen by, on validation."""
    waiting: int = 0
    """Epochs since the best one."""
    finished: bool = False


@dataclass
class GraphRun:
    """Built once; the ``best`` network is kept beside the one in training."""

    config: GraphConfig
    folder: Path
    graph: Graph
    task: GraphTask
    features: NodeFeatures
    adjacency: Adjacency
    network: GraphNetwork
    layers: Parametrization
    """What its linear maps are made of."""
    optimizer: optim.MatrixOptimizer
    checkpoints: Checkpoints
    progress: GraphProgress = field(default_factory=GraphProgress)
    validation: dict[str, float] = field(default_factory=dict)
    """Scores of the best epoch."""
    test: dict[str, float] = field(default_factory=dict)
    """Likewise."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The network's state of the best epoch."""

    def points(self) -> Tensor:
        """Of all nodes, (n, width), by the network as it is; with dropout where it is in training."""
        points: Tensor = self.network(self.features, self.adjacency)
        return points

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        extra = {
            "progress": asdict(self.progress),
            "validation": self.validation,
            "test": self.test,
            "best": self.best,
            "random": {"cpu": torch.get_rng_state()},
        }
        self.checkpoints.save(self.progress.epoch, self.network, self.optimizer, extra, self.about)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now."""
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        extra = self.checkpoints.load(checkpoint, self.network, self.optimizer, self.about)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        self.progress = GraphProgress(**extra["progress"])
        self.validation, self.test, self.best = extra["validation"], extra["test"], extra["best"]
        torch.set_rng_state(extra["random"]["cpu"])

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        name = self.config.optimizer["name"]
        layers = {f"optimizer.{key}": value for key, value in methods.find(name).layer_settings(self.config.optimizer)}
        data = {
            f"data.{key}": value for key, value in asdict(self.config.data).items() if key not in ("folder", "root")
        }
        return {"optimizer.name": name, **layers, "model": asdict(self.config.model), **data, "sha1": self.graph.sha1}


def build_graph_run(config: GraphConfig, ranks: Ranks) -> GraphRun:
    """Graph, task, network, layers, optimizer.

    Raises:
        UserError: whatever of them cannot be had.
    """
    data, dtype = config.data, _DTYPES[config.precision]
    graph, task = _data(config)
    features = _row_normalized(graph.features) if data.normalize_features else graph.features
    if data.degree_features:
        features = with_degrees(features, task.known_edges)
    torch.manual_seed(config.seed)
    network = _network(config, features.shape[1], task.classes)
    layers, optimizer = build_method(network, config.optimizer, LINEAR_MAPS)
    folder = Path(str(config.run_dir))
    checkpoints = Checkpoints(folder / "checkpoints", ranks, keep=2, asynchronous=False)
    torch.manual_seed(config.seed)  # dropout and negatives are the same for all methods
    adjacency = Adjacency(task.known_edges, graph.nodes, dtype)
    entered = NodeFeatures(network.geometry.enter(features.to(dtype)))
    return GraphRun(config, folder, graph, task, entered, adjacency, network, layers, optimizer, checkpoints)


def load_network(folder: Path) -> GraphNetwork:
    """The trained, plain network (``nn.Linear`` throughout) that a finished run left in its folder, for evaluation.

    Raises UserError if there is none.
    """
    try:
        saved = torch.load(folder / "network.pt", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {folder / 'network.pt'}: {error}; expected the run_dir of a finished run"
        ) from None
    about = saved["network"]
    geometry = GEOMETRIES[about.pop("geometry")](about.pop("curvature"))
    activation = ACTIVATIONS[about.pop("activation")]
    network = GraphNetwork(geometry, about.pop("features"), activation=activation, **about)
    network.to(_DTYPES[saved["precision"]]).load_state_dict(saved["state"])
    return network.eval()


def network_arguments(run: GraphRun) -> dict[str, Any]:
    """What ``load_network`` builds it from, beside the weights."""
    features = run.features.points.shape[1] - run.network.geometry.extra
    return {**asdict(run.config.model), "features": features, "classes": run.task.classes}


def _network(config: GraphConfig, features: int, classes: int | None) -> GraphNetwork:
    model = config.model
    network = GraphNetwork(
        GEOMETRIES[model.geometry](model.curvature),
        features,
        width=model.width,
        convolutions=model.convolutions,
        classes=classes,
        dropout=model.dropout,
        activation=ACTIVATIONS[model.activation],
        attention=model.attention,
    )
    return network.to(_DTYPES[config.precision])


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
