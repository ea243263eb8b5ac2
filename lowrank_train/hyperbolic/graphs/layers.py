"""Graph convolutions and the scores of nodes and of pairs of nodes, on the Lorentz model and in Euclidean space.

Lorentz: a linear map, then the centroid of every node and its neighbours (Chen et al., arXiv 2105.14686, section 4).
Euclidean: h = activation(A (W dropout(x) + b)) (Kipf & Welling, arXiv 1609.02907), with the same parameters but for the
time, the same decoders and the same losses, so that only the space differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.layers import LorentzLinear
from lowrank_train.hyperbolic.lorentz import centroid, check_curvature, inner

__all__ = ["GraphConvolution", "LorentzGraphConvolution"]

Activation = Callable[[Tensor], Tensor] | None


class LorentzGraphConvolution(nn.Module):
    """Points to points: ``LorentzLinear``, then sqrt(k) s / sqrt(|<s, s>|) with s the average over neighbours.

    With attention, s is weighted by the softmax over neighbours of (2 k + 2 <q_i, k_j>) / scale, where q and k are
    further linear maps of the points that are averaged; ``scale`` (1,) begins at sqrt(out_features).

    Args:
        in_features: coordinates of the input, time included.
        out_features: coordinates of the output, time included.
        dropout: see ``LorentzLinear``.
        activation: see ``LorentzLinear``.
        curvature: k.
        attention: whether neighbours are weighed.

    Raises:
        UserError: as ``LorentzLinear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
        activation: Activation = None,
        curvature: float = 1.0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.curvature = check_curvature(curvature)
        self.map = LorentzLinear(in_features, out_features, dropout=dropout, activation=activation, curvature=curvature)
        self.attention = attention
        if attention:
            self.query = LorentzLinear(out_features, out_features, curvature=curvature)
            self.key = LorentzLinear(out_features, out_features, curvature=curvature)
            self.scale = nn.Parameter(torch.full((1,), math.sqrt(out_features)))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """Map (n, in) to (n, out)."""
        h = self.map(x)
        if not self.attention:
            return centroid(adjacency.average(h), self.curvature)
        products = inner(self.query(h)[adjacency.rows], self.key(h)[adjacency.columns])
        logits = (2 * self.curvature + 2 * products) / self.scale
        return centroid(adjacency.attend(h, logits), self.curvature)


class GraphConvolution(nn.Module):
    """The Euclidean twin: linear map, average over neighbours, activation; arguments as above."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
        activation: Activation = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        self.linear = nn.Linear(in_features, out_features)
        nn.init.uniform_(self.linear.weight, -1 / math.sqrt(out_features), 1 / math.sqrt(out_features))
        nn.init.zeros_(self.linear.bias)
        self.attention = attention
        if attention:
            self.query, self.key = nn.Linear(out_features, out_features), nn.Linear(out_features, out_features)
            self.scale = nn.Parameter(torch.full((1,), math.sqrt(out_features)))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """Map (n, in) to (n, out)."""
        h = self.linear(self.dropout(x if self.activation is None else self.activation(x)))
        if not self.attention:
            return adjacency.average(h)
        difference = self.query(h)[adjacency.rows] - self.key(h)[adjacency.columns]
        return adjacency.attend(h, -difference.square().sum(-1) / self.scale)
