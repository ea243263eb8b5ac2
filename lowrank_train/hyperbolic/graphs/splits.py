"""What of a graph is for training, for validation and for the test, by one of two protocols.

``inherited`` repeats the loader of HGCN (Chami et al., arXiv 1910.12933), which HyboNet, and by their scores Sparse
Spectral Training, use too; draws are those of its numpy generator. It is for comparison with their tables, because

  * nodes: it assumes two classes. With more, "label is not 0" and "label is not 1" overlap, and so do training,
    validation and test: of the airports' 506 test nodes 252 are trained on.
  * pairs: negatives for training are drawn from all pairs that are not training edges, among them the edges and the
    negatives of validation and test, and nodes with themselves; an edge from a node to itself is one to predict.

``clean`` has parts that do not overlap: nodes are drawn class by class; no pair of validation or test, edge or not, is
ever a training pair; a node with itself is no pair.

A split that comes with the graph is used as it is by both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.graphs.data import Graph

__all__ = ["PROTOCOLS", "Clean", "EdgeSplit", "Inherited", "NodeSplit", "Protocol"]


@dataclass(frozen=True)
class NodeSplit:
    """Indices of nodes; a node may be listed more than once by ``inherited``."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def trained_on(self) -> int:
        """Different test nodes that are also in training."""
        return int(torch.isin(self.test.unique(), self.train).sum())


@dataclass(frozen=True)
class EdgeSplit:
    """Pairs of nodes (m, 2), smaller node first."""

    train: Tensor
    validation: Tensor
    validation_negatives: Tensor
    test: Tensor
    test_negatives: Tensor
    never: Tensor
    """Codes, smaller * n + larger node, ascending: pairs that are never a negative of training."""
    loops: bool
    """Whether a node with itself is a pair."""
    nodes: int

    def negatives(self) -> Tensor:
        """Draw as many pairs as training edges, uniformly from all but ``never``, with torch's generator; (m, 2)."""
        codes = torch.empty(len(self.train), dtype=torch.long)
        missing = torch.ones(len(codes), dtype=torch.bool)
        while bool(missing.any()):
            codes[missing] = _random_codes(self.nodes, int(missing.sum()), loops=self.loops)
            place = torch.searchsorted(self.never, codes).clamp_max(len(self.never) - 1)
            missing = self.never[place] == codes
        return _pairs(codes, self.nodes)

    def shown(self, pairs: Tensor) -> int:
        """Return how many of the pairs can be a negative of training."""
        return int((~torch.isin(_codes(pairs, self.nodes), self.never)).sum())


class Protocol(ABC):
    """Abstract: how parts are drawn.

    Args:
        validation_share: of nodes, or edges.
        test_share: of nodes, or edges.
        seed: of the draw.
    """

    def __init__(self, validation_share: float, test_share: float, seed: int) -> None:
        if (both := validation_share + test_share) >= 1:
            raise UserError(f"data.validation_share + data.test_share = {both:g}; expected less than 1")
        self.validation_share, self.test_share, self.seed = validation_share, test_share, seed

    def nodes(self, graph: Graph) -> NodeSplit:
        """Draw the parts of a graph with labels. Raises UserError if it has none, or a part would be empty."""
        if graph.labels is None or len(graph.labels.unique()) < 2:
            raise UserError(
                f"{graph.name} has no labels of two or more classes; expected the key 'labels' in its file, or "
                "data.label_column and data.label_bins"
            )
        split = NodeSplit(**graph.split) if graph.split is not None else self._nodes(graph.labels)
        self._check(graph, {"train": split.train, "validation": split.validation, "test": split.test})
        return split

    def edges(self, graph: Graph) -> EdgeSplit:
        """Draw parts of edges and as many negatives. Raises UserError if a part would be empty."""
        split = self._edges(graph)
        self._check(graph, {"train": split.train, "validation": split.validation, "test": split.test})
        return split

    def _check(self, graph: Graph, parts: Mapping[str, Tensor]) -> None:
        for part, members in parts.items():
            if not len(members):
                raise UserError(
                    f"{graph.name} is too small, nothing is left for {part}: it has {graph.nodes} nodes and "
                    f"{len(graph.edges)} edges, with data.validation_share={self.validation_share} and "
                    f"data.test_share={self.test_share}"
                )

    @abstractmethod
    def _nodes(self, labels: Tensor) -> NodeSplit: ...

    @abstractmethod
    def _edges(self, graph: Graph) -> EdgeSplit: ...


class Clean(Protocol):
    """Parts that do not overlap."""

    def _nodes(self, labels: Tensor) -> NodeSplit:
        generator = torch.Generator().manual_seed(self.seed)
        parts: list[list[Tensor]] = [[], [], []]
        for label in labels.unique():
            members = (labels == label).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            validation, test = (round(share * len(members)) for share in (self.validation_share, self.test_share))
            for part, own in zip(
                parts, members.split([validation, test, len(members) - validation - test]), strict=True
            ):
                part.append(own)
        validation_nodes, test_nodes, train_nodes = (torch.cat(part).sort().values for part in parts)
        return NodeSplit(train_nodes, validation_nodes, test_nodes)

    def _edges(self, graph: Graph) -> EdgeSplit:
        generator, n = torch.Generator().manual_seed(self.seed), graph.nodes
        edges = graph.edges[graph.edges[:, 0] != graph.edges[:, 1]]
        edges = edges[torch.randperm(len(edges), generator=generator)]
        validation, test = (int(share * len(edges)) for share in (self.validation_share, self.test_share))
        held_out, train = edges[: validation + test], edges[validation + test :]
        taken = _codes(edges, n)
        if 2 * (validation + test) > n * (n - 1) // 2 - len(edges):
            raise UserError(
                f"{graph.name} is too dense: {validation + test} held-out negatives are more than half of the pairs of "
                f"its {n} nodes that {len(edges)} edges leave; expected a sparser graph, or smaller shares"
            )
        negatives = torch.empty(0, dtype=torch.long)
        while len(negatives) < validation + test:  # without replacement
            more = _random_codes(n, validation + test - len(negatives), loops=False, generator=generator)
            new = torch.unique(more[~torch.isin(more, taken)])
            negatives, taken = torch.cat([negatives, new]), torch.cat([taken, new])
        negatives = negatives[torch.randperm(len(negatives), generator=generator)]  # unique() sorts
        never = torch.cat([_codes(edges, n), negatives]).sort().values
        pairs = _pairs(negatives, n)
        return EdgeSplit(
            train, held_out[:validation], pairs[:validation], held_out[validation:], pairs[validation:], never, False, n
        )


class Inherited(Protocol):
    """That of HGCN's loader, with its overlaps."""

    def _nodes(self, labels: Tensor) -> NodeSplit:
        random = np.random.RandomState(self.seed)
        sides = [(labels != 0).nonzero().squeeze(1).numpy(), (labels != 1).nonzero().squeeze(1).numpy()]
        for side in sides:
            random.shuffle(side)
        smaller = min(map(len, sides))
        validation, test = (round(share * smaller) for share in (self.validation_share, self.test_share))
        parts = [
            torch.from_numpy(np.concatenate([side[start:end] for side in sides]))
            for start, end in ((0, validation), (validation, validation + test), (validation + test, None))
        ]
        return NodeSplit(parts[2], parts[0], parts[1])

    def _edges(self, graph: Graph) -> EdgeSplit:
        random, n = np.random.RandomState(self.seed), graph.nodes
        edges = graph.edges.numpy().copy()  # already in the order of rows, then columns
        random.shuffle(edges)
        rows, columns = np.triu_indices(n)  # with nodes and themselves
        others = rows * n + columns
        others = others[~np.isin(others, _codes(graph.edges, n).numpy(), assume_unique=True)]
        random.shuffle(others)
        validation, test = (int(share * len(edges)) for share in (self.validation_share, self.test_share))
        pairs = _pairs(torch.from_numpy(others[: validation + test]), n)
        held_out, train = (torch.from_numpy(part) for part in (edges[: validation + test], edges[validation + test :]))
        never = _codes(train, n).sort().values
        return EdgeSplit(
            train, held_out[:validation], pairs[:validation], held_out[validation:], pairs[validation:], never, True, n
        )


PROTOCOLS: dict[str, type[Protocol]] = {"clean": Clean, "inherited": Inherited}
"""Value of ``data.protocol`` -> how parts are drawn."""


def _codes(pairs: Tensor, n: int) -> Tensor:
    return pairs[:, 0] * n + pairs[:, 1]


def _pairs(codes: Tensor, n: int) -> Tensor:
    return torch.stack([codes // n, codes % n], dim=1)


def _random_codes(n: int, count: int, *, loops: bool, generator: torch.Generator | None = None) -> Tensor:
    """Of uniformly drawn pairs, smaller node first.

    An n x (n - 1) grid (with loops n x (n + 1)) holds each pair exactly twice: (i, j) is the pair i, j + 1 on and above
    the diagonal and j, i below it (with loops i, j - 1 above it and n - 1 - i, n - 1 - j elsewhere).
    """
    i = torch.randint(n, (count,), generator=generator)
    j = torch.randint(n + 1 if loops else n - 1, (count,), generator=generator)
    if loops:
        above = j > i
        return torch.where(above, i * n + j - 1, (n - 1 - i) * n + (n - 1 - j))
    return torch.where(j >= i, i * n + j + 1, j * n + i)
