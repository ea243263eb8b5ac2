"""Updates fused into backward equal those of a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.models import assert_equal, build, gradient, prepare, states, weights
from tests.optim.shards.test_sharded import Network
from tests.tiers import only_first_quick

STEPS = 16  # crosses two refreshes
EVERY = optim.names()


def micro_batches(step: int, count: int) -> Iterator[Tensor]:
    for i in range(count):
        yield gradient(f"micro-batch {i}", torch.Size((16, 8)), step)


def loss_of(model: nn.Module, batch: Tensor, count: int) -> Tensor:
    return model(batch).sub(batch[:, :3]).square().mean() / count


def train(
    name: str,
    *,
    fused: bool,
    count: int = 1,
    max_norm: float | None = None,
    clip: Any = "global",
    world_size: int = 0,
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, state and gradient norms of a loop with a schedule."""
    torch.manual_seed(0)
    model = prepare(name, Network())
    if world_size:
        cls = optim.find(name)
        mesh = init_device_mesh("cpu", (world_size,))

        def place(param: nn.Parameter) -> Shard:
            return Shard(cls.shard_dim("matrix" if param.ndim == 2 else "vector", param.shape, world_size))

        for layer in model.layers:
            fully_shard(layer, mesh=mesh, shard_placement_fn=place)
        fully_shard(model, mesh=mesh)
    optimizer = build(name, model, **arguments)
    handle = (
        optim.attach_to_backward(model, optimizer, accumulation_steps=count, max_norm=max_norm, clip=clip)
        if fused
        else None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 5))
    norms = []
    for step in range(STEPS):
        for batch in micro_batches(step, count):
            loss_of(model, batch, count).backward()
        if fused and max_norm is None:
            assert all(param.grad is None for param in model.parameters()), "no gradient outlives backward"
        if not fused:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        if not fused and max_norm is not None and clip == "global":
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if not fused and max_norm is not None and clip == "parameter":
            for param in model.parameters():
                nn.utils.clip_grad_norm_([param], max_norm)
        optimizer.step()
        schedule.step()
        if handle is not None and handle.grad_norm is not None:
            norms.append(float(handle.grad_norm))
        optimizer.zero_grad()
    return weights(model), states(model, optimizer), norms


def assert_same_training(name: str, tolerance: float = 0.0, *, norms: bool = True, **settings: Any) -> None:
    ours, plain = train(name, fused=True, **settings), train(name, fused=False, **settings)
    assert_equal(ours[0], plain[0], tolerance)
    assert_equal(ours[1], plain[1], tolerance)
    assert not norms or ours[2] == pytest.approx(plain[2], rel=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_one_backward_per_step_is_bitwise_the_plain_loop(name: str) -> None:
    assert_same_training(name)


ACCUMULATES_WHOLE = [name for name in EVERY if name not in ("dct_adamw", "galore_adamw", "welore_adamw")]


@pytest.mark.parametrize("name", ACCUMULATES_WHOLE)
def test_accumulated_micro_batches_equal_the_plain_loop(name: str) -> None:
    assert_same_training(name, 1e-12, count=3)


@pytest.mark.parametrize("basis", ["random", "random_columns"])
def test_accumulated_coordinates_equal_the_plain_loop_where_no_gradient_decides_the_directions(basis: str) -> None:
    settings = {"basis": basis, "residual": "drop", "moments": "reset"}
    assert_same_training("low_rank_adamw", 1e-12, norms=False, count=3, **settings)  # they are those of coordinates


def test_coordinates_are_accumulated_exactly_between_refreshes() -> None:
    """Both loops start from one state with directions chosen; no refresh follows."""
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Network()
        optimizer = build("dct_adamw", model, refresh_interval=1000)
        for batch in micro_batches(99, 1):
            loss_of(model, batch, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        if fused:
            optim.attach_to_backward(model, optimizer, accumulation_steps=3)
        for step in range(6):
            for i, batch in enumerate(micro_batches(step, 3)):
                loss_of(model, batch, 3).backward()
                if fused:
                    groups = [group for group in optimizer.param_groups if group["role"] == "matrix"]
                    matrices = [param for group in groups for param in group["params"]]
                    assert matrices
                    assert all(weight.grad is None for weight in matrices), f"after micro-batch {i}"
            optimizer.step()
            optimizer.zero_grad()
        results.append({**weights(model), **states(model, optimizer)})
    assert_equal(results[1], results[0], 1e-12)
    assert results[1]["layers.0.weight.step"] == 7, "one count per real step"


@pytest.mark.parametrize("name", only_first_quick(EVERY, 4))
def test_clipping_each_parameter(name: str) -> None:
    assert_same_training(name, 1e-11, max_norm=1e-2, clip="parameter")


@pytest.mark.parametrize("name", ["dct_adamw", "galore_adamw"])
def test_clipping_the_global_norm(name: str) -> None:
    assert_same_training(name, 1e-11, max_norm=1e-2)


@pytest.mark.parametrize("name", ["apollo", "muon", "adamw", "relora", "sst"])
def test_global_clipping_is_refused_where_the_whole_gradient_is_needed(name: str) -> None:
    model = prepare(name, Network())
    with pytest.raises(ValueError, match=r"max_norm=1\.0 with clip='global'.*'layers\.0\.[\w.]+'.*clip='parameter'"):
        optim.attach_to_backward(model, build(name, model), max_norm=1.0)


def sharded_fused(max_norm: float | None) -> dict[str, Any]:
    names = EVERY if max_norm is None else ["dct_adamw", "galore_adamw"]
    results = {}
    for name in names:
        results[name] = train(name, fused=True, max_norm=max_norm, world_size=2)
    return results


@pytest.mark.parametrize("max_norm", only_first_quick([1e-2, None]))
def test_under_fsdp_equals_one_process(max_norm: float | None) -> None:
    for results in run_distributed(sharded_fused, 2, max_norm):
        for name, (final, _, norms) in results.items():
            expected = train(name, fused=False, max_norm=max_norm)
            assert_equal(final, expected[0], 1e-9)
            assert norms == pytest.approx(expected[2], rel=1e-9)


def test_an_early_step_uses_what_there_is() -> None:
    model = Network()
    optimizer = build("dct_adamw", model)
    optim.attach_to_backward(model, optimizer, accumulation_steps=4)
    before = weights(model)
    for batch in micro_batches(0, 2):
        loss_of(model, batch, 2).backward()
    assert_equal(weights(model), before)
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(param.grad is None for param in model.parameters())


def test_what_was_summed_can_be_discarded() -> None:
    """As if the passes had not been: but for directions that were chosen meanwhile, which are chosen anew."""
    finals = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        model = Network()
        optimizer = build("dct_adamw", model)
        handle = optim.attach_to_backward(model, optimizer, accumulation_steps=2)
        if spoilt:
            loss_of(model, next(iter(micro_batches(7, 1))), 1).backward()
            handle.discard()
        for batch in micro_batches(0, 2):
            loss_of(model, batch, 2).backward()
        optimizer.step()
        assert handle.grad_norm is not None
        assert handle.grad_norm.isfinite()
        finals.append(weights(model))
    assert_equal(*finals)


def test_groups_that_were_loaded_are_those_of_the_updates_in_backward() -> None:
    model = Network()
    optimizer = build("adamw", model)
    optim.attach_to_backward(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    loss_of(model, next(iter(micro_batches(0, 1))), 1).backward()
    optimizer.step()
    assert_equal(weights(model), before)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_detach_returns_to_gradients_that_wait() -> None:
    model = Network()
    optimizer = build("adamw", model)
    handle = optim.attach_to_backward(model, optimizer)
    handle.detach()
    before = weights(model)
    for batch in micro_batches(0, 1):
        loss_of(model, batch, 1).backward()
    assert_equal(weights(model), before)
    optimizer.step()
    assert not torch.equal(model.layers[0].weight, before["layers.0.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation_steps": 0}, r"accumulation_steps=0; expected a whole number >= 1"),
        ({"accumulation_steps": 1.5}, r"accumulation_steps=1\.5"),
        ({"max_norm": -1.0}, r"max_norm=-1\.0; expected a number > 0, or None"),
        ({"clip": "globl"}, r"clip='globl'; expected 'global' or 'parameter'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    model = Network()
    with pytest.raises(ValueError, match=message):
        optim.attach_to_backward(model, build("dct_adamw", model), **settings)


def test_another_model_and_a_second_attachment_are_refused() -> None:
    model = Network()
    optimizer = build("dct_adamw", model)
    with pytest.raises(ValueError, match=r"is no parameter of the model; shard the model first"):
        optim.attach_to_backward(Network(), optimizer)
    optim.attach_to_backward(model, optimizer)
    with pytest.raises(ValueError, match=r"attached to a backward pass already; detach\(\)"):
        optim.attach_to_backward(model, optimizer)


class OwnDDP(DistributedDataParallel):
    """As frameworks derive theirs."""


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, OwnDDP])
def test_ddp_is_refused(wrapper: type[DistributedDataParallel]) -> None:
    def worker() -> str:
        model = wrapper(Network())
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*fully_shard"):
            optim.attach_to_backward(model, build("dct_adamw", model))
        return "refused"

    assert run_distributed(worker, 2) == ["refused", "refused"]
