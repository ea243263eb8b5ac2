"""Scores of a translator for one pair of sentences, in numpy, float64, a place and a head at a time.

Chen et al., "Fully Hyperbolic Neural Networks" (arXiv 2105.14686): linear map Eq. 3 with the times of their code
(sigmoid(y_0) e^c + 1.1 sqrt(k)), attention by the squared distance and the centroid of Eq. 6, both for one head; the
Euclidean one is Vaswani et al. (arXiv 1706.03762), section 3, with the norm after the sum. No masks: an earlier place
is one that the loop has come by.
"""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def under(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def softmax(logits: list[float]) -> list[float]:
    terms = [math.exp(x - max(logits)) for x in logits]
    return [term / sum(terms) for term in terms]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def minkowski(x: np.ndarray, y: np.ndarray) -> float:
    return float(-x[0] * y[0] + x[1:] @ y[1:])


class Lorentz:
    """A space: how words enter, how places are attended to, how a place is passed on, how words are scored."""

    def __init__(self, k: float, heads: int) -> None:
        self.k, self.heads = k, heads

    def linear(self, w: Weights, x: np.ndarray, residual: np.ndarray | float = 0.0, heads: int = 1) -> np.ndarray:
        y = w["linear.weight"] @ x + w["linear.bias"] + residual
        parts = []
        for head in np.split(y, heads):
            t = 1 / (1 + math.exp(-head[0])) * math.exp(w["scale"][0]) + 1.1 * math.sqrt(self.k)
            s = math.sqrt((t * t - self.k) / float(head[1:] @ head[1:])) * head[1:]
            parts.append(np.concatenate([[t], s]))
        return np.concatenate(parts)

    def midpoint(self, weights: list[float], values: list[np.ndarray]) -> np.ndarray:
        total = sum(a * v for a, v in zip(weights, values, strict=True))
        return math.sqrt(self.k) * total / math.sqrt(abs(minkowski(total, total)))

    def words(self, w: Weights, tokens: list[int]) -> list[np.ndarray]:
        return [
            self.linear(under(w, "map."), w["words.weight"][token], w["places"][i]) for i, token in enumerate(tokens)
        ]

    def attend(self, w: Weights, x: np.ndarray, memory: list[np.ndarray]) -> np.ndarray:
        w = under(w, "attention.")
        q = np.split(self.linear(under(w, "query."), x, heads=self.heads), self.heads)
        keys = [np.split(self.linear(under(w, "key."), y, heads=self.heads), self.heads) for y in memory]
        values = [np.split(self.linear(under(w, "value."), y, heads=self.heads), self.heads) for y in memory]
        means = []
        for h in range(self.heads):
            logits = [(2 * self.k + 2 * minkowski(q[h], key[h])) / w["scale"][0] + w["bias"][0] for key in keys]
            means.append(self.midpoint(softmax(logits), [value[h] for value in values]))
        return self.linear(under(w, "output."), np.concatenate(means), x)

    def pass_on(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return self.linear(under(w, "down."), relu(self.linear(under(w, "up."), x)), x)

    def score(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return np.array([2 * self.k + 2 * minkowski(x, c) + b for c, b in zip(w["centres"], w["bias"], strict=True)])


class Euclidean:
    """As ``Lorentz``."""

    def __init__(self, k: float, heads: int) -> None:
        self.heads = heads

    def linear(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return w["weight"] @ x + w["bias"]

    def norm(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]

    def words(self, w: Weights, tokens: list[int]) -> list[np.ndarray]:
        return [self.norm(w, w["words.weight"][token] + w["places"][i]) for i, token in enumerate(tokens)]

    def attend(self, w: Weights, x: np.ndarray, memory: list[np.ndarray]) -> np.ndarray:
        q = np.split(self.linear(under(w, "query."), x), self.heads)
        keys = [np.split(self.linear(under(w, "key."), y), self.heads) for y in memory]
        values = [np.split(self.linear(under(w, "value."), y), self.heads) for y in memory]
        means = []
        for h in range(self.heads):
            weights = softmax([float(q[h] @ key[h]) / math.sqrt(len(q[h])) for key in keys])
            means.append(sum(a * value[h] for a, value in zip(weights, values, strict=True)))
        return self.norm(w, self.linear(under(w, "output."), np.concatenate(means)) + x)

    def pass_on(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return self.norm(w, self.linear(under(w, "down."), relu(self.linear(under(w, "up."), x))) + x)

    def score(self, w: Weights, x: np.ndarray) -> np.ndarray:
        return w["linear.weight"] @ x + w["linear.bias"]


def scores(space: Lorentz | Euclidean, weights: Weights, layers: int, source: list[int], read: list[int]) -> np.ndarray:
    """(n, words)."""
    memory = space.words(under(weights, "source."), source)
    for i in range(layers):
        w = under(weights, f"encoder.{i}.")
        attended = [space.attend(under(w, "attention."), x, memory) for x in memory]
        memory = [space.pass_on(under(w, "feed_forward."), x) for x in attended]
    x = space.words(under(weights, "target."), read)
    for i in range(layers):
        w = under(weights, f"decoder.{i}.")
        x = [space.attend(under(w, "attention."), x[j], x[: j + 1]) for j in range(len(x))]
        x = [space.attend(under(w, "cross_attention."), y, memory) for y in x]
        x = [space.pass_on(under(w, "feed_forward."), y) for y in x]
    return np.stack([space.score(under(weights, "decision."), y) for y in x])
