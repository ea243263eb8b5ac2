"""What a graph network is trained and judged by: classes of nodes, or links between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_train.hyperbolic.graphs.data import Graph
from lowrank_train.hyperbolic.graphs.network import GraphNetwork
from lowrank_train.hyperbolic.graphs.scores import average_precision, micro_f1, roc_auc
from lowrank_train.hyperbolic.graphs.splits import EdgeSplit, NodeSplit, Protocol

__all__ = ["TASKS", "GraphTask", "LinkPrediction", "NodeClassification"]


class GraphTask(ABC):
    """Abstract: the parts of a graph, the loss on one and the scores on the others.

    Args:
        graph: with labels, where the task needs them.
        protocol: draws the parts.

    Raises:
        UserError: as the protocol.
    """

    validation_share: float
    """Unless ``data.validation_share`` says otherwise."""
    test_share: float
    needs_labels: bool
    headline: str
    """The score that tables are sorted by and runs are judged by."""

    @abstractmethod
    def __init__(self, graph: Graph, protocol: Protocol) -> None: ...

    known_edges: Tensor
    """(E, 2), those the network may see."""
    classes: int | None = None
    """How many classes nodes have, where they have labels."""

    @abstractmethod
    def loss(self, network: GraphNetwork, x: Tensor, margin: float) -> Tensor:
        """Return the loss of the training part for points (n, width); it may draw random numbers."""

    @abstractmethod
    def scores(self, network: GraphNetwork, x: Tensor, part: str) -> dict[str, float]:
        """Return the scores on ``validation`` or ``test``, each from 0 to 1."""

    @abstractmethod
    def selection(self, scores: Mapping[str, float]) -> float:
        """Return what the best epoch is chosen by, higher is better, from the scores on validation."""

    @abstractmethod
    def facts(self) -> dict[str, int]:
        """Return sizes of the parts, and how they overlap."""


class NodeClassification(GraphTask):
    """Which class a node is of; all edges are known.

    Loss: mean of max(0, margin - score of the right class + score of each other class).
    """

    validation_share, test_share = 0.15, 0.15
    needs_labels = True
    headline = "f1"

    def __init__(self, graph: Graph, protocol: Protocol) -> None:
        self.split: NodeSplit = protocol.nodes(graph)
        assert graph.labels is not None
        self.labels = graph.labels
        self.known_edges = graph.edges
        self.classes = int(graph.labels.max()) + 1

    def loss(self, network: GraphNetwork, x: Tensor, margin: float) -> Tensor:
        """Return the loss over training nodes."""
        scores = network.class_scores(x[self.split.train])
        right = self.labels[self.split.train].unsqueeze(1)
        misses = torch.relu(margin - scores.gather(1, right) + scores)
        return misses.scatter(1, right, 0.0).mean()

    def scores(self, network: GraphNetwork, x: Tensor, part: str) -> dict[str, float]:
        """Return F1, micro-averaged."""
        nodes = {"validation": self.split.validation, "test": self.split.test}[part]
        return {"f1": micro_f1(network.class_scores(x[nodes]), self.labels[nodes])}

    def selection(self, scores: Mapping[str, float]) -> float:
        """Return F1."""
        return scores["f1"]

    def facts(self) -> dict[str, int]:
        """Count nodes, again where a protocol lists them again."""
        parts = {"train": self.split.train, "validation": self.split.validation, "test": self.split.test}
        sizes = {f"{part}_nodes": len(nodes) for part, nodes in parts.items()}
        return {
            **sizes,
            "different_test_nodes": len(self.split.test.unique()),
            "of_them_trained": self.split.trained_on,
        }


class LinkPrediction(GraphTask):
    """Which pairs of nodes are edges; those of validation and test are not known.

    Loss: mean over training edges of max(0, margin - score of the edge + score of a random negative) / 2. The half is
    HyboNet's, whose mean counts the score of the edge beside that of the negative; clipping depends on it.
    """

    validation_share, test_share = 0.05, 0.10
    needs_labels = False
    headline = "ap"

    def __init__(self, graph: Graph, protocol: Protocol) -> None:
        self.split: EdgeSplit = protocol.edges(graph)
        self.known_edges = self.split.train

    def loss(self, network: GraphNetwork, x: Tensor, margin: float) -> Tensor:
        """Return the loss, with negatives drawn anew each time."""
        pairs = torch.cat([self.split.train, self.split.negatives()])
        positive, negative = network.pair_scores(x, pairs).chunk(2)
        return torch.relu(margin - positive + negative).mean() / 2

    def scores(self, network: GraphNetwork, x: Tensor, part: str) -> dict[str, float]:
        """Return ROC AUC and average precision over the edges of the part and as many negatives."""
        split = self.split
        parts = {
            "validation": (split.validation, split.validation_negatives),
            "test": (split.test, split.test_negatives),
        }
        positive, negative = (network.pair_scores(x, pairs) for pairs in parts[part])
        return {"roc_auc": roc_auc(positive, negative), "ap": average_precision(positive, negative)}

    def selection(self, scores: Mapping[str, float]) -> float:
        """Return the mean of the two scores."""
        return (scores["roc_auc"] + scores["ap"]) / 2

    def facts(self) -> dict[str, int]:
        """Count edges."""
        split = self.split
        return {
            "train_edges": len(split.train),
            "validation_edges": len(split.validation),
            "test_edges": len(split.test),
            "test_pairs_possible_in_training": split.shown(split.test) + split.shown(split.test_negatives),
        }


TASKS: dict[str, type[GraphTask]] = {
    "link_prediction": LinkPrediction,
    "node_classification": NodeClassification,
}
"""Value of ``data.task`` -> the task."""
