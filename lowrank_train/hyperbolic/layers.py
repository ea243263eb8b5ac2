"""Layers between points of the Lorentz model: linear map, attention, embedding.

Chen et al., "Fully Hyperbolic Neural Networks" (arXiv 2105.14686), sections 3 and 4. For a point x and y = W x + b

    t   = sigmoid(y_0) e^c + 1.1 sqrt(k)                 c is learned
    s   = sqrt((t^2 - k) / |y_1..|^2) y_1..
    out = (sqrt(k + |s|^2), s)

Row 0 of W makes the time, the others a direction: both are one ``nn.Linear``, whose counts include the time, and which
``to_spectral``, ``add_adapters`` and ``merge`` replace like any other.

We differ: the time is made from s instead of taken as t. They are equal unless y_1.. is (nearly) zero, where (t, s)
would not be on the manifold and ours is the origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.lorentz import centroid, check_curvature, check_points, lift, on_manifold

__all__ = ["LorentzAttention", "LorentzEmbedding", "LorentzLinear"]

_SHORTEST = 1e-8
"""The least |y_1..|^2: shorter directions are not stretched to full length."""


class LorentzLinear(nn.Module):
    """A linear map between points: ``linear`` (an ``nn.Linear``) inside a return to the manifold.

    Args:
        in_features: coordinates of the input, times included.
        out_features: coordinates of the output, times included.
        bias: whether there is one; it begins at zero.
        dropout: of the coordinates that enter the linear map.
        activation: of all coordinates of the input, before the linear map; None for none.
        curvature: k.
        heads: points the output is split into, each with a time of its own.
        in_heads: points the input was put together from; the weights of their times begin at zero, as in the code of
            Chen et al.
        bound: initial weights are from U(-bound, bound); None: 1 / sqrt(out_features).
        max_time: e^c at the beginning: times are up to this + 1.1 sqrt(k).

    Raises:
        UserError: k is not positive, sizes that do not divide by the heads or leave a point without space.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        curvature: float = 1.0,
        heads: int = 1,
        in_heads: int = 1,
        bound: float | None = None,
        max_time: float = 10.0,
    ) -> None:
        super().__init__()
        self.curvature = check_curvature(curvature)
        for key, features, points in (("in_features", in_features, in_heads), ("out_features", out_features, heads)):
            if points < 1 or features % points or features // points < 2:
                raise UserError(
                    f"{key}={features} with {points} head(s); expected a multiple of the heads, with at least a time "
                    "and one coordinate for each"
                )
        self.heads, self.activation = heads, activation
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.scale = nn.Parameter(torch.full((1,), math.log(max_time)))  # c
        bound = 1 / math.sqrt(out_features) if bound is None else bound
        nn.init.uniform_(self.linear.weight, -bound, bound)
        with torch.no_grad():
            self.linear.weight[:, :: in_features // in_heads] = 0
            if bias:
                self.linear.bias.zero_()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (..., in) to (..., out), or to (..., heads, out / heads) with more than one head.

        Args:
            x: points.
            residual: (..., out), added to W x + b before the return to the manifold.
        """
        y = self.linear(self.dropout(x if self.activation is None else self.activation(x)))
        if residual is not None:
            y = y + residual
        if self.heads > 1:
            y = y.unflatten(-1, (self.heads, -1))
        k = self.curvature
        time = torch.sigmoid(y[..., :1]) * self.scale.exp() + 1.1 * math.sqrt(k)
        direction = y[..., 1:]
        length = direction.square().sum(-1, keepdim=True).clamp_min(_SHORTEST)
        return on_manifold(direction * ((time.square() - k) / length).sqrt(), k)


class LorentzAttention(nn.Module):
    """Multi-head attention between points; what is attended to is averaged by the Lorentz centroid.

    softmax_j((2 k + 2 <q_i, k_j>) / scale + bias), which falls with the squared distance of query and key; ``bias``
    (1,) begins at zero, ``scale`` (1,) where logits of random directions have a standard deviation of 1. Chen et al.
    begin at sqrt(width), with which a head of few coordinates sees little but one key, and learns more slowly.

    Args:
        width: coordinates of a point, times of the heads included.
        heads: each is a point of width / heads coordinates.
        dropout: of what enters ``output``.
        attention_dropout: of the attention weights.
        curvature: k.
        bound: of the initial weights, see ``LorentzLinear``.
        max_time: see ``LorentzLinear``.

    Raises:
        UserError: as ``LorentzLinear``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        curvature: float = 1.0,
        bound: float | None = None,
        max_time: float = 10.0,
    ) -> None:
        super().__init__()
        self.curvature = check_curvature(curvature)
        self.query, self.key, self.value = (
            LorentzLinear(width, width, curvature=curvature, heads=heads, bound=bound, max_time=max_time)
            for _ in range(3)
        )
        self.output = LorentzLinear(
            width, width, curvature=curvature, in_heads=heads, dropout=dropout, bound=bound, max_time=max_time
        )
        self.attention_dropout = nn.Dropout(attention_dropout)
        time = max_time / 2 + 1.1 * math.sqrt(curvature)  # of a query or key, where y_0 = 0
        spread = 2 * (time**2 - curvature) / math.sqrt(width // heads - 1)
        self.scale = nn.Parameter(torch.full((1,), spread))
        self.bias = nn.Parameter(torch.zeros(1))
        self.heads = heads

    def forward(
        self, query: Tensor, memory: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Map (batch, n, width) to (batch, n, width).

        Args:
            query: points (batch, n, width).
            memory: points (batch, m, width) for keys and values.
            mask: True where a query may see a key; broadcasts to (batch, heads, n, m). Every query must see one.
            residual: (batch, n, width), see ``LorentzLinear.forward``.
        """
        q, k, v = (
            self._by_head(map_, x) for map_, x in ((self.query, query), (self.key, memory), (self.value, memory))
        )
        flipped = torch.cat([-k[..., :1], k[..., 1:]], dim=-1)  # so that an ordinary product is <q, k>
        logits = (2 * self.curvature + 2 * q @ flipped.mT) / self.scale + self.bias
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        weights = self.attention_dropout(torch.softmax(logits, dim=-1))
        # (batch, heads, n, width / heads); after dropout weights do not sum to one
        means = centroid(weights @ v, self.curvature, weights.sum(-1, keepdim=True))
        joined: Tensor = self.output(means.transpose(-3, -2).flatten(-2), residual)
        return joined

    def _by_head(self, map_: LorentzLinear, x: Tensor) -> Tensor:
        """(batch, heads, n, width / heads)."""
        points: Tensor = map_(x)
        return points.transpose(-3, -2) if self.heads > 1 else points.unsqueeze(-3)


class LorentzEmbedding(nn.Module):
    """A table of points, ``weight`` (count, width), one per entry: a parameter that stays on the manifold.

    An optimizer of ``optim`` built from the model updates it by Riemannian Adam: ``parameter_manifolds`` says which
    manifold its rows are on.

    Args:
        count: entries.
        width: coordinates of a point, time included.
        curvature: k.
        std: initial points are ``lift`` of N(0, std^2) in every coordinate.
        points: (count, width), initial points instead of drawn ones.

    Raises:
        UserError: k is not positive; a given point is not on the manifold, or they are of another shape.
    """

    def __init__(
        self, count: int, width: int, *, curvature: float = 1.0, std: float = 0.02, points: Tensor | None = None
    ) -> None:
        super().__init__()
        self.curvature = check_curvature(curvature)
        if points is not None and tuple(points.shape) != (count, width):
            raise UserError(f"points: shape {tuple(points.shape)}; expected {(count, width)}, one row per entry")
        if points is None:
            points = lift(torch.randn(count, width - 1) * std, self.curvature)
        self.weight = nn.Parameter(check_points(points, self.curvature).clone())
        self.parameter_manifolds = {"weight": ("lorentz", self.curvature)}

    def forward(self, index: Tensor) -> Tensor:
        """Map (...) to (..., width)."""
        return self.weight[index]

    def scores(self, x: Tensor) -> Tensor:
        """Return minus the squared distance to every entry, 2 k + 2 <x, e>; (..., width) -> (..., count)."""
        flipped = torch.cat([-x[..., :1], x[..., 1:]], dim=-1)
        return 2 * self.curvature + 2 * flipped @ self.weight.mT
