"""torch.distributed.checkpoint: written by 2 ranks, read by 1, 3 and 4, and by a plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import optim
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, assert_equal, build, run_steps, set_gradients, states, weights

SAVED_AT, STEPS = 10, 20  # within a refresh interval
TOLERANCE = 1e-12

Values = dict[str, Tensor]


def sharded(name: str, dtype: torch.dtype, *, seed: int) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(seed)
    model = MixedModel(dtype)
    world_size = dist.get_world_size()
    roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
    cls = optim.find(name)
    fully_shard(
        model,
        mesh=init_device_mesh("cpu", (world_size,)),
        shard_placement_fn=lambda p: Shard(cls.shard_dim(roles[p], p.shape, world_size)),
    )
    return model, build(name, model)


def save(folder: str, dtype: torch.dtype) -> dict[str, tuple[Values, Values]]:
    """By optimizer: what was saved, and where the uninterrupted run ends."""
    results = {}
    for name in optim.names():
        model, optimizer = sharded(name, dtype, seed=0)
        run_steps(model, optimizer, 0, SAVED_AT)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=f"{folder}/{name}")
        saved = {**weights(model), **states(model, optimizer)}
        run_steps(model, optimizer, SAVED_AT, STEPS)
        results[name] = (saved, {**weights(model), **states(model, optimizer)})
    return results


def load_and_continue(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> tuple[Values, Values]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    loaded = {**weights(model), **states(model, optimizer)}
    run_steps(model, optimizer, SAVED_AT, STEPS)
    return loaded, {**weights(model), **states(model, optimizer)}


def load(folder: str, dtype: torch.dtype) -> dict[str, tuple[Values, Values]]:
    results = {}
    for name in optim.names():
        model, optimizer = sharded(name, dtype, seed=1)
        results[name] = load_and_continue(model, optimizer, f"{folder}/{name}")
    return results


@pytest.fixture(scope="module", params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder, dtype, and what was saved, of a checkpoint written by 2 ranks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    first, second = run_distributed(save, 2, str(folder), request.param)
    for name in optim.names():
        assert_equal(first[name][0], second[name][0])
    return folder, request.param, first


def check(loaded: Values, final: Values, expected: tuple[Values, Values], dtype: torch.dtype) -> None:
    assert_equal(loaded, expected[0])  # bitwise, and with the dtypes of the integers
    if dtype == torch.float64:  # in bfloat16 one rounding the other way is 2^-8 of a value
        assert_equal(final, expected[1], TOLERANCE)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_checkpoint_of_two_ranks_loads_on_any_number(checkpoint: Any, world_size: int) -> None:
    folder, dtype, expected = checkpoint
    for results in run_distributed(load, world_size, str(folder), dtype):
        for name, (loaded, final) in results.items():
            check(loaded, final, expected[name], dtype)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is: that is the case tested
@pytest.mark.parametrize("name", optim.names())
def test_a_checkpoint_of_two_ranks_loads_in_a_plain_process(checkpoint: Any, name: str) -> None:
    folder, dtype, expected = checkpoint
    torch.manual_seed(1)
    model = MixedModel(dtype)
    loaded, final = load_and_continue(model, build(name, model), f"{folder}/{name}")
    check(loaded, final, expected[name], dtype)


def load_after_a_swap(folder: str, dtype: torch.dtype) -> dict[str, tuple[Values, Values]]:
    """As HF Trainer and Accelerate resume: the optimizer is older than the sharded parameters it was handed."""
    results = {}
    for name in optim.names():
        model = MixedModel(dtype)
        optimizer = build(name, model)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        named = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [named[key] for key in group["param_names"]]
        results[name] = load_and_continue(model, optimizer, f"{folder}/{name}")
    return results


def test_a_checkpoint_loads_into_an_optimizer_built_before_sharding(checkpoint: Any) -> None:
    folder, dtype, expected = checkpoint
    for results in run_distributed(load_after_a_swap, 3, str(folder), dtype):
        for name, (loaded, final) in results.items():
            check(loaded, final, expected[name], dtype)


def state_dict_of_a_new_optimizer() -> None:
    for name in optim.names():
        model, optimizer = sharded(name, torch.float64, seed=0)
        before, fresh = weights(model), states(model, optimizer)
        get_optimizer_state_dict(model, optimizer)
        assert_equal(weights(model), before)
        assert_equal(states(model, optimizer), fresh)
        for param in model.parameters():
            assert param.grad is None
        run_steps(model, optimizer, 0, STEPS)
        twin, twin_optimizer = sharded(name, torch.float64, seed=0)
        run_steps(twin, twin_optimizer, 0, STEPS)
        assert_equal(weights(model), weights(twin))


def test_asking_a_new_optimizer_for_its_state_changes_nothing() -> None:
    run_distributed(state_dict_of_a_new_optimizer, 2)


def local_state_dicts() -> None:
    """Each rank keeps its own file: the oldest way to checkpoint, on the same ranks."""
    for name in optim.names():
        model, optimizer = sharded(name, torch.float64, seed=0)
        run_steps(model, optimizer, 0, SAVED_AT)
        twin, twin_optimizer = sharded(name, torch.float64, seed=0)
        twin.load_state_dict(model.state_dict())
        twin_optimizer.load_state_dict(optimizer.state_dict())
        assert_equal(states(twin, twin_optimizer), states(model, optimizer))
        set_gradients(model, SAVED_AT)
        optimizer.step()
        run_steps(twin, twin_optimizer, SAVED_AT, SAVED_AT + 1)
        assert_equal(weights(twin), weights(model))


def test_local_state_dicts_resume_on_the_same_ranks() -> None:
    run_distributed(local_state_dicts, 3)
