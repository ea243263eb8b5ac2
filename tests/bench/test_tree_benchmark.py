"""The tree in hyperbolic space: its score, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank_train.bench.tree import METHODS, TreeConfig, embed_tree, mean_average_precision, measure, tree_edges
from lowrank_train.common.errors import UserError

pytestmark = pytest.mark.slow


def test_a_tree_has_every_edge_in_both_directions() -> None:
    edges = tree_edges(2)
    assert edges.shape == (2 * 12, 2)
    assert {tuple(pair) for pair in edges.tolist()} == {tuple(pair) for pair in edges.flip(1).tolist()}
    assert edges[edges[:, 0] == 0, 1].tolist() == [1, 2, 3]
    assert sorted(edges[edges[:, 0] == 2, 1].tolist()) == [0, 7, 8, 9]


def test_precision_of_points_by_hand() -> None:
    """On a line at 0, 1, 2, 5: neighbours are the first and third, the second and fourth."""
    at = torch.tensor([0.0, 1.0, 2.0, 5.0]).unsqueeze(1)
    points = torch.cat([at.cosh(), at.sinh()], dim=1)
    edges = torch.tensor([[0, 2], [2, 0], [1, 3], [3, 1]])
    assert mean_average_precision(points, edges) == pytest.approx(100 * (1 / 2 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_whole_moments_embed_a_small_tree_nearly_without_error() -> None:
    found = embed_tree(TreeConfig("riemannian_adamw", 0.1, seed=0, depth=3, steps=250))
    assert found["score"] > 95
    assert found["state_bytes"] == 4 * (40 * 16 + 40 + 1)


def test_the_table_and_the_record(tmp_path: Path) -> None:
    out = ["--depth", "2", "--steps", "5", "--seeds", "0", "1", "--lr", "0.1", "--out", str(tmp_path)]
    table = measure(out)
    figures = json.loads((tmp_path / "tree.json").read_text())
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == list(METHODS)
    assert len(figures["runs"]) == 2 * len(METHODS)
    assert table in (tmp_path / "tree.md").read_text()
    for wrong, message in ((["--depth", "0"], "--depth 0"), (["--lr", "0"], r"--lr 0\.0; expected numbers > 0")):
        with pytest.raises(UserError, match=message):
            measure([*wrong, "--out", str(tmp_path)])
