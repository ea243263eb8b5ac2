"""Losses of graph tasks, against the formulas one pair and one node at a time."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.hyperbolic.graphs.config import GraphModelConfig
from lowrank_train.hyperbolic.graphs.network import GraphNetwork
from lowrank_train.hyperbolic.graphs.splits import PROTOCOLS
from lowrank_train.hyperbolic.graphs.tasks import LinkPrediction, NodeClassification
from lowrank_train.hyperbolic.spaces import SPACES
from tests.hyperbolic.helpers import tree

WIDTH = 4


def network_and_points(geometry: str, nodes: int, classes: int | None) -> tuple[GraphNetwork, torch.Tensor]:
    torch.manual_seed(0)
    model = GraphModelConfig(geometry, width=WIDTH, convolutions=1)  # type: ignore[arg-type]
    network = GraphNetwork(model, 9, classes).double()
    space = network.geometry
    return network, space.enter(torch.randn(nodes, WIDTH - space.extra, dtype=torch.float64))


@pytest.mark.parametrize("geometry", SPACES)
def test_loss_of_links(geometry: str) -> None:
    """HyboNet's: the mean over both scores of every pair of edge and negative, less the margin the edge itself adds."""
    task = LinkPrediction(tree(), PROTOCOLS["clean"](0.1, 0.3, 0))
    network, points = network_and_points(geometry, 121, None)
    torch.manual_seed(1)
    loss = float(task.loss(network, points, 2.0))
    torch.manual_seed(1)
    negatives = task.split.negatives()
    total = 0.0
    for edge, negative in zip(task.split.train, negatives, strict=True):
        right, wrong = (
            -float(network.geometry.distance(points[a], points[b]).square())
            if geometry == "euclidean"
            else float(2 + 2 * (points[a, 1:] @ points[b, 1:] - points[a, 0] * points[b, 0]))
            for a, b in (edge.tolist(), negative.tolist())
        )
        total += sum(max(0.0, 2.0 - right + score) for score in (right, wrong)) - 2.0
    assert loss == pytest.approx(total / (2 * len(negatives)), rel=1e-9)


@pytest.mark.parametrize("geometry", SPACES)
def test_loss_of_nodes(geometry: str) -> None:
    """HyboNet's: the mean over the scores of all classes, less the margin that the right one adds."""
    task = NodeClassification(tree(), PROTOCOLS["clean"](0.1, 0.3, 0))
    network, points = network_and_points(geometry, 121, task.classes)
    loss = float(task.loss(network, points, 2.0).detach())
    terms = []
    for node in task.split.train.tolist():
        scores, label = network.class_scores(points[node : node + 1])[0].tolist(), int(task.labels[node])
        terms += [max(0.0, 2.0 - scores[label] + score) if i != label else 0.0 for i, score in enumerate(scores)]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-9)
