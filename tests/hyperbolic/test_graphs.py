"""Graph files, what is wrong with them, and walks over graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.graphs.data import components, depths, load_graph, make_graph, middle, with_binned_labels
from tests.hyperbolic.helpers import CHILDREN, LEVELS, tree, tree_arrays


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    arrays = tree_arrays()
    split = {"train_index": np.arange(50), "val_index": np.arange(50, 80), "test_index": np.arange(80, 121)}
    np.savez(tmp_path / "tree.npz", **{**arrays, **split, "edges": arrays["edges"][::-1, ::-1]})
    graph = load_graph(str(tmp_path), "tree")
    assert graph.edges.tolist() == arrays["edges"].tolist()  # whatever their order and direction
    assert graph.features.tolist() == arrays["features"].tolist()
    assert graph.labels is not None
    assert graph.labels.tolist() == arrays["labels"].tolist()
    assert graph.split is not None
    assert {part: len(nodes) for part, nodes in graph.split.items()} == {"train": 50, "validation": 30, "test": 41}
    assert len(graph.sha1) == 40


def test_sparse_features_are_those_that_dense_ones_are(tmp_path: Path) -> None:
    dense = np.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    rows, columns = dense.nonzero()
    sparse = {
        "feature_indices": columns,
        "feature_indptr": np.array([0, 1, 1, 3]),
        "feature_values": dense[rows, columns],
        "num_features": 3,
    }
    np.savez(tmp_path / "g.npz", edges=np.array([[0, 1], [1, 2]]), **sparse)
    assert load_graph(str(tmp_path), "g").features.tolist() == dense.tolist()


def test_a_missing_file_is_named_with_what_there_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "tree.npz", **tree_arrays())
    with pytest.raises(UserError, match=r"there is no .*oak\.npz; the folder has tree: set data\.folder"):
        load_graph(str(tmp_path), "oak")
    with pytest.raises(UserError, match=r"the folder has no \.npz file"):
        load_graph(str(tmp_path / "elsewhere"), "tree")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip at all", r"cannot read .*expected an \.npz of plain arrays"),
        ({"features": np.ones((2, 2))}, r"has no key 'edges'; it has features"),
        ({"edges": np.array([[0, 1]])}, r"has no features: expected the key 'features', 'attributes', or all of"),
        ({"edges": np.array([{}, 1])}, r"cannot read .*expected an \.npz of plain arrays"),
        (
            {
                "edges": np.array([[0, 1]]),
                "feature_indices": np.array([7]),
                "feature_indptr": np.array([0, 1, 1]),
                "feature_values": np.array([1.0]),
                "num_features": 3,
            },
            "do not make a sparse matrix",
        ),
    ],
    ids=["bytes", "no edges", "no features", "pickled", "bad rows"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "g.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=message):
        load_graph(str(tmp_path), "g")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no edges": ({"edges": np.empty((0, 2))}, r"the graph is empty, 0 edges and features of shape \(3, 2\)"),
    "no nodes": ({"features": np.empty((0, 2))}, "the graph is empty"),
    "no features": ({"features": np.empty((3, 0))}, "the graph is empty"),
    "three ends": ({"edges": np.array([[0, 1, 2]])}, r"edges are int64 of shape \(1, 3\); expected .*\(E, 2\)"),
    "half an edge": ({"edges": np.array([[0.5, 1]])}, "edges are float64"),
    "beyond": ({"edges": np.array([[0, 1], [1, 3]])}, r"edge 1, \[1, 3\], leads to a node that does not .* 0 to 2"),
    "before": ({"edges": np.array([[-1, 1]])}, r"edge 0, \[-1, 1\], leads to a node"),
    "twice": ({"edges": np.array([[0, 1], [1, 2], [1, 0]])}, "1 of 3 edges are listed twice; list each once"),
    "not finite": ({"features": np.array([[0, 1], [0, np.nan], [0, 0]])}, "feature 1 of node 1 is nan"),
    "few labels": ({"labels": np.array([0, 1])}, r"labels are int64 of shape \(2,\).*each of the 3 nodes"),
    "negative labels": ({"labels": np.array([0, -1, 1])}, "expected a whole number >= 0"),
    "overlapping split": (
        {"split": {"train": [0, 1], "validation": [1], "test": [2]}},
        "parts of its split are empty or overlap",
    ),
    "split beyond": ({"split": {"train": [0], "validation": [1], "test": [7]}}, "names node 7; expected 0 to 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_graph_that_is_none_is_refused(case: str) -> None:
    own, message = WRONG[case]
    good = {"edges": np.array([[0, 1], [1, 2]]), "features": np.ones((3, 2))}
    make_graph("g", **good)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        make_graph("g", **{**good, **own})


def test_a_feature_becomes_labels() -> None:
    graph = make_graph("g", [[0, 1], [1, 2], [2, 3]], [[1, 5.0, 9], [2, 0.5, 9], [3, 1.0, 9], [4, 2.0, 9]])
    binned = with_binned_labels(graph, 1, [1.0, 2.5])
    assert binned.labels is not None
    assert binned.labels.tolist() == np.digitize([5.0, 0.5, 1.0, 2.0], [1.0, 2.5]).tolist() == [2, 0, 1, 1]
    assert binned.features.tolist() == [[1, 9], [2, 9], [3, 9], [4, 9]]
    with pytest.raises(UserError, match=r"data\.label_column=3; expected 0 to 2"):
        with_binned_labels(graph, 3, [1.0])
    for bins in ([], [2.0, 1.0], [1.0, 1.0]):
        with pytest.raises(UserError, match=r"data\.label_bins=.*expected ascending numbers"):
            with_binned_labels(graph, 1, bins)


def test_depths_and_the_middle_of_a_tree() -> None:
    graph = tree()
    assert depths(graph, 0).bincount().tolist() == [CHILDREN**level for level in range(LEVELS + 1)]
    assert middle(graph) == 0
    path = make_graph("path", [[i, i + 1] for i in range(6)], torch.ones(7, 1))
    assert middle(path) == 3
    assert depths(path, 1).tolist() == [1, 0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"data\.root=7; expected a node of path, 0 to 6"):
        depths(path, 7)


def test_pieces_are_counted_and_the_middle_is_of_the_largest() -> None:
    graph = make_graph("g", [[0, 1], [2, 3], [3, 4], [4, 5], [5, 6], [7, 7]], torch.ones(8, 1))
    assert components(graph) == [5, 2, 1]
    assert middle(graph) == 4
    assert depths(graph, 4).tolist() == [-1, -1, 2, 1, 0, 1, 2, -1]
