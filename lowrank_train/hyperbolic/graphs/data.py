"""Graphs from ``.npz`` files: edges, features, labels; what is wrong with them is said before any training.

Keys of a file (numpy arrays, nothing pickled): ``edges`` (E, 2), undirected, each once; and one of

    features (n, f), or attributes (n, f)                                 dense
    feature_indices, feature_indptr, feature_values, num_features         rows of a sparse matrix (CSR)

and, where there are any, ``labels`` (n,) and a split of the nodes, ``train_index``, ``val_index``, ``test_index``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import check_memory

__all__ = ["Graph", "components", "depths", "load_graph", "make_graph", "middle", "with_binned_labels"]

_SPLIT = ("train_index", "val_index", "test_index")


@dataclass(frozen=True)
class Graph:
    """An undirected graph."""

    name: str
    edges: Tensor
    """(E, 2), int64, smaller node first, in ascending order, each once; some may lead from a node to itself."""
    features: Tensor
    """(n, f), float64."""
    labels: Tensor | None = None
    """(n,), int64, classes from 0."""
    split: Mapping[str, Tensor] | None = None
    """A standard one: indices of nodes by ``train``, ``validation``, ``test``."""
    sha1: str = ""
    """The hash of the file that the graph came from."""

    @property
    def nodes(self) -> int:
        """n."""
        return len(self.features)


def load_graph(folder: str, name: str) -> Graph:
    """Load the graph in ``folder/name.npz``.

    Raises:
        UserError: there is no such file, it is not an ``.npz`` or lacks keys; as ``make_graph``.
    """
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in Path(folder).glob("*.npz"))) or "no .npz file"
        raise UserError(f"there is no {path}; the folder has {have}: set data.folder to where the graphs are")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # the readers of numpy, zipfile and zlib raise many kinds
        raise UserError(f"cannot read {path}: {error}; expected an .npz of plain arrays: fetch it anew") from None
    if "edges" not in arrays:
        raise UserError(f"{path} has no key 'edges'; it has {', '.join(arrays) or 'none'}")
    features = _features(arrays, path)
    split = None
    if all(key in arrays for key in _SPLIT):
        split = dict(zip(("train", "validation", "test"), (arrays[key] for key in _SPLIT), strict=True))
    sha1 = hashlib.sha1(path.read_bytes()).hexdigest()
    return make_graph(name, arrays["edges"], features, arrays.get("labels"), split, sha1=sha1)


def make_graph(
    name: str,
    edges: Any,
    features: Any,
    labels: Any = None,
    split: Mapping[str, Any] | None = None,
    *,
    sha1: str = "",
) -> Graph:
    """Make a graph from arrays.

    Args:
        name: for messages and tables.
        edges: (E, 2), whole numbers; either direction, each edge once.
        features: (n, f).
        labels: (n,), whole numbers from 0.
        split: indices of nodes by ``train``, ``validation``, ``test``.
        sha1: of the file they are from.

    Raises:
        UserError: no nodes or no edges, edges of another shape, to nodes that do not exist or listed twice;
            features or labels that do not fit the nodes, or are not finite; a split whose parts overlap.
    """
    edges, values = np.asarray(edges), _dense(name, features)
    if edges.ndim != 2 or edges.shape[-1] != 2 or (edges.size and not np.issubdtype(edges.dtype, np.integer)):
        raise UserError(f"{name}: edges are {edges.dtype} of shape {edges.shape}; expected whole numbers, (E, 2)")
    if values.ndim != 2 or 0 in values.shape or not len(edges):
        raise UserError(
            f"{name}: the graph is empty, {len(edges)} edges and features of shape {tuple(values.shape)}; expected at "
            "least one edge, one node and one feature"
        )
    nodes = len(values)
    if not bool(torch.isfinite(values).all()):
        row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise UserError(f"{name}: feature {column} of node {row} is {values[row, column]}; expected finite numbers")
    pairs = np.sort(edges.astype(np.int64), axis=1)
    outside = (pairs[:, 0] < 0) | (pairs[:, 1] >= nodes)
    if outside.any():
        at = int(outside.argmax())
        raise UserError(
            f"{name}: edge {at}, {edges[at].tolist()}, leads to a node that does not exist; expected 0 to {nodes - 1}, "
            "one row of features each"
        )
    unique = np.unique(pairs, axis=0)
    if len(unique) < len(pairs):
        raise UserError(
            f"{name}: {len(pairs) - len(unique)} of {len(pairs)} edges are listed twice; list each once, in one "
            "direction"
        )
    return Graph(name, torch.from_numpy(unique), values, _labels(name, labels, nodes), _split(name, split, nodes), sha1)


def with_binned_labels(graph: Graph, column: int, bins: list[float]) -> Graph:
    """Return the graph whose labels are a feature, cut into classes at ``bins``, and no feature any more.

    Raises UserError for a column that does not exist or bins that do not rise.
    """
    width = graph.features.shape[1]
    if not 0 <= column < width or width < 2:
        raise UserError(f"data.label_column={column}; expected 0 to {width - 1}, and another feature beside it")
    if not bins or sorted(set(bins)) != list(bins):
        raise UserError(f"data.label_bins={bins}; expected ascending numbers, at which data.label_column is cut")
    labels = torch.bucketize(
        graph.features[:, column].contiguous(), torch.tensor(bins, dtype=torch.float64), right=True
    )
    others = [i for i in range(width) if i != column]
    return Graph(graph.name, graph.edges, graph.features[:, others], labels, graph.split, graph.sha1)


# ------------------------------------------------------------------------------------------------------------- walking


def components(graph: Graph) -> list[int]:
    """Return nodes of each connected component, largest first."""
    neighbours, found, sizes = _neighbours(graph), np.full(graph.nodes, -1), []
    for start in range(graph.nodes):
        if found[start] < 0:
            before = int((found >= 0).sum())
            _walk(neighbours, start, found)
            sizes.append(int((found >= 0).sum()) - before)
    return sorted(sizes, reverse=True)


def depths(graph: Graph, root: int) -> Tensor:
    """Return edges on the shortest path from a node to every other, (n,); -1 where there is none.

    Raises UserError if there is no such node.
    """
    if not 0 <= root < graph.nodes:
        raise UserError(f"data.root={root}; expected a node of {graph.name}, 0 to {graph.nodes - 1}")
    found = np.full(graph.nodes, -1)
    _walk(_neighbours(graph), root, found)
    return torch.from_numpy(found)


def middle(graph: Graph) -> int:
    """Return a node in the middle of a longest shortest path of the largest component; in a tree its centre."""
    start, most = 0, 0
    seen = torch.zeros(graph.nodes, dtype=torch.bool)
    for node in range(graph.nodes):
        if not seen[node]:
            reached = depths(graph, node) >= 0
            seen |= reached
            if int(reached.sum()) > most:
                start, most = node, int(reached.sum())
    one_end = int(depths(graph, start).argmax())
    from_one = depths(graph, one_end)
    length = int(from_one.max())
    from_other = depths(graph, int(from_one.argmax()))
    on_path = (from_one + from_other == length) & (from_one == length // 2)
    return int(on_path.nonzero()[0])


def _neighbours(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """CSR without values: (start of each node's neighbours (n + 1,), neighbours (2 E,))."""
    both = torch.cat([graph.edges, graph.edges.flip(1)]).numpy()
    order = np.argsort(both[:, 0], kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(both[:, 0], minlength=graph.nodes))])
    return starts, both[order, 1]


def _walk(neighbours: tuple[np.ndarray, np.ndarray], start: int, found: np.ndarray) -> None:
    """Breadth first; write the depth of every node reached into ``found``, where the others are negative."""
    starts, targets = neighbours
    found[start], frontier, depth = 0, [start], 0
    while frontier:
        depth += 1
        reached = []
        for node in frontier:
            for other in targets[starts[node] : starts[node + 1]].tolist():
                if found[other] < 0:
                    found[other] = depth
                    reached.append(other)
        frontier = reached


# ------------------------------------------------------------------------------------------------------------- reading


def _features(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
    for key in ("features", "attributes"):
        if key in arrays:
            return arrays[key]
    sparse = ("feature_indices", "feature_indptr", "feature_values", "num_features")
    if not all(key in arrays for key in sparse):
        raise UserError(
            f"{path} has no features: expected the key 'features', 'attributes', or all of {', '.join(sparse)}; it has "
            f"{', '.join(arrays)}"
        )
    indices, starts, values, count = (arrays[key] for key in sparse)
    try:
        if starts.ndim != 1 or starts[0] != 0 or starts[-1] != len(indices) or len(indices) != len(values):
            raise ValueError("feature_indptr does not lead from 0 to the number of feature_indices and feature_values")
        check_memory(8 * (len(starts) - 1) * int(count), f"{path}: a dense matrix of its features", "fetch it anew")
        dense = np.zeros((len(starts) - 1, int(count)))
        rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        dense[rows, indices] = values
    except UserError:
        raise
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: {', '.join(sparse)} do not make a sparse matrix: {error}") from None
    return dense


def _dense(name: str, features: Any) -> Tensor:
    given = np.asarray(features)
    if not (np.issubdtype(given.dtype, np.integer) or np.issubdtype(given.dtype, np.floating) or given.dtype == bool):
        raise UserError(f"{name}: features are {given.dtype}; expected numbers")
    return torch.as_tensor(given.astype(np.float64))


def _labels(name: str, labels: Any, nodes: int) -> Tensor | None:
    if labels is None:
        return None
    values = np.asarray(labels)
    if values.shape != (nodes,) or not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        raise UserError(
            f"{name}: labels are {values.dtype} of shape {values.shape}; expected a whole number >= 0 for each of the "
            f"{nodes} nodes"
        )
    if int(values.max()) >= max(nodes, 2):
        raise UserError(
            f"{name}: node {int(values.argmax())} has label {int(values.max())}; expected less than {nodes}"
        )
    return torch.from_numpy(values.astype(np.int64))


def _split(name: str, split: Mapping[str, Any] | None, nodes: int) -> dict[str, Tensor] | None:
    if split is None:
        return None
    for key, value in split.items():
        given = np.asarray(value)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"{name}: its {key} nodes are {given.dtype} of shape {given.shape}; expected whole numbers")
    parts = {key: torch.from_numpy(np.asarray(value).astype(np.int64)) for key, value in split.items()}
    together = torch.cat(list(parts.values()))
    if not all(map(len, parts.values())) or len(together.unique()) < len(together):
        raise UserError(f"{name}: parts of its split are empty or overlap; expected each node in one of them at most")
    if int(together.min()) < 0 or int(together.max()) >= nodes:
        raise UserError(f"{name}: its split names node {int(together.max())}; expected 0 to {nodes - 1}")
    return parts
