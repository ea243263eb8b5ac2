"""What a Transformer is made of, on the Lorentz model and in Euclidean space: entry of words, attention, feed-forward.

Every layer adds its input, and ends where representations live: on the Lorentz model by the return to the manifold of
``LorentzLinear``, which takes the residual inside (Chen et al., "Fully Hyperbolic Neural Networks", arXiv 2105.14686,
section 3), in Euclidean space by a layer norm (Vaswani et al., arXiv 1706.03762):

                 attention                                        feed-forward
    Lorentz      on_manifold(W_o [means of the heads] + b + x)    on_manifold(W_2 relu(W_1 x) + b + x)
    Euclidean    norm(W_o [means of the heads] + b + x)           norm(W_2 relu(W_1 x) + b + x)

on_manifold is ``LorentzLinear``'s, which chooses a time, too. Shapes: b sentences, n query places, m memory places,
d coordinates; in the Lorentz model one of them, and one of each head's, is a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowrank_train.hyperbolic.layers import LorentzAttention, LorentzEmbedding, LorentzLinear

__all__ = [
    "EuclideanAttentionBlock",
    "EuclideanDecision",
    "EuclideanFeedForward",
    "EuclideanWords",
    "LorentzAttentionBlock",
    "LorentzFeedForward",
    "LorentzWords",
]


class LorentzWords(nn.Module):
    """Words at their places: ``LorentzLinear`` of the point of the word, with the vector of the place as residual.

    Args:
        words: entries of the vocabulary; each is a point that Riemannian Adam moves.
        places: longest sentence, tokens.
        width: d.
        curvature: k.
        max_time: of the points of words at places, see ``LorentzLinear``.
    """

    def __init__(self, words: int, places: int, width: int, *, curvature: float, max_time: float) -> None:
        super().__init__()
        self.words = LorentzEmbedding(words, width, curvature=curvature, std=1 / math.sqrt(width))
        # as long, at first, as what the map makes of a word; an nn.Embedding would pass for the vocabulary
        self.places = nn.Parameter(0.1 * torch.randn(places, width))
        self.map = LorentzLinear(width, width, curvature=curvature, max_time=max_time)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (b, n) to points (b, n, d)."""
        # looked up as an embedding: its backward sums into rows, that of indexing sorts them first
        points = nn.functional.embedding(tokens, self.words.weight)
        mapped: Tensor = self.map(points, self.places[: tokens.shape[1]])
        return mapped


class LorentzAttentionBlock(nn.Module):
    """``LorentzAttention`` with its input as residual."""

    def __init__(self, width: int, heads: int, *, dropout: float, curvature: float, max_time: float) -> None:
        super().__init__()
        self.attention = LorentzAttention(width, heads, dropout=dropout, curvature=curvature, max_time=max_time)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map points (b, n, d) and (b, m, d) to (b, n, d); mask as in ``LorentzAttention.forward``."""
        out: Tensor = self.attention(x, memory, mask, x)
        return out


class LorentzFeedForward(nn.Module):
    """Two ``LorentzLinear``, relu between them, with the input as residual."""

    def __init__(self, width: int, inner_width: int, *, dropout: float, curvature: float, max_time: float) -> None:
        super().__init__()
        self.up = LorentzLinear(width, inner_width, curvature=curvature, max_time=max_time)
        self.down = LorentzLinear(
            inner_width, width, activation=torch.relu, dropout=dropout, curvature=curvature, max_time=max_time
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map points (b, n, d) to points (b, n, d)."""
        out: Tensor = self.down(self.up(x), x)
        return out


class EuclideanWords(nn.Module):
    """Vectors of word and place, added and normed."""

    def __init__(self, words: int, places: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(width))  # both as in hyperbolic space
        self.places = nn.Parameter(0.1 * torch.randn(places, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, n) to (b, n, d)."""
        normed: Tensor = self.norm(self.words(tokens) + self.places[: tokens.shape[1]])
        return normed


class EuclideanAttentionBlock(nn.Module):
    """Scaled dot-product attention, residual, layer norm."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.heads = heads

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map (b, n, d) and (b, m, d) to (b, n, d); mask (to b, heads, n, m): True where a query may see."""
        q, k, v = (
            map_(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for map_, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        means = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined = self.output(self.dropout(means.transpose(1, 2).flatten(-2)))
        normed: Tensor = self.norm(joined + x)
        return normed


class EuclideanFeedForward(nn.Module):
    """Two linear maps, relu between them, residual, layer norm."""

    def __init__(self, width: int, inner_width: int, *, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        normed: Tensor = self.norm(self.down(self.dropout(torch.relu(self.up(x)))) + x)
        return normed


class EuclideanDecision(nn.Module):
    """Scores of words, a linear map; its weight is a head to the optimizers, wherever it is."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, words)
        self.parameter_roles = {"linear.weight": "head"}

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., words)."""
        scores: Tensor = self.linear(x)
        return scores
