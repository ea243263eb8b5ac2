"""Points of manifolds: equal to the formulas and to geoopt, on the manifold in float32, never Euclidean by accident."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import geoopt
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lowrank_train import optim
from lowrank_train.optim.costs.sent import communicated_bytes
from lowrank_train.optim.manifolds.maps import Description, describe_manifold, find_manifold
from tests.distributed import run_distributed
from tests.optim.models import assert_equal, gradient, laid_out_as, run_steps, states, weights
from tests.reference.riemannian import Ball, Geometry, Lorentz, Sphere, adam, low_rank_adam

MANIFOLDS: dict[str, tuple[Description, Geometry]] = {
    "lorentz": (("lorentz", 1.0), Lorentz(1.0)),
    "lorentz 2.5": (("lorentz", 2.5), Lorentz(2.5)),
    "ball": (("poincare_ball", 1.0), Ball(1.0)),
    "ball 0.6": (("poincare_ball", 0.6), Ball(0.6)),
    "sphere": (("sphere",), Sphere()),
}
every_manifold = pytest.mark.parametrize("label", MANIFOLDS)
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8}
STEPS = 50


def points_of(description: Description, n: int, d: int, *, seed: int = 0, size: float = 1.0) -> Tensor:
    """Float64 points; of ball and hyperboloid some way from the origin."""
    numbers = size * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if description[0] == "poincare_ball":
        length = numbers.norm(dim=1, keepdim=True)
        return numbers / length * torch.tanh(length / 2) / math.sqrt(float(description[1]))
    return find_manifold(description).completed(numbers)


class Embeddings(nn.Module):
    """Points that know their manifold, beside a Euclidean layer."""

    def __init__(self, description: Any = ("lorentz", 1.0), n: int = 11, d: int = 6) -> None:
        super().__init__()
        self.points = nn.Embedding(n, d, dtype=torch.float64)
        self.points.parameter_manifolds = {"weight": description}
        self.linear = nn.Linear(d, 4, dtype=torch.float64)
        if self.points.weight.device.type != "meta":
            with torch.no_grad():
                self.points.weight.copy_(points_of(describe_manifold(description), n, d))


def group_of(param: Tensor, description: Any, **settings: Any) -> list[dict[str, Any]]:
    return [{"params": [("points", param)], "manifold": description, **settings}]


def gradients(shape: torch.Size, count: int) -> list[Tensor]:
    """Of 3, then without one of the points, which moves on by its momentum."""
    found = [gradient("points", shape, step) for step in range(count)]
    for step in range(5, count):
        found[step][1] = 0
    return found


def train(param: Tensor, optimizer: torch.optim.Optimizer, given: list[Tensor]) -> None:
    for value in given:
        param.grad = value.to(param.dtype)
        optimizer.step()


def first_moment(optimizer: optim.MatrixOptimizer, param: Tensor) -> Tensor:
    """In the ambient space."""
    manifold, state = find_manifold(optimizer.param_groups[0]["manifold"]), optimizer.state[param]
    coordinates = state["exp_avg"].double()
    if "basis" in state:
        coordinates = coordinates @ state["basis"].double()
    x = manifold.completed(param.detach().double())
    return manifold.lift(x, manifold.tangent(x, coordinates))


# ------------------------------------------------------------------------------------------------------- the formulas


@every_manifold
@pytest.mark.parametrize("amsgrad", [False, True])
def test_fifty_steps_are_those_of_the_formulas(label: str, amsgrad: bool) -> None:
    description, geometry = MANIFOLDS[label]
    param = nn.Parameter(points_of(description, 5, 4))
    start, given = param.detach().clone(), gradients(param.shape, STEPS)
    optimizer = optim.RiemannianAdamW(group_of(param, description), amsgrad=amsgrad, **HYPERPARAMETERS)
    train(param, optimizer, given)
    points, first, second = adam(geometry, start, given, amsgrad=amsgrad, **HYPERPARAMETERS)
    torch.testing.assert_close(param.detach(), points, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first_moment(optimizer, param), first, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"][:, 0], second, rtol=1e-9, atol=1e-12)
    assert (points - start).norm(dim=1).min() > 0.04, "they have gone somewhere"


GEOOPT: dict[str, Callable[[], Any]] = {
    "lorentz": lambda: geoopt.Lorentz(torch.tensor(1.7, dtype=torch.float64)),
    "ball": lambda: geoopt.PoincareBallExact(torch.tensor(0.6, dtype=torch.float64)),
    "stiefel": lambda: geoopt.Stiefel(canonical=False),
}


@pytest.mark.parametrize("label", GEOOPT)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_fifty_steps_are_those_of_geoopt(label: str, amsgrad: bool) -> None:
    """In float64, where its transport is parallel; on the sphere it projects, and so it is not compared."""
    torch.manual_seed(0)
    manifold = GEOOPT[label]()
    if label == "stiefel":
        start, size = manifold.random(5, 6, 3, dtype=torch.float64), torch.Size((5, 6, 3))
    else:
        start, size = manifold.random_normal(5, 6, dtype=torch.float64), torch.Size((5, 6))
    start = start.detach().as_subclass(Tensor)
    theirs = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    ours = nn.Parameter(start.clone())
    their_optimizer = geoopt.optim.RiemannianAdam([theirs], amsgrad=amsgrad, **HYPERPARAMETERS)
    optimizer = optim.RiemannianAdamW([{"params": [ours], "manifold": manifold}], amsgrad=amsgrad, **HYPERPARAMETERS)
    for value in gradients(size, STEPS):
        theirs.grad = value.clone()  # it writes into gradients
        their_optimizer.step()
        train(ours, optimizer, [value])
    torch.testing.assert_close(ours.detach(), theirs.detach().as_subclass(Tensor), rtol=1e-8, atol=1e-9)
    their_moment = their_optimizer.state[theirs]["exp_avg"]
    torch.testing.assert_close(first_moment(optimizer, ours), their_moment, rtol=1e-7, atol=1e-8)


@every_manifold
def test_coordinates_have_the_length_of_the_vector_and_transport_keeps_it(label: str) -> None:
    """A step there and back ends where it began, with the moment it began with."""
    description, geometry = MANIFOLDS[label]
    manifold = find_manifold(description)
    x = points_of(description, 7, 5, size=1.5)
    shape = (7, manifold.coordinates((7, 5))[1])
    u, m = (manifold.tangent(x, gradient(key, torch.Size(shape), 0)) for key in "um")
    vectors = manifold.lift(x, u)
    squares = torch.tensor([geometry.inner(p, v, v) for p, v in zip(x, vectors, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(squares, u.square().sum(1), rtol=1e-9, atol=1e-9)
    y, carried = manifold.move(x, u, torch.cat([m[:3], u[3:]]))
    torch.testing.assert_close(carried.norm(dim=1)[:3], m.norm(dim=1)[:3])
    back, returned = manifold.move(y[3:], -carried[3:], carried[3:])
    torch.testing.assert_close(back, x[3:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returned, u[3:], rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------ float32


def off_lorentz(points: Tensor) -> Tensor:
    """|<x, x> + 1| of what is stored, in float64."""
    x = points.detach().double()
    return (x[:, 1:].square().sum(1) - x[:, 0].square() + 1).abs()


def squared_distance(points: Tensor, targets: Tensor) -> Tensor:
    """Mean over the points."""
    product = points[:, 0] * targets[:, 0] - (points * targets)[:, 1:].sum(1)
    return torch.acosh(product.clamp_min(1 + 1e-6)).square().mean()


def at_radius(radius: float, n: int, d: int) -> Tensor:
    """Float32 points of the hyperboloid, at that distance from its origin in any direction."""
    space = torch.randn(n, d - 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    space = space / space.norm(dim=1, keepdim=True) * math.sinh(radius)
    return find_manifold(("lorentz", 1.0)).completed(torch.cat([torch.zeros(n, 1), space], 1)).float()


def test_float32_points_stay_on_the_hyperboloid_far_out_and_back() -> None:
    """2000 steps at lr 0.02, d 16: to radius 6, where geoopt 0.5.1 has turned into nan at step 405, and back to 3."""
    n, d = 32, 16
    param = nn.Parameter(at_radius(0.1, n, d))
    optimizer = optim.RiemannianAdamW(group_of(param, ("lorentz", 1.0)), lr=0.02)
    farthest = torch.zeros(())
    for targets, steps in ((at_radius(6.0, n, d), 900), (at_radius(3.0, n, d), 1100)):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = squared_distance(param, targets)
            loss.backward()
            optimizer.step()
        farthest = torch.maximum(farthest, param.detach()[:, 0].max())
        assert (off_lorentz(param) <= 2.0**-23 * param.detach()[:, 0].double().square()).all(), "rounding of storage"
    assert farthest > 100
    assert off_lorentz(param).max() <= 1e-4
    assert loss < 1e-2
    assert all(value.isfinite().all() for value in optimizer.state[param].values())
    assert (optimizer.state[param]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_the_ball_stay_inside_whatever_pulls_them(dtype: torch.dtype) -> None:
    """And come back: the boundary holds nothing fast."""
    param = nn.Parameter(points_of(("poincare_ball", 2.0), 9, 5).to(dtype))
    optimizer = optim.RiemannianAdamW(group_of(param, ("poincare_ball", 2.0)), lr=0.5, betas=(0.9, 0.9))
    margin = 4e-3 if dtype == torch.float32 else 1e-5
    for pull, steps in ((-1, 60), (1, 250)):
        for _ in range(steps):
            train(param, optimizer, [pull * param.detach()])
        length = math.sqrt(2.0) * param.detach().norm(dim=1)
        if pull < 0:
            torch.testing.assert_close(length, torch.full_like(length, 1 - margin), rtol=1e-6, atol=0)
    assert (length < 0.9).all()
    assert param.isfinite().all()


@every_manifold
def test_without_a_gradient_or_a_rate_not_a_bit_changes(label: str) -> None:
    """Also of points that rounding has left beside the manifold."""
    description, _ = MANIFOLDS[label]
    param = nn.Parameter(points_of(description, 9, 5).float() * (1 + 1e-5))
    before = param.detach().clone()
    optimizer = optim.RiemannianAdamW(group_of(param, description))
    train(param, optimizer, [torch.zeros_like(param)] * 3)
    assert torch.equal(param, before)
    assert not optimizer.state[param]["exp_avg"].any()
    optimizer.param_groups[0]["lr"] = 0.0
    train(param, optimizer, gradients(param.shape, 3))
    assert torch.equal(param, before)


def test_weights_without_numbers_leave_the_state_alone() -> None:
    """A model made by ``to_empty``, whose optimizer is asked for its state before both are loaded."""
    param = nn.Parameter(torch.full((4, 6), torch.nan))
    param.data[1] = torch.inf
    for description, _ in MANIFOLDS.values():
        optimizer = optim.RiemannianAdamW(group_of(param, description), amsgrad=True)
        train(param, optimizer, [torch.zeros_like(param)])
        assert not any(value.any() for key, value in optimizer.state[param].items() if key != "step")


def test_a_huge_gradient_is_a_step_of_bounded_length() -> None:
    """No cosh of it overflows: eps alone bounds nothing at step 1."""
    param = nn.Parameter(at_radius(1.0, 4, 6))
    optimizer = optim.RiemannianAdamW(group_of(param, ("lorentz", 1.0)), lr=1e6)
    train(param, optimizer, [1e30 * gradient("huge", param.shape, 0).float()])
    assert param.isfinite().all()


# ------------------------------------------------------------------------------------------------- in every optimizer


@pytest.mark.parametrize("name", [*optim.names(of_matrices=True), "riemannian_adamw"])
def test_every_optimizer_moves_points_alike(name: str) -> None:
    """Its own method is for its own roles; bytes are predicted."""
    finals = []
    settings: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.98), "eps": 1e-8}
    for other in ("riemannian_adamw", name):
        torch.manual_seed(0)
        model = Embeddings()
        optimizer = optim.create(other, model, **settings)
        (group,) = [group for group in optimizer.param_groups if group["role"] == "points"]
        assert (group["manifold"], group["weight_decay"]) == (("lorentz", 1.0), 0.0)
        assert optim.state_bytes(optimizer) == optim.predicted_state_bytes(other, Embeddings(), **settings)
        run_steps(model, optimizer, 0, 5)
        finals.append((weights(model)["points.weight"], optimizer.state[model.points.weight]))
    assert torch.equal(finals[0][0], finals[1][0])
    assert_equal(finals[0][1], finals[1][1])


def test_sst_and_relora_move_points_too() -> None:
    from lowrank_train.layers.spectral import to_spectral

    model, plain = Embeddings(), Embeddings()
    to_spectral(model, 2, layers="^linear$")
    run_steps(model, optim.SST(model, lr=0.03), 0, 5)
    run_steps(plain, optim.RiemannianAdamW(plain, lr=0.03), 0, 5)
    assert torch.equal(model.points.weight, plain.points.weight)


def test_euclidean_parameters_get_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = Embeddings(), Embeddings()
    theirs.load_state_dict(ours.state_dict())
    plain = [theirs.linear.weight, theirs.linear.bias]
    points = {"params": [ours.points.weight], "manifold": geoopt.Lorentz()}
    groups = [{"params": [ours.linear.weight, ours.linear.bias]}, points]
    run_steps(ours, optim.RiemannianAdamW(groups, lr=0.01, weight_decay=0.1), 0, 5)
    run_steps(theirs, torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, fused=True), 0, 5)
    assert torch.equal(ours.linear.weight, theirs.linear.weight)
    assert torch.equal(ours.linear.bias, theirs.linear.bias)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit", "4bit"])
def test_first_moments_in_few_bits_end_nearly_where_whole_ones_do(state_dtype: str) -> None:
    finals = []
    for dtype in (None, state_dtype):
        param = nn.Parameter(at_radius(1.0, 128, 33))
        optimizer = optim.RiemannianAdamW(group_of(param, ("lorentz", 1.0)), lr=0.05, state_dtype=dtype)
        for _ in range(150):
            optimizer.zero_grad()
            squared_distance(param, at_radius(2.0, 128, 33).roll(1, 0)).backward()
            optimizer.step()
        finals.append(
            (float(squared_distance(param, at_radius(2.0, 128, 33).roll(1, 0)).detach()), optimizer.state[param])
        )
        assert off_lorentz(param).max() < 1e-4
    stored = {"bfloat16": torch.bfloat16, "8bit": torch.int8, "4bit": torch.uint8}
    assert finals[1][1]["exp_avg"].dtype == stored[state_dtype]
    assert finals[1][1]["exp_avg_sq"].dtype == torch.float32
    assert finals[1][0] == pytest.approx(finals[0][0], abs=0.02)


# ----------------------------------------------------------------------------------------------------- low-rank moments


@every_manifold
def test_at_full_rank_nothing_is_approximated(label: str) -> None:
    description, _ = MANIFOLDS[label]
    finals = []
    for low_rank in (False, True):
        param = nn.Parameter(points_of(description, 9, 5))
        p = find_manifold(description).coordinates(param.shape)[1]
        settings = {"point_rank": p, "point_refresh_interval": 7} if low_rank else {}
        optimizer = optim.RiemannianAdamW(group_of(param, description), **HYPERPARAMETERS, **settings)
        train(param, optimizer, gradients(param.shape, 20))
        finals.append((param.detach(), first_moment(optimizer, param)))
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-10, atol=1e-10)


@every_manifold
def test_low_rank_moments_are_those_of_the_formulas(label: str) -> None:
    """Across three refreshes, the last moments included."""
    description, geometry = MANIFOLDS[label]
    param = nn.Parameter(points_of(description, 9, 6))
    start, given = param.detach().clone(), gradients(param.shape, 12)
    settings = {"point_rank": 2, "point_refresh_interval": 5}
    optimizer = optim.RiemannianAdamW(group_of(param, description), **HYPERPARAMETERS, **settings)
    train(param, optimizer, given)
    points, first, _ = low_rank_adam(geometry, start, given, rank=2, interval=5, **HYPERPARAMETERS)
    torch.testing.assert_close(param.detach(), points, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(first_moment(optimizer, param), first, rtol=1e-7, atol=1e-8)
    whole, _, _ = adam(geometry, start, given, **HYPERPARAMETERS)
    assert (points - whole).abs().max() > 1e-3, "rank 2 is an approximation here, or the test could not tell"


def test_low_rank_moments_take_what_is_predicted() -> None:
    param = torch.empty(1000, 65, device="meta")
    bytes_of = {
        rank: optim.predicted_state_bytes("riemannian_adamw", group_of(param, ("lorentz", 1.0)), point_rank=rank)
        for rank in (None, 8)
    }
    assert bytes_of == {None: 4 * (1000 * 64 + 1000 + 1), 8: 4 * (1000 * 8 + 8 * 64 + 1000 + 2)}
    real = nn.Parameter(at_radius(1.0, 1000, 65))
    optimizer = optim.RiemannianAdamW(group_of(real, ("lorentz", 1.0)), point_rank=8)
    assert optim.state_bytes(optimizer) == bytes_of[8]
    train(real, optimizer, gradients(real.shape, 2))
    assert optim.state_bytes(optimizer) == bytes_of[8]


def test_a_zero_gradient_never_chooses_directions() -> None:
    param = nn.Parameter(points_of(("lorentz", 1.0), 9, 5))
    optimizer = optim.RiemannianAdamW(group_of(param, ("lorentz", 1.0)), point_rank=2, point_refresh_interval=4)
    train(param, optimizer, [torch.zeros_like(param)] * 2)
    state = optimizer.state[param]
    assert not state["basis"].any()
    assert state["clock"] == 0
    param.grad = None
    optimizer.step()
    assert state["clock"] == 0, "still due"
    train(param, optimizer, gradients(param.shape, 1))
    torch.testing.assert_close(state["basis"] @ state["basis"].mT, torch.eye(2, dtype=torch.float64))
    assert state["clock"] == 1


def test_a_gradient_missing_at_a_refresh_keeps_the_moments_as_far_as_the_directions_go() -> None:
    param = nn.Parameter(points_of(("lorentz", 1.0), 9, 5))
    optimizer = optim.RiemannianAdamW(group_of(param, ("lorentz", 1.0)), point_rank=2, point_refresh_interval=3)
    train(param, optimizer, gradients(param.shape, 3))
    before, moment = param.detach().clone(), first_moment(optimizer, param)
    param.grad = None
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 3
    torch.testing.assert_close(first_moment(optimizer, param), moment)


# ------------------------------------------------------------------------------------------------------------- sharding


def trained_embeddings(settings: dict[str, Any], arrange: Callable[[nn.Module], None], steps: int = 7) -> Any:
    torch.manual_seed(0)
    model = Embeddings()
    arrange(model)
    optimizer = optim.RiemannianAdamW(model, lr=0.03, **settings)
    run_steps(model, optimizer, 0, steps)
    return {**weights(model), **states(model, optimizer)}


def shard(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


RANKED = {"point_rank": 2, "point_refresh_interval": 3, "amsgrad": True}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_low_rank_moments_sharded_are_those_of_one_process(world_size: int) -> None:
    """11 points on 4 ranks: shares are uneven; whole moments are in ``test_sharded.py``."""
    expected = trained_embeddings(RANKED, lambda model: None)
    for results in run_distributed(trained_embeddings, world_size, RANKED, shard):
        assert_equal(results, expected, 1e-11)


@pytest.mark.parametrize("name", ["riemannian_adamw", "adamw"])
def test_what_a_refresh_communicates_is_predicted_in_every_optimizer(name: str) -> None:
    groups = optim.param_groups(Embeddings(), rules={"points": {"point_rank": 2, "point_refresh_interval": 5}})
    sent = communicated_bytes(name, groups, world_size=4)
    assert (sent.step_payload, sent.refresh_payload, sent.interval) == (0, 8 * (5 * 5 + 2 * 5), 5)
    whole = communicated_bytes(name, Embeddings(), world_size=4)
    assert (whole.refresh_payload, whole.interval) == (0, None)


def save(folder: str) -> None:
    torch.manual_seed(0)
    model = Embeddings()
    shard(model)
    optimizer = optim.RiemannianAdamW(model, lr=0.03, **RANKED)
    run_steps(model, optimizer, 0, 4)
    msd, osd = get_state_dict(model, optimizer)
    dcp.save({"model": msd, "optim": osd}, checkpoint_id=folder)


def load(folder: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Embeddings()
    shard(model)
    optimizer = optim.RiemannianAdamW(model, lr=0.03, **RANKED)
    msd, osd = get_state_dict(model, optimizer)
    files = {"model": msd, "optim": osd}
    dcp.load(files, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=files["model"], optim_state_dict=files["optim"])
    assert optimizer.param_groups[0]["manifold"] == ("lorentz", 1.0)
    run_steps(model, optimizer, 4, 7)
    return {**weights(model), **states(model, optimizer)}


@pytest.mark.parametrize("world_size", [1, 4])
def test_low_rank_moments_saved_on_two_ranks_continue_on_others(tmp_path: Any, world_size: int) -> None:
    run_distributed(save, 2, str(tmp_path / "checkpoint"))
    expected = trained_embeddings(RANKED, lambda model: None)
    for results in run_distributed(load, world_size, str(tmp_path / "checkpoint")):
        assert_equal(results, expected, 1e-11)


def test_rows_cut_by_sharding_are_refused() -> None:
    def worker() -> str:
        model = Embeddings()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.points, mesh=mesh, shard_placement_fn=lambda param: Shard(1))
        with pytest.raises(
            ValueError, match=r"'points\.weight' .*sharded along dimension 1, which cuts them.*Shard\(0\)"
        ):
            optim.RiemannianAdamW(model)
        return "refused"

    assert run_distributed(worker, 2) == ["refused"] * 2


def test_a_row_off_the_manifold_is_named_by_its_global_index() -> None:
    def worker() -> str:
        model = Embeddings()
        with torch.no_grad():
            model.points.weight[7] += 1
        shard(model)
        optimizer = optim.RiemannianAdamW(model)
        for param in model.parameters():
            param.grad = laid_out_as(param, torch.ones(param.shape, dtype=param.dtype))
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
        return "no objection"

    first, second = run_distributed(worker, 2)
    assert first == "no objection", "it is the other's row"
    assert second.startswith("row 7 of 'points.weight' is not on manifold=('lorentz', 1.0)")


# ------------------------------------------------------------------------------------------- the manifold and its loss


class GeooptModel(nn.Module):
    def __init__(self, manifold: Any) -> None:
        super().__init__()
        self.points = geoopt.ManifoldParameter(points_of(("lorentz", 1.0), 6, 4), manifold=manifold)
        self.linear = nn.Linear(4, 5, dtype=torch.float64)


def roles_of(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for group in optim.param_groups(model):
        for name, _ in group["params"]:
            yield name, group["role"], group.get("manifold")


def lorentz() -> Any:
    return geoopt.Lorentz(torch.tensor(1.0, dtype=torch.float64))


def test_groups_come_from_the_module_or_from_geoopts_parameters() -> None:
    assert ("points.weight", "points", ("lorentz", 1.0)) in roles_of(Embeddings(lorentz()))
    assert ("points.weight", "points", ("sphere",)) in roles_of(Embeddings("sphere"))
    found = set(roles_of(GeooptModel(lorentz())))
    assert found == {
        ("points", "points", ("lorentz", 1.0)),
        ("linear.weight", "matrix", None),
        ("linear.bias", "vector", None),
    }
    two = nn.ModuleList(
        [Embeddings(("lorentz", 1.0)), Embeddings(("poincare_ball", 1.0)), Embeddings(("lorentz", 2.0))]
    )
    manifolds = [g["manifold"] for g in optim.param_groups(two) if g["role"] == "points"]
    assert manifolds == [("lorentz", 1.0), ("poincare_ball", 1.0), ("lorentz", 2.0)], "a group for each"


def empty_and_filled(model: nn.Module) -> nn.Module:
    values = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(values)
    return model


def from_meta(model: nn.Module) -> nn.Module:
    """As ``from_pretrained`` of transformers: built without numbers, parameters assigned."""
    values = model.state_dict()
    with torch.device("meta"):
        empty = Embeddings()
    empty.load_state_dict(values, assign=True)
    return empty


@pytest.mark.parametrize("path", [empty_and_filled, from_meta, copy.deepcopy], ids=lambda path: path.__name__)
def test_declared_manifolds_survive(path: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, plain = path(Embeddings()), Embeddings()
    plain.load_state_dict(model.state_dict())
    run_steps(model, optim.RiemannianAdamW(model, lr=0.03), 0, 3)
    run_steps(plain, optim.RiemannianAdamW(plain, lr=0.03), 0, 3)
    assert_equal(weights(model), weights(plain))
    assert off_lorentz(model.points.weight).max() < 1e-12


def test_a_declared_manifold_survives_from_pretrained(tmp_path: Any) -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    class PretrainedPoints(PreTrainedModel):
        """As a user's model in transformers."""

        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.points = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
            self.parameter_manifolds = {"points": ("lorentz", 1.0)}
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

    model = PretrainedPoints(PreTrainedConfig())
    with torch.no_grad():
        model.points.copy_(points_of(("lorentz", 1.0), 6, 4))
    model.save_pretrained(tmp_path)
    loaded = PretrainedPoints.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.points, model.points)
    run_steps(loaded, optim.RiemannianAdamW(loaded, lr=0.03), 0, 3)
    run_steps(model, optim.RiemannianAdamW(model, lr=0.03), 0, 3)
    assert torch.equal(loaded.points, model.points)
    assert off_lorentz(model.points).max() < 1e-12


def test_a_lost_manifold_is_an_error_and_a_kept_one_is_not() -> None:
    """What geoopt's RiemannianAdam takes for a Euclidean parameter, silently."""
    lost = GeooptModel(lorentz()).to("meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"no points of a manifold.*ManifoldParameter.*keep_manifolds\(model\) before"):
        optim.RiemannianAdamW(lost)
    kept = GeooptModel(lorentz())
    values = copy.deepcopy(kept.state_dict())
    optim.keep_manifolds(kept)
    kept.to("meta").to_empty(device="cpu")
    kept.load_state_dict(values)
    assert ("points", "points", ("lorentz", 1.0)) in roles_of(kept)
    assert "parameter_manifolds" not in vars(GeooptModel), "the instance's, not the class's"


def test_a_kept_manifold_survives_fully_shard() -> None:
    def worker() -> dict[str, Tensor]:
        model = GeooptModel(lorentz())
        optim.keep_manifolds(model)
        shard(model)
        assert not hasattr(model.points, "manifold"), "or nothing was to be kept"
        run_steps(model, optim.RiemannianAdamW(model, lr=0.03), 0, 4)
        return weights(model)

    expected = GeooptModel(lorentz())
    torch.manual_seed(0)
    for results in run_distributed(worker, 2):
        expected.load_state_dict({**expected.state_dict(), **{k: v for k, v in results.items() if "linear" in k}})
        plain = nn.Parameter(points_of(("lorentz", 1.0), 6, 4))
        optimizer = optim.RiemannianAdamW(group_of(plain, ("lorentz", 1.0)), lr=0.03)
        for step in range(4):
            plain.grad = gradient("points", plain.shape, step)
            optimizer.step()
        assert torch.equal(results["points"], plain)


def test_the_state_dict_holds_plain_values_and_resumes() -> None:
    model = Embeddings(lorentz())
    optimizer = optim.RiemannianAdamW(model, lr=0.03)
    run_steps(model, optimizer, 0, 3)
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    assert saved["param_groups"][0]["manifold"] == ("lorentz", 1.0)
    resumed = optim.RiemannianAdamW(twin, lr=9.0)
    resumed.load_state_dict(saved)
    run_steps(model, optimizer, 3, 6)
    run_steps(twin, resumed, 3, 6)
    assert_equal(weights(twin), weights(model))


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        (("lorentz", 1.0), ("lorentz", 2.0), r"written with manifold=\('lorentz', 1\.0\) and this .*2\.0\)"),
        (("poincare_ball", 0.5), ("sphere",), r"written with manifold=\('poincare_ball', 0\.5\)"),
    ],
)
def test_a_checkpoint_of_another_manifold_is_refused(written: Any, read: Any, message: str) -> None:
    for name in ("riemannian_adamw", "adamw"):
        saved = optim.create(name, Embeddings(written)).state_dict()
        optimizer = optim.create(name, Embeddings(read))
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
    same = optim.RiemannianAdamW(Embeddings(("lorentz", 0.7)))
    same.load_state_dict(optim.RiemannianAdamW(Embeddings(("lorentz", 0.699999988))).state_dict())


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("manifold", "message"),
    [
        (("lorentz", -1.0), r"k=-1\.0; expected a number > 0: the curvature is -1/k, negative by itself"),
        (("poincare_ball", 0.0), r"c=0\.0; expected a number > 0: the curvature is -c"),
        (("lorentz", True), r"k=True; expected a number > 0"),
        (("lorentz", math.nan), r"k=nan; expected a number > 0"),
        (("lorentz",), r"manifold=\('lorentz',\); expected \('lorentz', k\)"),
        (("sphere", 1.0), r"manifold=\('sphere', 1\.0\); expected \('sphere',\)"),
        ("hyperboloid", r"manifold=\('hyperboloid',\); expected a name of lorentz, poincare_ball, sphere, stiefel"),
        (geoopt.Lorentz(-1.0), r"k=-1\.0; expected a number > 0"),
        (geoopt.PoincareBall(-0.5), r"c=nan; expected a number > 0"),
        (geoopt.Lorentz(1.0, learnable=True), r"learns its curvature.*learnable=False"),
        (geoopt.PoincareBall(1.0, learnable=True), r"learns its curvature"),
        (geoopt.Stiefel(), r"has no step and transport here; expected geoopt's Lorentz.*Stiefel\(canonical=False\)"),
        (geoopt.SymmetricPositiveDefinite(), r"has no step and transport here"),
        (geoopt.Euclidean(), r"has no step and transport here.*leave the key out"),
        (object(), r"has no step and transport here"),
    ],
)
def test_manifolds_that_will_not_do(manifold: Any, message: str) -> None:
    param = nn.Parameter(points_of(("lorentz", 1.0), 6, 4))
    with pytest.raises(ValueError, match=message):
        optim.RiemannianAdamW([{"params": [param], "manifold": manifold}])


@pytest.mark.parametrize(
    ("manifold", "shape", "message"),
    [
        (
            geoopt.Stiefel(canonical=False),
            (6, 4),
            r"'points' of shape \(6, 4\) cannot hold points.*whole matrix.*1, a, b",
        ),
        (geoopt.Stiefel(canonical=False), (6, 3, 4), r"expected \(rows, a, b\), a >= b"),
        (("lorentz", 1.0), (6,), r"'points' of shape \(6,\) .*expected \(rows, d\), d >= 2, a point per row"),
        (("sphere",), (6, 1), r"expected \(rows, d\), d >= 2"),
        (("poincare_ball", 1.0), (2, 3, 4), r"expected \(rows, d\)"),
    ],
)
def test_shapes_that_are_no_rows_of_points(manifold: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.RiemannianAdamW(group_of(nn.Parameter(torch.zeros(shape)), manifold))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, r"weight_decay=0\.1 for 'points', whose rows are points.*expected 0"),
        ({"amsgrad": 1}, r"amsgrad=1 for 'points'; expected True or False"),
        ({"point_rank": 0}, r"point_rank=0 for 'points' of shape \(6, 4\); expected a whole number from 1 to 3"),
        ({"point_rank": 4}, r"point_rank=4 .*from 1 to 3"),
        ({"point_rank": True}, r"point_rank=True .*from 1 to 3"),
        (
            {"point_refresh_interval": 0},
            r"point_refresh_interval=0 for 'points'; expected a whole number of steps >= 1",
        ),
        ({"role": "embedding"}, r"group 0 has a manifold and role 'embedding'; expected role 'points', or no manifold"),
        (
            {"manifold": None, "role": "points"},
            r"group 0 has role 'points' and no manifold \('points'\).*keep_manifolds",
        ),
        ({"state_dtype": "4bits"}, r"state_dtype='4bits'"),
    ],
)
def test_settings_of_points_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    for cls in (optim.RiemannianAdamW, optim.AdamW):
        with pytest.raises(ValueError, match=message):
            cls([{**group_of(nn.Parameter(points_of(("lorentz", 1.0), 6, 4)), ("lorentz", 1.0))[0], **settings}])


def test_low_rank_moments_of_matrices_are_refused() -> None:
    param = nn.Parameter(geoopt.Stiefel(canonical=False).random(5, 4, 2).detach().as_subclass(Tensor))
    with pytest.raises(ValueError, match=r"point_rank=2 for 'points': .*matrices, whose moments share no directions"):
        optim.RiemannianAdamW(group_of(param, ("stiefel",)), point_rank=2)


def test_a_parameter_in_two_groups_is_refused() -> None:
    param = nn.Parameter(points_of(("lorentz", 1.0), 6, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.RiemannianAdamW([*group_of(param, ("lorentz", 1.0)), {"params": [("again", param)]}])


@pytest.mark.parametrize("value", [0.5, math.nan])
@pytest.mark.parametrize("label", ["lorentz", "sphere", "ball"])
def test_a_point_off_its_manifold_is_refused_at_the_first_step(label: str, value: float) -> None:
    description, _ = MANIFOLDS[label]
    param = nn.Parameter(points_of(description, 6, 4).float())
    with torch.no_grad():
        param[4] += 4 * value
    before = param.detach().clone()
    optimizer = optim.RiemannianAdamW(group_of(param, description))
    train(param, optimizer, [torch.zeros_like(param)] * 2)  # what checkpoint code does before numbers are there
    fresh = optim.RiemannianAdamW(group_of(param, description))
    with pytest.raises(ValueError, match=r"^row 4 of 'points' is not on manifold=.*at most 0\.001 \(1 rows are off\)"):
        train(param, fresh, [torch.ones_like(param)])
    assert torch.equal(param[:4], before[:4]), "nothing was moved"
    assert fresh.state[param]["step"] == 0


def test_a_rule_that_would_lose_a_manifold_is_refused() -> None:
    for settings in ({"role": "embedding"}, {"manifold": ("sphere",)}):
        with pytest.raises(
            ValueError, match=r"rule 'points' gives 'points\.weight' another role or manifold.*would leave"
        ):
            optim.param_groups(Embeddings(), rules={"points": settings})
    groups = optim.param_groups(Embeddings(), rules={"points": {"point_rank": 2, "lr": 0.5}})
    (group,) = [group for group in groups if group["role"] == "points"]
    assert (group["point_rank"], group["lr"], group["manifold"]) == (2, 0.5, ("lorentz", 1.0))


def test_contradicting_and_wrong_declarations_are_refused() -> None:
    model = GeooptModel(lorentz())
    model.parameter_manifolds = {"points": ("sphere",)}
    with pytest.raises(
        ValueError, match=r"'points' is said to hold points of \('sphere',\) and of \('lorentz', 1\.0\)"
    ):
        optim.param_groups(model)
    model.parameter_manifolds = {"poins": ("lorentz", 1.0)}
    with pytest.raises(ValueError, match=r"parameter_manifolds names 'poins': "):
        optim.param_groups(model)
    nested = nn.Sequential(Embeddings())
    nested[0].points.parameter_manifolds = {"weight": ("lorentz", 0.0)}
    with pytest.raises(ValueError, match=r"parameter_manifolds names '0\.points\.weight': .*k=0\.0"):
        optim.param_groups(nested)
