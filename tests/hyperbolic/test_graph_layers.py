"""Averages, convolutions, decoders and pictures against literal formulas; scores against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic.adjacency import Adjacency
from lowrank_train.hyperbolic.classifiers import EuclideanClassifier, LorentzClassifier
from lowrank_train.hyperbolic.graphs.config import GraphConfig, GraphModelConfig
from lowrank_train.hyperbolic.graphs.layers import GraphConvolution, LorentzGraphConvolution
from lowrank_train.hyperbolic.graphs.network import GraphNetwork, NodeFeatures, with_degrees
from lowrank_train.hyperbolic.graphs.report import spearman
from lowrank_train.hyperbolic.graphs.scores import average_precision, micro_f1, roc_auc
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.spaces import SPACES, Euclidean, Lorentz

EDGES = torch.tensor([[0, 1], [1, 2], [1, 3], [4, 4]])
NODES = 5
K = 2.0


def dense_adjacency() -> Tensor:
    matrix = torch.eye(NODES, dtype=torch.float64)
    for a, b in EDGES.tolist():
        matrix[a, b] = matrix[b, a] = 1
    return matrix / matrix.sum(1, keepdim=True)


def adjacency() -> Adjacency:
    return Adjacency(EDGES, NODES, torch.float64)


def points(*shape: int, k: float = K) -> Tensor:
    return lorentz.on_manifold(torch.randn(*shape, 3, dtype=torch.float64), k)


def test_average_is_the_normalised_product_and_so_is_its_gradient() -> None:
    x = torch.randn(NODES, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(adjacency().average(x), dense_adjacency() @ x)
    assert torch.autograd.gradcheck(adjacency().average, (x,))


def test_attention_is_a_softmax_over_neighbours() -> None:
    own = adjacency()
    x = torch.randn(NODES, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(len(own.rows), dtype=torch.float64, requires_grad=True)
    dense = torch.full((NODES, NODES), -math.inf, dtype=torch.float64)
    dense[own.rows, own.columns] = logits.detach()
    assert torch.equal(dense > -math.inf, dense_adjacency() > 0)
    torch.testing.assert_close(own.attend(x, logits), torch.softmax(dense, dim=1) @ x)
    torch.testing.assert_close(own.attend(x, logits + 500), own.attend(x, logits))
    assert torch.autograd.gradcheck(own.attend, (x, logits))


@pytest.mark.parametrize("attention", [False, True])
def test_lorentz_convolution_is_map_then_centroid(attention: bool) -> None:
    layer = LorentzGraphConvolution(4, 5, curvature=K, attention=attention).double()
    x = points(NODES)
    h, weights = layer.map(x), dense_adjacency()
    if attention:
        query, key = layer.query(h), layer.key(h)
        logits = (2 * K + 2 * lorentz.inner(query[:, None], key[None])) / math.sqrt(5)
        weights = torch.softmax(logits.masked_fill(weights == 0, -math.inf), dim=1)
    expected = torch.stack([lorentz.centroid(row @ h, K) for row in weights])
    torch.testing.assert_close(layer(x, adjacency()), expected)
    lorentz.check_points(expected, K)


@pytest.mark.parametrize("attention", [False, True])
def test_euclidean_twin_is_map_then_average(attention: bool) -> None:
    layer = GraphConvolution(4, 5, activation=torch.relu, attention=attention).double()
    x = torch.randn(NODES, 4, dtype=torch.float64)
    h, weights = torch.relu(x) @ layer.linear.weight.mT, dense_adjacency()
    if attention:
        squares = torch.cdist(layer.query(h), layer.key(h)) ** 2
        weights = torch.softmax((-squares / math.sqrt(5)).masked_fill(weights == 0, -math.inf), dim=1)
    torch.testing.assert_close(layer(x, adjacency()), weights @ h)


def test_classes_are_scored_by_distance_to_centres() -> None:
    layer = LorentzClassifier(4, 3, curvature=K).double()
    nn.init.normal_(layer.bias)
    x = points(6)
    scores = torch.stack([-lorentz.squared_distance(x, c, K) for c in layer.centres], dim=1) + layer.bias
    torch.testing.assert_close(layer(x), scores)
    lorentz.check_points(layer.centres, K, tolerance=1e-6)
    by_role = {group["role"]: group for group in optim.param_groups(layer)}
    assert by_role["points"]["manifold"] == ("lorentz", K)
    assert by_role["points"]["params"][0][1] is layer.centres
    twin = EuclideanClassifier(3, 2).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(twin(x), -(torch.cdist(x, twin.centres) ** 2) + twin.bias)


@pytest.mark.parametrize("name", SPACES)
def test_pairs_are_scored_by_distance(name: str) -> None:
    model = GraphModelConfig(name, curvature=K, width=4, convolutions=1)  # type: ignore[arg-type]
    network = GraphNetwork(model, 4, None)
    x = points(NODES) if name == "lorentz" else torch.randn(NODES, 4, dtype=torch.float64)
    pairs = torch.tensor([[0, 3], [2, 2]])
    difference = x[0] - x[3]
    squared = float(difference[1:] @ difference[1:])
    squared += float(-(difference[0] ** 2) if name == "lorentz" else difference[0] ** 2)
    torch.testing.assert_close(
        network.pair_scores(x, pairs), torch.tensor([-squared, 0.0], dtype=torch.float64), atol=1e-9, rtol=1e-9
    )


def test_picture_shows_true_distances_where_two_directions_are_all() -> None:
    """Points of a hyperbolic plane: their Poincare disk, moved so that the centroid is in the middle."""
    plane = torch.zeros(8, 4, dtype=torch.float64)
    plane[:, :2] = torch.randn(8, 2, dtype=torch.float64) + torch.tensor([1.5, 0.0])
    x = lorentz.on_manifold(plane, K)
    places = Lorentz(K).picture(x)
    assert places.norm(dim=1).max() < 1

    def disk_distance(a: Tensor, b: Tensor) -> Tensor:
        gap = 2 * (a - b).square().sum(-1) / ((1 - a.square().sum(-1)) * (1 - b.square().sum(-1)))
        return math.sqrt(K) * torch.acosh(1 + gap)

    expected = lorentz.distance(x[:, None], x[None], K)
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(disk_distance(places[:, None], places[None])[off], expected[off], rtol=1e-6, atol=1e-6)
    centre = lorentz.centroid(x.mean(0), K)
    middle = disk_distance(places, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(middle, lorentz.distance(x, centre, K))


def test_euclidean_picture_has_the_two_longest_directions() -> None:
    x = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 3.0])
    places = Euclidean(1.0).picture(x)
    spread = torch.linalg.svdvals(x - x.mean(0))
    torch.testing.assert_close(places.norm(dim=0), spread[:2])


def test_error_tells_points_from_what_is_none() -> None:
    assert Lorentz(K).error(points(3)) < 1e-12
    assert Lorentz(K).error(points(3) * 1.01) > 1e-3
    assert Euclidean(1.0).error(torch.ones(2, 2)) == 0
    assert Euclidean(1.0).error(torch.full((2, 2), math.nan)) == math.inf


@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_scikit_learn(ties: bool) -> None:
    positive, negative = torch.randn(40) + 0.5, torch.randn(60)
    if ties:
        positive, negative = positive.round(), negative.round()
    labels, scores = [1] * 40 + [0] * 60, torch.cat([positive, negative]).tolist()
    assert roc_auc(positive, negative) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert average_precision(positive, negative) == pytest.approx(expected, abs=1e-12)
    guesses, classes = torch.randn(30, 4), torch.randint(4, (30,))
    expected = sklearn_metrics.f1_score(classes.tolist(), guesses.argmax(1).tolist(), average="micro")
    assert micro_f1(guesses, classes) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(4)) is None
    # ranks 1 2 3 4 and 1.5 1.5 3.5 3.5: covariance 4 over sqrt(5 * 4)
    assert spearman(x, torch.tensor([1, 1, 2, 2])) == pytest.approx(4 / math.sqrt(20))


def test_degrees_count_known_edges() -> None:
    features = torch.zeros(NODES, 1, dtype=torch.float64)
    out = with_degrees(features, EDGES)
    assert out.shape == (NODES, 8)
    assert out[:, 1:7].argmax(1).tolist() == [1, 3, 1, 1, 1]
    assert bool((out[:, 7] == 1).all())
    star = torch.tensor([[0, i] for i in range(1, 9)])
    assert with_degrees(torch.zeros(9, 1), star)[0, 1:7].argmax() == 5


def test_dropout_of_features_spares_the_zeros() -> None:
    x = torch.ones(400, 50)
    x[:, ::2] = 0
    out = NodeFeatures(x).dropped(0.75)
    assert not out[:, ::2].any()
    assert set(out.unique().tolist()) == {0.0, 4.0}
    assert float(out[:, 1::2].mean()) == pytest.approx(1, abs=0.05)


def test_network_drops_in_training_only() -> None:
    torch.manual_seed(0)
    network = GraphNetwork(GraphModelConfig(width=4, dropout=0.5), 3, None).double()
    features = NodeFeatures(network.geometry.enter(torch.randn(NODES, 3, dtype=torch.float64)))
    network.eval()
    assert torch.equal(network(features, adjacency()), network(features, adjacency()))
    network.train()
    assert not torch.equal(network(features, adjacency()), network(features, adjacency()))


@pytest.mark.parametrize("change", ["convolutions=0", "width=1", "dropout=1"])
def test_sizes_out_of_range_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{change}(\.0)?; expected a number"):
        load_recipe(GraphConfig, [f"model.{change}"])
