"""A graph network: features enter the space, convolutions, and a decoder for the task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.graphs.spaces import Geometry

__all__ = ["ACTIVATIONS", "LINEAR_MAPS", "GraphNetwork", "NodeFeatures", "with_degrees"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "relu": torch.relu}
"""Value of ``model.activation`` -> what acts between two convolutions."""

LINEAR_MAPS = r"^encoder\."
"""The ``nn.Linear`` modules of a network that SST, LoRA and ReLoRA* replace: all there are."""

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
        geometry: the space.
        features: columns of the features.
        width: coordinates of a point, a time included where points have one.
        convolutions: layers; the first has no activation before it.
        classes: of nodes; None where pairs are scored, which takes no parameters.
        dropout: of what enters each linear map.
        activation: of what enters each convolution but the first; None for none.
        attention: whether neighbours are weighed.

    Raises:
        UserError: sizes out of range.
    """

    def __init__(
        self,
        geometry: Geometry,
        features: int,
        *,
        width: int,
        convolutions: int,
        classes: int | None,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        if convolutions < 1:
            raise UserError(f"model.convolutions={convolutions}; expected at least 1")
        if width < 2:
            raise UserError(f"model.width={width}; expected at least 2")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout}; expected a number from 0 to below 1")
        self.geometry, self.dropout = geometry, dropout
        widths = [features + geometry.extra, *[width] * convolutions]
        self.encoder = nn.ModuleList(
            geometry.convolution(
                widths[i],
                widths[i + 1],
                dropout=dropout if i else 0.0,  # the features have a dropout of their own
                activation=activation if i else None,
                attention=attention,
            )
            for i in range(convolutions)
        )
        self.decoder = None if classes is None else geometry.classifier(width, classes)

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
