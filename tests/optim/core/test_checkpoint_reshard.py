"""torch.distributed.checkpoint: written by 2 ranks, read by 1, 3 and 4, and by a plain process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

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

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.models import (
    MixedModel,
    assert_equal,
    build,
    prepare,
    run_steps,
    set_gradients,
    states,
    tolerance,
    weights,
)
from tests.tiers import only_first_quick

SAVED_AT, STEPS = 4, 7  # within a refresh interval; another refresh follows

FROM_WEIGHTS = ("welore_adamw",)
"""Its ranks are those of the weights that training starts from, or must be given."""

Values = dict[str, Tensor]
Results = dict[str, tuple[Values, Values]]
"""By optimizer: what was saved or loaded, and where the run ends."""
Run = tuple[nn.Module, optim.MatrixOptimizer]


class Checkpoint(NamedTuple):
    folder: str
    dtype: torch.dtype
    results: Results


def sharded(name: str, dtype: torch.dtype, *, seed: int) -> Run:
    torch.manual_seed(seed)
    model = prepare(name, MixedModel(dtype))
    world_size = dist.get_world_size()
    roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
    cls = optim.find(name)
    fully_shard(
        model,
        mesh=init_device_mesh("cpu", (world_size,)),
        shard_placement_fn=lambda p: Shard(cls.shard_dim(roles[p], p.shape, world_size)),
    )
    return model, build(name, model)


def state_dicts(runs: dict[str, Run]) -> dict[str, Any]:
    """Of all optimizers, for one checkpoint."""
    files = {}
    for name, (model, optimizer) in runs.items():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        files[name] = {"model": model_state, "optim": optimizer_state}
    return files


def is_continued(model: nn.Module) -> bool:
    """In bfloat16 one rounding the other way is 2^-8 of a value: what was loaded is compared, not what follows."""
    return next(model.parameters()).dtype == torch.float64


def save(folder: str, dtype: torch.dtype) -> Results:
    runs = {name: sharded(name, dtype, seed=0) for name in optim.names()}
    for model, optimizer in runs.values():
        run_steps(model, optimizer, 0, SAVED_AT)
    dcp.save(state_dicts(runs), checkpoint_id=folder)
    results = {}
    for name, (model, optimizer) in runs.items():
        saved = {**weights(model), **states(model, optimizer)}
        if is_continued(model):
            run_steps(model, optimizer, SAVED_AT, STEPS)
        results[name] = (saved, {**weights(model), **states(model, optimizer)})
    return results


def load_and_continue(runs: dict[str, Run], folder: str) -> Results:
    files = state_dicts(runs)
    dcp.load(files, checkpoint_id=folder)
    results = {}
    for name, (model, optimizer) in runs.items():
        set_state_dict(model, optimizer, model_state_dict=files[name]["model"], optim_state_dict=files[name]["optim"])
        loaded = {**weights(model), **states(model, optimizer)}
        if is_continued(model):
            run_steps(model, optimizer, SAVED_AT, STEPS)
        results[name] = (loaded, {**weights(model), **states(model, optimizer)})
    return results


def load(folder: str, dtype: torch.dtype) -> Results:
    return load_and_continue(
        {name: sharded(name, dtype, seed=0 if name in FROM_WEIGHTS else 1) for name in optim.names()}, folder
    )


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Checkpoint]:
    """Of a dtype: a checkpoint written by 2 ranks."""

    @cache
    def written(dtype: torch.dtype) -> Checkpoint:
        folder = str(tmp_path_factory.mktemp("checkpoint"))
        first, second = run_distributed(save, 2, folder, dtype)
        for name in optim.names():
            assert_equal(first[name][0], second[name][0])
        return Checkpoint(folder, dtype, first)

    return written


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[torch.dtype], Checkpoint]) -> Checkpoint:
    return checkpoint_of(torch.float64)


def check(results: Results, checkpoint: Checkpoint) -> None:
    assert list(results) == optim.names()
    for name, (loaded, final) in results.items():
        saved, expected = checkpoint.results[name]
        assert_equal(loaded, saved)  # bitwise, and with the dtypes of the integers
        assert_equal(final, expected, tolerance(name))


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    only_first_quick([(1, torch.float64), (3, torch.float64), (4, torch.float64), (1, torch.bfloat16)]),
)
def test_a_checkpoint_of_two_ranks_loads_on_any_number(
    checkpoint_of: Callable[[torch.dtype], Checkpoint], world_size: int, dtype: torch.dtype
) -> None:
    checkpoint = checkpoint_of(dtype)
    for results in run_distributed(load, world_size, checkpoint.folder, dtype):
        check(results, checkpoint)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is: that is the case tested
def test_a_checkpoint_of_two_ranks_loads_in_a_plain_process(checkpoint: Checkpoint) -> None:
    runs = {}
    for name in optim.names():
        torch.manual_seed(0 if name in FROM_WEIGHTS else 1)
        model = prepare(name, MixedModel(checkpoint.dtype))
        runs[name] = (model, build(name, model))
    check(load_and_continue(runs, checkpoint.folder), checkpoint)


def load_after_a_swap(folder: str, dtype: torch.dtype) -> Results:
    """As HF Trainer and Accelerate resume: the optimizer is older than the sharded parameters it was handed."""
    runs = {}
    for name in optim.names():
        torch.manual_seed(0 if name in FROM_WEIGHTS else 1)
        model = prepare(name, MixedModel(dtype))
        optimizer = build(name, model)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        named = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [named[key] for key in group["param_names"]]
        runs[name] = (model, optimizer)
    return load_and_continue(runs, folder)


@pytest.mark.slow
def test_a_checkpoint_loads_into_an_optimizer_built_before_sharding(checkpoint: Checkpoint) -> None:
    for results in run_distributed(load_after_a_swap, 2, checkpoint.folder, checkpoint.dtype):
        check(results, checkpoint)


def load_into_another_basis(folder: str) -> None:
    """The same tensors, ``basis_index``, but of other directions; what else is loaded does not tell."""
    model, _ = sharded("dct_adamw", torch.float64, seed=1)
    optimizer = build("low_rank_adamw", model, basis="identity", residual="drop")
    files = state_dicts({"dct_adamw": (model, optimizer)})
    dcp.load(files, checkpoint_id=folder)
    with pytest.raises(ValueError, match="written with basis='dct' and this optimizer has basis='identity'"):
        set_state_dict(
            model, optimizer, model_state_dict=files["dct_adamw"]["model"], optim_state_dict=files["dct_adamw"]["optim"]
        )


def test_a_checkpoint_of_another_basis_is_refused(checkpoint: Checkpoint) -> None:
    run_distributed(load_into_another_basis, 2, checkpoint.folder)


def state_dict_of_a_new_optimizer() -> None:
    for name in optim.names():
        model, optimizer = sharded(name, torch.float64, seed=0)
        before, fresh = weights(model), states(model, optimizer)
        get_optimizer_state_dict(model, optimizer)
        assert_equal(weights(model), before)
        assert_equal(states(model, optimizer), fresh)
        for param in model.parameters():
            assert param.grad is None
        run_steps(model, optimizer, 0, 2)
        twin, twin_optimizer = sharded(name, torch.float64, seed=0)
        run_steps(twin, twin_optimizer, 0, 2)
        assert_equal(weights(model), weights(twin))


@pytest.mark.slow
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


@pytest.mark.slow
def test_local_state_dicts_resume_on_the_same_ranks() -> None:
    run_distributed(local_state_dicts, 2)
