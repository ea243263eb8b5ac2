"""The two protocols: what they draw, what they let through, and that the inherited one is HGCN's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.data import Graph, make_graph
from lowrank_train.hyperbolic.graphs.splits import PROTOCOLS, Clean, EdgeSplit, Inherited
from lowrank_train.hyperbolic.recipes import load_recipe
from tests.hyperbolic.helpers import tree

Pairs = list[tuple[int, int]]


def as_pairs(tensor: torch.Tensor) -> Pairs:
    return [(int(a), int(b)) for a, b in tensor]


def with_loop() -> Graph:
    own = tree()
    return make_graph("tree", torch.cat([own.edges, torch.tensor([[7, 7]])]), own.features, own.labels)


def literal_edges(graph: Graph, validation_share: float, test_share: float, seed: int) -> dict[str, Pairs]:
    """HGCN's procedure on a dense matrix: shuffle the edges, shuffle the other pairs of the upper triangle, cut."""
    n = graph.nodes
    matrix = np.zeros((n, n))
    for a, b in graph.edges.tolist():
        matrix[a, b] = matrix[b, a] = 1
    random = np.random.RandomState(seed)
    edges = np.array([(a, b) for a in range(n) for b in range(a, n) if matrix[a, b]])
    random.shuffle(edges)
    others = np.array([(a, b) for a in range(n) for b in range(a, n) if not matrix[a, b]])
    random.shuffle(others)
    v, t = int(len(edges) * validation_share), int(len(edges) * test_share)
    parts = {
        "validation": edges[:v],
        "test": edges[v : v + t],
        "train": edges[v + t :],
        "validation_negatives": others[:v],
        "test_negatives": others[v : v + t],
        "training_negatives": np.concatenate([others, edges[: v + t]]),
    }
    return {name: [(int(a), int(b)) for a, b in part] for name, part in parts.items()}


def possible_negatives(split: EdgeSplit) -> set[tuple[int, int]]:
    """All that can be drawn."""
    n = split.nodes
    pairs = [(a, b) for a in range(n) for b in range(a if split.loops else a + 1, n)]
    never = set(split.never.tolist())
    return {(a, b) for a, b in pairs if a * n + b not in never}


def test_inherited_edges_are_those_of_the_literal_procedure() -> None:
    graph = with_loop()
    split = Inherited(0.1, 0.2, 1234).edges(graph)
    expected = literal_edges(graph, 0.1, 0.2, 1234)
    for part in ("train", "validation", "test", "validation_negatives", "test_negatives"):
        assert as_pairs(getattr(split, part)) == expected[part]
    assert possible_negatives(split) == set(expected["training_negatives"])
    assert split.shown(split.test) == len(split.test)  # the overlap it is known for


def test_inherited_nodes_are_those_of_the_literal_procedure() -> None:
    labels = torch.arange(40) % 4
    graph = make_graph("g", [[i, i + 1] for i in range(39)], torch.ones(40, 1), labels.numpy())
    random = np.random.RandomState(7)
    positive, negative = np.flatnonzero(labels.numpy()), np.flatnonzero(1 - labels.numpy())
    random.shuffle(positive)
    random.shuffle(negative)
    v, t = round(0.15 * 30), round(0.2 * 30)
    split = Inherited(0.15, 0.2, 7).nodes(graph)
    assert split.validation.tolist() == [*positive[:v], *negative[:v]]
    assert split.test.tolist() == [*positive[v : v + t], *negative[v : v + t]]
    assert split.train.tolist() == [*positive[v + t :], *negative[v + t :]]
    assert split.trained_on == len(set(split.test.tolist()) & set(split.train.tolist())) > 0


@pytest.mark.parametrize("seed", [0, 1234])
def test_clean_parts_do_not_overlap(seed: int) -> None:
    graph = with_loop()
    protocol = Clean(0.15, 0.2, seed)
    nodes = protocol.nodes(graph)
    together = torch.cat([nodes.train, nodes.validation, nodes.test])
    assert sorted(together.tolist()) == list(range(graph.nodes))
    assert nodes.trained_on == 0
    assert graph.labels is not None
    assert (graph.labels[nodes.test].bincount() / graph.labels.bincount()).sub(0.2).abs().max() < 0.05  # by class

    split = protocol.edges(graph)
    parts = [split.train, split.validation, split.test, split.validation_negatives, split.test_negatives]
    sets = [set(as_pairs(part)) for part in parts]
    assert all(not a & b for a, b in itertools.combinations(sets, 2))
    assert [len(own) for own in sets] == [len(part) for part in parts]  # nothing twice
    assert sets[0] | sets[1] | sets[2] == {(a, b) for a, b in graph.edges.tolist() if a != b}
    assert len(split.test) == len(split.test_negatives) == int(0.2 * 120)
    assert split.shown(split.test) == split.shown(split.test_negatives) == split.shown(split.validation) == 0
    assert not any(a == b for a, b in possible_negatives(split))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_negatives_are_drawn_uniformly_from_what_is_allowed(name: str) -> None:
    torch.manual_seed(0)
    graph = make_graph("ring", [[i, (i + 1) % 14] for i in range(14)], torch.ones(14, 1))
    split = PROTOCOLS[name](0.1, 0.2, 0).edges(graph)
    allowed = possible_negatives(split)
    draws = [pair for _ in range(2000) for pair in as_pairs(split.negatives())]
    counts = torch.tensor([draws.count(pair) for pair in sorted(allowed)], dtype=torch.float64)
    assert int(counts.sum()) == len(draws) == 2000 * len(split.train)
    expected = len(draws) / len(allowed)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < len(allowed) + 5 * (2 * len(allowed)) ** 0.5


@pytest.mark.parametrize("name", PROTOCOLS)
def test_another_seed_is_another_draw_and_the_same_seed_the_same(name: str) -> None:
    splits = [PROTOCOLS[name](0.1, 0.2, seed).edges(tree()) for seed in (1, 1, 2)]
    assert torch.equal(splits[0].test_negatives, splits[1].test_negatives)
    assert torch.equal(splits[0].train, splits[1].train)
    assert not torch.equal(splits[0].train, splits[2].train)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_split_of_the_graph_is_used_by_both(name: str) -> None:
    own = tree()
    standard = {"train": [0, 1, 2], "validation": [3, 4], "test": [5]}
    graph = make_graph("g", own.edges, own.features, own.labels, standard)
    split = PROTOCOLS[name](0.15, 0.15, 0).nodes(graph)
    assert (split.train.tolist(), split.validation.tolist(), split.test.tolist()) == ([0, 1, 2], [3, 4], [5])


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.validation_share \+ data\.test_share = 1; expected less than 1"):
        Clean(0.5, 0.5, 0)


@pytest.mark.parametrize("change", ["validation_share=0.0", "test_share=1.5"])
def test_shares_out_of_range_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{change}; expected a number"):
        load_recipe(GraphConfig, [f"data.{change}"])


def test_graphs_without_what_a_task_needs_are_refused() -> None:
    tiny = make_graph("tiny", [[0, 1], [1, 2]], torch.ones(3, 1), np.array([0, 1, 1]))
    with pytest.raises(UserError, match=r"tiny is too small, nothing is left for validation: .* 3 nodes and 2 edges"):
        Clean(0.1, 0.1, 0).edges(tiny)
    with pytest.raises(UserError, match="tiny is too small, nothing is left for validation"):
        Clean(0.1, 0.1, 0).nodes(tiny)
    for labels in (None, np.zeros(3, dtype=int)):
        graph = make_graph("plain", [[0, 1], [1, 2]], torch.ones(3, 1), labels)
        with pytest.raises(UserError, match=r"plain has no labels of two or more classes.*data\.label_column"):
            Clean(0.1, 0.1, 0).nodes(graph)
    full = make_graph("full", list(itertools.combinations(range(6), 2)), torch.ones(6, 1))
    with pytest.raises(UserError, match=r"full is too dense: 6 held-out .* its 6 nodes that 15 edges leave"):
        Clean(0.2, 0.2, 0).edges(full)
