"""Under FSDP2 every optimizer makes the numbers of one process, with the communication it promises."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from tests.distributed import DistributedFailure, run_distributed
from tests.optim.models import (
    MATRIX_SHAPES,
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    build,
    gradient,
    laid_out_as,
    run_steps,
    set_gradients,
    states,
    weights,
)

STEPS = 20
TOLERANCE = 1e-12  # of weights and moments of size 1 in float64: only sums over shards are ordered differently


Collective = tuple[str, int, int]


class Collectives(TorchDispatchMode):
    """Records (operation, elements sent by this rank, ranks) of every collective, those inside DTensor included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor take it apart, then see the parts
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves = torch.utils._pytree.tree_leaves(args)
            elements = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
            scripted = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            groups = [dist.ProcessGroup.unbox(s) for s in scripted if str(s._type()).endswith("ProcessGroup")]
            ranks = groups[0].size() if groups else 0  # DTensor's own operators name their group by a string
            self.calls.append((func._schema.name.split("::")[1], elements, ranks))
        return func(*args, **(kwargs or {}))


def new_model(dtype: torch.dtype = torch.float64) -> MixedModel:
    torch.manual_seed(0)
    return MixedModel(dtype)


def one_dimensional_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def two_by_two_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, name: str, placement: str) -> None:
    """fully_shard as the optimizer prefers it, or all along dimension 0, or as preferred on a 2 x 2 HSDP mesh."""
    mesh = two_by_two_mesh() if placement == "hsdp" else one_dimensional_mesh()
    roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
    cls, world_size = optim.find(name), mesh.size(mesh.ndim - 1)

    def preferred(param: nn.Parameter) -> Shard:
        return Shard(cls.shard_dim(roles[param], param.shape, world_size))

    fully_shard(model, mesh=mesh, shard_placement_fn=None if placement == "rows" else preferred)


def twenty_steps(name: str, prepare: Callable[[nn.Module], None] | None = None) -> dict[str, Tensor]:
    """Weights and state, whole, after 20 steps."""
    model = new_model()
    if prepare is not None:
        prepare(model)
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, STEPS)
    return {**weights(model), **states(model, optimizer)}


def twenty_sharded_steps(placement: str) -> dict[str, dict[str, Tensor]]:
    return {name: twenty_steps(name, lambda model, name=name: shard(model, name, placement)) for name in optim.names()}


LAYOUTS = [(kind, world_size) for kind in ("preferred", "rows") for world_size in (1, 2, 3, 4)] + [("hsdp", 4)]


@pytest.mark.parametrize(("placement", "world_size"), LAYOUTS)
def test_sharded_equals_one_process(placement: str, world_size: int) -> None:
    by_rank = run_distributed(twenty_sharded_steps, world_size, placement)
    for name in optim.names():
        expected = twenty_steps(name)
        for results in by_rank:
            assert_equal(results[name], expected, TOLERANCE)


def layout_of_this_rank(placement: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    model = new_model()
    shard(model, "dct_adamw", placement)
    return {key: (str(p.placements[-1]), tuple(p.to_local().shape)) for key, p in model.named_parameters()}


def test_the_placements_of_these_tests_are_what_they_claim() -> None:
    """Empty shards and both dimensions really occur."""
    preferred = run_distributed(layout_of_this_rank, 4, "preferred")
    rows = run_distributed(layout_of_this_rank, 4, "rows")
    assert preferred[0]["matrix_12x24.weight"] == ("S(1)", (12, 6))
    assert preferred[3]["matrix_24x12.weight"] == ("S(0)", (6, 12))
    assert preferred[3]["matrix_5x4.weight"] == ("S(0)", (0, 4))
    assert preferred[3]["matrix_6x17.weight"] == ("S(0)", (0, 17)), "17 columns cannot be split in 4: dimension 0 it is"
    assert rows[0]["matrix_12x24.weight"] == ("S(0)", (3, 24))
    assert rows[1]["matrix_1x8.weight"] == ("S(0)", (0, 8))


def keys_and_kinds_on_this_rank() -> dict[str, list[tuple[str, str]]]:
    found = {}
    for name in optim.names():
        model = new_model()
        shard(model, name, "rows")
        optimizer = build(name, model)
        found[name] = [
            (f"{key}.{entry}", f"{type(value).__name__} {tuple(value.shape)} {value.dtype}")
            for key, param in model.named_parameters()
            for entry, value in optimizer.state[param].items()
        ]
        for param, state in optimizer.state.items():
            for entry, value in state.items():
                # A plain local tensor of a shard would be taken for replicated, and overwritten, by checkpoints.
                assert isinstance(value, DTensor) == (entry in ("exp_avg", "exp_avg_sq")), (tuple(param.shape), entry)
    return found


def test_every_rank_holds_the_same_state_keys_even_for_empty_shards() -> None:
    by_rank = run_distributed(keys_and_kinds_on_this_rank, 4)
    assert all(found == by_rank[0] for found in by_rank)


# ------------------------------------------------------------------------------------------------ real forward/backward


class Network(nn.Module):
    """Runs: a tall and a wide matrix, and layers of 5 and 3 rows; widths that 2 and 4 ranks divide, and some not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(a, b, dtype=torch.float64) for a, b in [(8, 17), (17, 24), (24, 5), (5, 8), (8, 3)])
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def train_network(name: str, *, placement: str | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights; every rank sees the same batch, so that averaged gradients are those of one process."""
    torch.manual_seed(0)
    model = Network()
    if placement is not None:
        shard(model, name, placement)
    optimizer = build(name, model)
    losses = []
    for step in range(STEPS):
        batch = gradient("batch", torch.Size((16, 8)), step)
        loss = model(batch).sub(batch[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, weights(model)


def train_all_networks(placement: str) -> dict[str, Any]:
    return {name: train_network(name, placement=placement) for name in optim.names()}


@pytest.mark.parametrize(("placement", "world_size"), [("preferred", 2), ("rows", 3), ("hsdp", 4)])
def test_training_through_fsdp_equals_one_process(placement: str, world_size: int) -> None:
    by_rank = run_distributed(train_all_networks, world_size, placement)
    for name in optim.names():
        losses, final = train_network(name, placement=None)
        assert losses[-1] < losses[0]
        for results in by_rank:
            assert results[name][0] == pytest.approx(losses, abs=TOLERANCE)
            assert_equal(results[name][1], final, 1e-11)  # the network amplifies what TOLERANCE allows a step


# -------------------------------------------------------------------------------------------------------- communication


def collectives_of_each_step(name: str, placement: str) -> list[list[Collective]]:
    model = new_model()
    shard(model, name, placement)
    optimizer = build(name, model)
    recorded = []
    for step in range(2 * REFRESH_INTERVAL + 1):
        set_gradients(model, step)
        with Collectives() as collectives:
            optimizer.step()
        recorded.append(collectives.calls)
    return recorded


@pytest.mark.parametrize(("placement", "world_size"), [("preferred", 2), ("hsdp", 4)])
def test_dct_adamw_communicates_one_all_reduce_per_refresh_and_nothing_else(placement: str, world_size: int) -> None:
    def worker() -> list[list[Collective]]:
        # Of these shapes 17 columns are not divisible: such a matrix stays on dimension 0 and is not promised anything.
        MATRIX_SHAPES.remove((6, 17))
        return collectives_of_each_step("dct_adamw", placement)

    numbers = sum(min(shape) for shape in MATRIX_SHAPES if shape != (6, 17))
    for recorded in run_distributed(worker, world_size):
        for step, calls in enumerate(recorded):
            assert calls == ([("allreduce_", numbers, 2)] if step % REFRESH_INTERVAL == 0 else []), step


@pytest.mark.parametrize("placement", ["preferred", "rows"])
def test_a_single_rank_never_communicates(placement: str) -> None:
    for name in optim.names():
        (recorded,) = run_distributed(collectives_of_each_step, 1, name, placement)
        assert recorded == [[]] * len(recorded), name


@pytest.mark.parametrize("placement", ["preferred", "rows"])
def test_adamw_never_communicates(placement: str) -> None:
    for recorded in run_distributed(collectives_of_each_step, 2, "adamw", placement):
        assert recorded == [[]] * len(recorded)


def test_dct_adamw_turns_over_only_the_matrices_sharded_along_their_projected_dimension() -> None:
    wide = [shape for shape in MATRIX_SHAPES if shape[0] < shape[1]]
    for recorded in run_distributed(collectives_of_each_step, 2, "dct_adamw", "rows"):
        ordinary = [name for name, _, _ in recorded[1]]
        assert ordinary == ["alltoall_base_"] * (2 * len(wide)), "there and back"
        assert [name for name, _, _ in recorded[0]].count("allreduce_") == 1


def test_collectives_are_seen_inside_dtensor_too() -> None:
    """Or the counts above would prove nothing."""

    def worker() -> tuple[list[str], list[str]]:
        sharded = distribute_tensor(torch.ones(4, 4), one_dimensional_mesh(), [Shard(0)], src_data_rank=None)
        with Collectives() as gather:
            sharded.full_tensor()
        with Collectives() as reduce:
            dist.all_reduce(torch.ones(3))
        return [name for name, _, _ in gather.calls], [name for name, _, _ in reduce.calls]

    for gather, reduce in run_distributed(worker, 2):
        assert any("gather" in name for name in gather)
        assert reduce == ["allreduce_"]


# ------------------------------------------------------------------------------------ built before the model is sharded


def swap_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What HF Trainer and Accelerate do after sharding: put the new parameters into the groups, by name."""
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]


def built_before_and_after_sharding(placement: str, through_state_dict: bool) -> dict[str, Any]:
    results = {}
    for name in optim.names():
        model = new_model()
        optimizer = build(name, model)
        if through_state_dict:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        shard(model, name, placement)
        swap_parameters(model, optimizer)
        run_steps(model, optimizer, 0, STEPS)
        assert set(optimizer.state) == set(model.parameters())
        before = {**weights(model), **states(model, optimizer)}
        after = twenty_steps(name, lambda model, name=name: shard(model, name, placement))
        results[name] = (before, after)
    return results


@pytest.mark.parametrize("placement", ["preferred", "rows"])
@pytest.mark.parametrize("through_state_dict", [False, True])
def test_built_before_sharding_equals_built_after(placement: str, through_state_dict: bool) -> None:
    for results in run_distributed(built_before_and_after_sharding, 2, placement, through_state_dict):
        for before, after in results.values():
            assert_equal(before, after)


def moved_to_another_placement() -> dict[str, Any]:
    results = {}
    for name in optim.names():
        source, target = new_model(), new_model()
        # Not this optimizer's own preference: AdamW prefers rows, and nothing would move.
        shard(source, "dct_adamw", "preferred")
        shard(target, name, "rows")
        source_optimizer, optimizer = build(name, source), build(name, target)
        run_steps(source, source_optimizer, 0, 10)
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
                ours.copy_(laid_out_as(ours, theirs.full_tensor()))
        optimizer.load_state_dict(source_optimizer.state_dict())
        run_steps(target, optimizer, 10, STEPS)
        plain = new_model()
        plain_optimizer = build(name, plain)
        plain_optimizer.load_state_dict(source_optimizer.state_dict())
        results[name] = (
            {**weights(target), **states(target, optimizer)},
            states(plain, plain_optimizer),
            states(source, source_optimizer),
        )
    return results


def test_state_moves_between_placements_and_to_an_unsharded_optimizer() -> None:
    for results in run_distributed(moved_to_another_placement, 2):
        for name, (moved, plain, source) in results.items():
            assert_equal(plain, source)
            assert_equal(moved, twenty_steps(name), TOLERANCE)


def resumed_into_swapped_parameters() -> dict[str, Any]:
    """A checkpoint loaded after the swap and before the first step."""
    results = {}
    for name in optim.names():
        source = new_model()
        source_optimizer = build(name, source)
        run_steps(source, source_optimizer, 0, 10)
        model = new_model()
        model.load_state_dict(source.state_dict())
        optimizer = build(name, model)
        shard(model, name, "preferred")
        swap_parameters(model, optimizer)
        optimizer.load_state_dict(source_optimizer.state_dict())
        run_steps(model, optimizer, 10, STEPS)
        results[name] = {**weights(model), **states(model, optimizer)}
    return results


def test_an_unsharded_checkpoint_resumes_in_a_sharded_optimizer() -> None:
    for results in run_distributed(resumed_into_swapped_parameters, 3):
        for name, result in results.items():
            assert_equal(result, twenty_steps(name), TOLERANCE)


@pytest.mark.parametrize("name", optim.names())
def test_replacing_parameters_after_an_update_is_refused(name: str) -> None:
    def worker() -> str:
        model = new_model()
        optimizer = build(name, model)
        run_steps(model, optimizer, 0, 1)
        shard(model, name, "preferred")
        swap_parameters(model, optimizer)
        before = weights(model)
        set_gradients(model, 1)
        with pytest.raises(RuntimeError, match=r"replaced after it had made updates.*shard the model first"):
            optimizer.step()
        assert_equal(weights(model), before)
        return "refused"

    assert run_distributed(worker, 2) == ["refused", "refused"]


# ----------------------------------------------------------------------------------------------------------- hard cases


def test_a_gradient_missing_on_one_rank_at_a_refresh_does_not_hang() -> None:
    def worker() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = new_model()
        shard(model, "dct_adamw", "preferred")
        optimizer = build("dct_adamw", model)
        missing = model.matrix_24x12.weight
        for step in range(REFRESH_INTERVAL + 3):
            set_gradients(model, step)
            if dist.get_rank() == 1 and step == REFRESH_INTERVAL:
                missing.grad = None
            before = missing.to_local().clone()
            optimizer.step()
            skipped = dist.get_rank() == 1 and step == REFRESH_INTERVAL
            assert torch.equal(missing.to_local(), before) == skipped
        state = optimizer.state[missing]
        return {"basis_index": state["basis_index"].clone()}, weights(model)

    first, second = run_distributed(worker, 2)
    assert_equal(first[0], second[0])
    assert_equal(first[1], second[1])
    assert all(value.isfinite().all() for value in first[1].values())


def test_a_gradient_not_finite_on_one_shard_keeps_the_columns_on_all_ranks() -> None:
    def worker() -> tuple[list[int], list[int]]:
        model = new_model()
        shard(model, "dct_adamw", "preferred")
        optimizer = build("dct_adamw", model)
        hurt = model.matrix_24x12.weight
        run_steps(model, optimizer, 0, REFRESH_INTERVAL)
        before = optimizer.state[hurt]["basis_index"].tolist()
        set_gradients(model, REFRESH_INTERVAL)
        if dist.get_rank() == 1:
            hurt.grad.to_local()[0, 0] = float("inf")
        optimizer.step()
        return before, optimizer.state[hurt]["basis_index"].tolist()

    before, after = zip(*run_distributed(worker, 2), strict=True)
    assert before == after


@pytest.mark.parametrize("name", optim.names())
def test_doubly_sharded_parameters_are_refused(name: str) -> None:
    def worker() -> str:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
        param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
        with pytest.raises(ValueError, match=r"shape \(4, 4\) with placements .* tensor-parallel"):
            optim.create(name, [{"params": [("w", param)], "role": "matrix"}])
        return "refused"

    assert run_distributed(worker, 1) == ["refused"]


def bfloat16_steps(placement: str | None) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name in optim.names():
        model = new_model(torch.bfloat16)
        if placement is not None:
            shard(model, name, placement)
        optimizer = build(name, model)
        run_steps(model, optimizer, 0, 10)
        results[name] = {**weights(model), **states(model, optimizer)}
    return results


@pytest.mark.parametrize("placement", ["preferred", "rows"])
def test_bfloat16_keeps_its_dtypes_when_sharded(placement: str) -> None:
    expected = bfloat16_steps(None)
    for results in run_distributed(bfloat16_steps, 3, placement):
        for name in optim.names():
            # Weights of size 1 and less: a few roundings to 8 bits of an update of 1e-2 may fall the other way.
            assert_equal(results[name], expected[name], tolerance=2**-6)


# -------------------------------------------------------------------------------------------- the helper of these tests


def test_a_failing_rank_fails_the_call_with_its_traceback() -> None:
    def worker() -> None:
        if dist.get_rank() == 1:
            raise KeyError("the cause")
        dist.barrier()  # the others wait for it

    with pytest.raises(DistributedFailure, match=r"(?s)rank 1 of 2 raised.*KeyError: 'the cause'"):
        run_distributed(worker, 2)


def test_a_rank_that_dies_fails_the_call() -> None:
    def worker() -> None:
        if dist.get_rank() == 0:
            os._exit(3)
        dist.barrier()

    with pytest.raises(DistributedFailure, match=r"rank [01] of 2"):
        run_distributed(worker, 2)


def test_results_come_back_by_rank() -> None:
    def worker(offset: int) -> Tensor:
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return torch.stack([torch.tensor(float(dist.get_rank())), total])

    assert [value.tolist() for value in run_distributed(worker, 3, 10)] == [[0, 33], [1, 33], [2, 33]]


def test_laid_out_as_gives_each_rank_the_share_of_its_parameter() -> None:
    def worker() -> bool:
        model = new_model()
        shard(model, "dct_adamw", "preferred")
        return all(
            torch.equal(laid_out_as(p, value := gradient(n, p.shape, 0)).full_tensor(), value)
            for n, p in model.named_parameters()
        )

    assert run_distributed(worker, 3) == [True, True, True]
