"""A graph network: features enter the space, convolutions, and a decoder for the task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.classifiers import EuclideanClassifier, LorentzClassifier
from lowrank_train.hyperbolic.graphs.config import GraphModelConfig
from lowrank_train.hyperbolic.graphs.layers import GraphConvolution, LorentzGraphConvolution
from lowrank_train.hyperbolic.spaces import SPACES

__all__ = ["ACTIVATIONS", "LINEAR_MAPS", "GraphNetwork", "NodeFeatures", "with_degrees"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "relu": torch.relu}
"""Value of ``model.activation`` -> what acts between two convolutions."""

LINEAR_MAPS = r"^encoder\."
"""The ``nn.Linear`` modules of a network that SST, LoRA and ReLoRA* replace: all there are."""

_LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "lorentz": (LorentzGraphConvolution, LorentzClassifier),
    "euclidean": (GraphConvolution, EuclideanClassifier),
}
"""Value of ``model.geometry`` -> a layer from (points, ``Adjacency``) to points, and one from points to scores."""

_DEGREES = 5
"""Larger degrees count as this one, as in HGCN's loader."""


class NodeFeatures:
    """The features of all nodes as points, (n, f), and a dropout of them that draws for what is not zero only.

    Of words in papers 99 % are zero; ``nn.Dropout`` would take four fifths of the time of an epoch.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self._places = points.flatten().nonzero().squeeze(1)
        self._values = points.flatten()[self._places]

    def dropped(self, p: float) -> Tensor:
        """Drop coordinates of the points in training, as ``nn.Dropout(p)`` does."""
        kept = torch.rand_like(self._values) >= p
        out = torch.zeros_like(self.points)
        out.view(-1)[self._places] = torch.where(kept, self._values / (1 - p), 0.0)
        return out


class GraphNetwork(nn.Module):
    """Convolutions from features to points of a space.

    Args:
        model: the sizes; the first convolution has no activation before it.
        features: columns of the features.
        classes: of nodes; None where pairs are scored, which takes no parameters.
    """

    def __init__(self, model: GraphModelConfig, features: int, classes: int | None) -> None:
        super().__init__()
        self.geometry, self.dropout = SPACES[model.geometry](model.curvature), model.dropout
        convolution, classifier = _LAYERS[model.geometry]
        curvature = {"curvature": model.curvature} if self.geometry.extra else {}
        sizes = [features + self.geometry.extra, *[model.width] * model.convolutions]
        self.encoder = nn.ModuleList(
            convolution(
                sizes[i],
                sizes[i + 1],
                dropout=model.dropout if i else 0.0,  # the features have a dropout of their own
                activation=ACTIVATIONS[model.activation] if i else None,
                attention=model.attention,
                **curvature,
            )
            for i in range(model.convolutions)
        )
        self.decoder = None if classes is None else classifier(model.width, classes, **curvature)

    def forward(self, features: NodeFeatures, adjacency: Adjacency) -> Tensor:
        """Return points (n, width) from ``NodeFeatures(geometry.enter(features))``."""
        x = features.dropped(self.dropout) if self.training and self.dropout else features.points
        for convolution in self.encoder:
            x = convolution(x, adjacency)
        return x

    def class_scores(self, x: Tensor) -> Tensor:
        """Map points (n, width) to scores (n, classes)."""
        assert self.decoder is not None
        scores: Tensor = self.decoder(x)
        return scores

    def pair_scores(self, x: Tensor, pairs: Tensor) -> Tensor:
        """Return minus the squared distance of pairs; points (n, width) and nodes (m, 2) -> (m,)."""
        # rows by embedding: its backward sums into rows at once, that of indexing sorts them first
        first, second = (nn.functional.embedding(pairs[:, i], x) for i in (0, 1))
        return self.geometry.closeness(first, second)


def with_degrees(features: Tensor, edges: Tensor) -> Tensor:
    """Return features, the one-hot degree of each node (0 to 5 and more), and a column of ones; (n, f) -> (n, f + 7).

    Args:
        features: (n, f).
        edges: (E, 2), those that may be known in training.
    """
    ends = torch.cat([edges[:, 0], edges[edges[:, 0] != edges[:, 1], 1]])
    degrees = torch.bincount(ends, minlength=len(features)).clamp_max(_DEGREES)
    ones = features.new_ones(len(features), 1)
    return torch.cat([features, nn.functional.one_hot(degrees, _DEGREES + 1).to(features.dtype), ones], dim=1)
