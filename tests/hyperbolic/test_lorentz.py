"""Points, distances and layers of the Lorentz model, against geoopt and literal formulas in float64."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic.layers import LorentzAttention, LorentzEmbedding, LorentzLinear
from lowrank_train.layers.lora import add_adapters
from lowrank_train.layers.plain import merge
from lowrank_train.layers.spectral import SpectralLinear, to_spectral

CURVATURES = [1.0, 0.5, 3.0]


def points(*shape: int, k: float = 1.0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(..., 5)"""
    return lorentz.on_manifold(scale * torch.randn(*shape, 4, dtype=dtype), k)


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("k", CURVATURES)
def test_geometry_is_that_of_geoopt(k: float) -> None:
    manifold = geoopt.Lorentz(k=torch.tensor(k, dtype=torch.float64))
    x, y, v = points(7, k=k), points(7, k=k), torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(lorentz.inner(x, y), manifold.inner(x, x, y))
    torch.testing.assert_close(lorentz.distance(x, y, k), manifold.dist(x, y))
    tangent = torch.cat([torch.zeros(7, 1, dtype=torch.float64), v], dim=1)
    torch.testing.assert_close(lorentz.lift(v, k), manifold.expmap0(tangent))
    difference = x - y
    torch.testing.assert_close(lorentz.squared_distance(x, y, k), manifold.inner(x, difference))


@pytest.mark.parametrize("k", CURVATURES)
def test_lift_goes_as_far_as_the_vector_is_long(k: float) -> None:
    v = torch.randn(6, 4, dtype=torch.float64)
    origin = lorentz.on_manifold(torch.zeros(6, 4, dtype=torch.float64), k)
    torch.testing.assert_close(lorentz.distance(origin, lorentz.lift(v, k), k), v.norm(dim=1))
    assert torch.equal(lorentz.lift(torch.zeros(2, 4), k), lorentz.on_manifold(torch.zeros(2, 4), k))


def test_far_points_stay_on_the_manifold_in_float32() -> None:
    far = lorentz.lift(torch.tensor([[50.0, 0.0, 0.0, 0.0]]))
    assert torch.isfinite(far).all()
    torch.testing.assert_close(far[0, 0], torch.tensor(math.cosh(lorentz.MAX_RADIUS)))
    lorentz.check_points(far)
    assert lorentz.distance(far, far).item() == 0


def test_gradient_of_lift_at_the_origin_is_finite() -> None:
    v = torch.zeros(1, 3, requires_grad=True)
    lorentz.lift(v).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, torch.ones(1, 3))


@pytest.mark.parametrize("k", CURVATURES)
def test_centroid_has_the_least_squared_distance(k: float) -> None:
    own, weights = points(5, k=k), torch.rand(5, dtype=torch.float64)
    centre = lorentz.centroid(weights @ own, k)
    lorentz.check_points(centre, k)

    def cost(c: Tensor) -> Tensor:
        return weights @ lorentz.squared_distance(own, c, k)

    nearby = lorentz.on_manifold(centre[1:] + 0.01 * torch.randn(200, 4, dtype=torch.float64), k)
    assert all(cost(other) > cost(centre) for other in nearby)


def test_centroid_of_far_points_stays_on_the_manifold_in_float32() -> None:
    """Of pairs of near points at radius 10, where float32 knows <s, s> = -1 to within 10 only."""
    directions = torch.nn.functional.normalize(torch.randn(500, 4), dim=1)
    first, second = (lorentz.lift(10 * directions + 1e-4 * torch.randn(500, 4)) for _ in range(2))
    total = (first + second) / 2
    assert (lorentz.inner(total, total) > -0.5).any()  # what a literal formula would divide by the root of
    centres = lorentz.centroid(total)
    assert lorentz.time_error(centres) < 1e-6
    assert float((centres[:, 0] / total[:, 0]).max()) < 1.5
    assert torch.equal(lorentz.centroid(torch.zeros(2, 5), weight=torch.zeros(2, 1)), torch.zeros(2, 5))


def test_poincare_ball_keeps_distances_from_the_centre() -> None:
    x = points(9, k=2.0)
    origin = lorentz.on_manifold(torch.zeros(4, dtype=torch.float64), 2.0)
    radius = lorentz.poincare(x, 2.0).norm(dim=1)
    assert (radius < 1).all()
    torch.testing.assert_close(2 * math.sqrt(2) * torch.atanh(radius), lorentz.distance(x, origin, 2.0))


def test_manifold_error_is_what_is_missing() -> None:
    x = points(3)
    assert lorentz.manifold_error(x) < 1e-12
    x[1, 0] *= 2  # 3 x_0^2 too much
    assert lorentz.manifold_error(x) == pytest.approx(0.75 * float(x[1, 0]) ** 2, rel=1e-9)
    assert lorentz.time_error(x) == pytest.approx(1)  # twice what it should be
    assert lorentz.time_error(points(3)) < 1e-15
    assert lorentz.time_error(points(0)) == 0
    assert lorentz.manifold_error(-points(1)) == math.inf
    assert lorentz.manifold_error(points(1) * math.nan) == math.inf
    assert lorentz.manifold_error(points(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_points_are_accepted_to_rounding(dtype: torch.dtype) -> None:
    x = points(4, scale=1000.0, dtype=dtype)
    assert lorentz.check_points(x) is x


@pytest.mark.parametrize("factor", [1.001, -1.0, math.nan], ids=["off", "other sheet", "nan"])
def test_a_point_off_the_manifold_is_named(factor: float) -> None:
    x = points(4)
    x[2] *= factor
    with pytest.raises(UserError, match=r"table: the point at index \(2,\) is not on the manifold.*on_manifold"):
        lorentz.check_points(x, name="table")


def test_tolerance_is_the_callers() -> None:
    x = points(4) * 1.001
    lorentz.check_points(x, tolerance=0.01)
    with pytest.raises(UserError, match="relative tolerance 1e-05"):
        lorentz.check_points(x, tolerance=1e-5)


def test_a_point_needs_a_time_and_a_coordinate() -> None:
    with pytest.raises(UserError, match=r"shape \(3, 1\); expected \(..., n \+ 1\)"):
        lorentz.check_points(torch.ones(3, 1))


@pytest.mark.parametrize("k", [-1.0, 0, math.inf, math.nan, "1", True])
def test_curvature_that_is_none_is_refused(k: object) -> None:
    with pytest.raises(UserError, match=r"curvature=.*; expected k > 0"):
        LorentzLinear(4, 4, curvature=k)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- layers


@torch.no_grad()
def literal_linear(layer: LorentzLinear, x: Tensor, k: float, residual: Tensor | None = None) -> Tensor:
    """Row by row, as written in the docstring."""
    rows = []
    for i, point in enumerate(x):
        y = layer.linear.weight @ point + layer.linear.bias
        if residual is not None:
            y = y + residual[i]
        t = 1 / (1 + math.exp(-y[0])) * math.exp(layer.scale.item()) + 1.1 * math.sqrt(k)
        s = math.sqrt((t**2 - k) / float(y[1:] @ y[1:])) * y[1:]
        rows.append(torch.cat([torch.tensor([t], dtype=x.dtype), s]))
    return torch.stack(rows)


@pytest.mark.parametrize("k", CURVATURES)
def test_linear_is_the_formula_and_ends_on_the_manifold(k: float) -> None:
    layer = LorentzLinear(5, 7, curvature=k).double()
    nn.init.normal_(layer.linear.bias)
    x, residual = points(6, k=k), torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), literal_linear(layer, x, k))
    torch.testing.assert_close(layer(x, residual), literal_linear(layer, x, k, residual))
    lorentz.check_points(layer(x), k)


def test_a_direction_without_length_gives_the_origin() -> None:
    layer = LorentzLinear(3, 3)
    out = layer(torch.tensor([[1.0, 0.0, 0.0]]))  # times have no weight at first, so y = 0
    assert torch.equal(out, torch.tensor([[1.0, 0.0, 0.0]]))
    out.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.grad is not None)


def test_initial_weights_ignore_every_time() -> None:
    layer = LorentzLinear(12, 6, in_heads=3, bound=0.02)
    times = layer.linear.weight[:, [0, 4, 8]]
    assert not times.any()
    others = layer.linear.weight[:, [1, 2, 3, 5, 6, 7, 9, 10, 11]]
    assert others.all()
    assert others.abs().max() <= 0.02
    assert not layer.linear.bias.any()


def test_heads_are_points_of_their_own() -> None:
    layer = LorentzLinear(5, 12, heads=3, curvature=2.0).double()
    out = layer(points(4, 2, k=2.0))
    assert out.shape == (4, 2, 3, 4)
    lorentz.check_points(out, 2.0)


@pytest.mark.parametrize(
    ("sizes", "heads"), [((5, 7), {"heads": 2}), ((7, 5), {"in_heads": 2}), ((4, 4), {"heads": 4})]
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int], heads: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"_features=\d with \d head.*expected a multiple"):
        LorentzLinear(*sizes, **heads)


def test_dropout_and_activation_act_before_the_map() -> None:
    layer = LorentzLinear(5, 4, dropout=0.5, activation=torch.relu).double()
    x = points(6)
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.relu(x), 0.5)
    expected = LorentzLinear(5, 4).double()
    expected.load_state_dict(layer.state_dict())
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected(kept))
    torch.testing.assert_close(layer.eval()(x), expected(torch.relu(x)))


@pytest.mark.parametrize(
    ("width", "heads", "max_time", "k"), [(32, 4, 4.0, 1.0), (64, 2, 10.0, 1.0), (24, 4, 3.0, 2.0)]
)
def test_attention_begins_level(width: int, heads: int, max_time: float, k: float) -> None:
    """Of points with middling times logits have a standard deviation of about 1, whatever the sizes."""
    torch.manual_seed(0)
    layer = LorentzAttention(width, heads, curvature=k, max_time=max_time)
    radius = math.sqrt((max_time / 2 + 1.1 * math.sqrt(k)) ** 2 - k)
    x = lorentz.on_manifold(radius * nn.functional.normalize(torch.randn(400, width - 1), dim=-1), k)
    with torch.no_grad():
        q, key = layer.query(x), layer.key(x)
        logits = (2 * k + 2 * lorentz.inner(q[:, None], key[None])) / layer.scale
    assert 0.6 < float(logits.std(dim=1).mean()) < 1.6


def test_attention_is_the_formula_and_heeds_its_mask() -> None:
    k = 2.0
    layer = LorentzAttention(8, 2, curvature=k).double()
    query, memory = (lorentz.on_manifold(torch.randn(3, n, 7, dtype=torch.float64), k) for n in (4, 5))
    mask = torch.ones(3, 1, 4, 5, dtype=torch.bool)
    mask[..., -1] = False
    out = layer(query, memory, mask)
    lorentz.check_points(out, k)
    joined = torch.empty(3, 4, 8, dtype=torch.float64)
    q, key, value = layer.query(query), layer.key(memory), layer.value(memory)
    for b in range(3):
        for head in range(2):
            for i in range(4):
                seen = range(4)
                logits = [2 * k + 2 * lorentz.inner(q[b, i, head], key[b, j, head]) for j in seen]
                weights = torch.softmax(torch.stack(logits) / layer.scale, dim=0)
                total = sum((weights[j] * value[b, j, head] for j in seen), torch.zeros(4, dtype=torch.float64))
                joined[b, i, 4 * head : 4 * head + 4] = lorentz.centroid(total, k)
    torch.testing.assert_close(out, layer.output(joined))
    memory[:, -1] = lorentz.on_manifold(torch.randn(3, 7, dtype=torch.float64), k)  # which nobody sees
    torch.testing.assert_close(layer(query, memory, mask), out)


def test_embedding_declares_its_manifold() -> None:
    table = LorentzEmbedding(6, 5, curvature=2.0, std=0.5)
    lorentz.check_points(table.weight, 2.0)
    assert table(torch.tensor([[1, 5]])).shape == (1, 2, 5)
    (points_group,) = optim.param_groups(table)
    assert (points_group["role"], points_group["manifold"]) == ("points", ("lorentz", 2.0))
    x = points(3, k=2.0, dtype=torch.float32)
    torch.testing.assert_close(table.scores(x), -lorentz.squared_distance(x[:, None], table.weight, 2.0))


def test_embedding_of_given_points() -> None:
    own = points(3)
    assert torch.equal(LorentzEmbedding(3, 5, points=own).weight, own)
    with pytest.raises(UserError, match=r"shape \(3, 5\); expected \(4, 5\)"):
        LorentzEmbedding(4, 5, points=own)
    with pytest.raises(UserError, match="not on the manifold"):
        LorentzEmbedding(3, 5, points=own * 2)


# ------------------------------------------------------------------------------------------- methods inside such layers


def test_spectral_factors_inside_a_lorentz_layer_and_back() -> None:
    model = nn.Sequential(LorentzLinear(5, 6), LorentzLinear(6, 6))
    x = points(4, dtype=torch.float32)
    before = model(x)
    to_spectral(model, 2, layers="")
    assert sum(isinstance(module, SpectralLinear) for module in model.modules()) == 2
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    lorentz.check_points(model(x))
    merge(model)
    assert type(model[0].linear) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_adapters_inside_a_lorentz_layer() -> None:
    model = nn.Sequential(LorentzLinear(5, 6), LorentzLinear(6, 6))
    x = points(4, dtype=torch.float32)
    before = model(x)
    add_adapters(model, 2, layers="")
    torch.testing.assert_close(model(x), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "0.scale" in trained
    assert "0.linear.base_layer.bias" in trained
    assert "0.linear.base_layer.weight" not in trained
