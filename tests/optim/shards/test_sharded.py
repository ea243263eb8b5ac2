"""Under FSDP2 every optimizer makes the numbers of one process, with the communication it promises."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_train import optim
from lowrank_train.optim.costs.sent import communicated_bytes, weight_traffic
from lowrank_train.optim.low_rank.bases import BASES
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests.distributed import DistributedFailure, run_distributed
from tests.optim.models import (
    LAYER_RANK,
    MATRIX_SHAPES,
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    build,
    gradient,
    laid_out_as,
    prepare,
    run_steps,
    set_gradients,
    states,
    tolerance,
    trained_matrix,
    weights,
)
from tests.tiers import only_first_quick

STEPS = 8
BLENDED = {"exp_avg", "exp_avg_sq", "momentum", "error_feedback"}  # state that has rows, and so is sharded


class Collective(NamedTuple):
    """One call; numbers and bytes are those that this rank hands over."""

    operation: str
    numbers: int
    bytes: int
    ranks: int


class Collectives(TorchDispatchMode):
    """Records every collective, those inside DTensor included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor take it apart, then see the parts
        if func.namespace in ("c10d", "_c10d_functional"):
            operation = func._schema.name.split("::")[1]
            leaves = torch.utils._pytree.tree_leaves(args)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if operation == "alltoall_base_":
                tensors = tensors[1:]  # the first is for what arrives
            scripted = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            groups = [dist.ProcessGroup.unbox(s) for s in scripted if str(s._type()).endswith("ProcessGroup")]
            ranks = groups[0].size() if groups else 0  # DTensor's own operators name their group by a string
            numbers = sum(tensor.numel() for tensor in tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.append(Collective(operation, numbers, size, ranks))
        return func(*args, **(kwargs or {}))


def new_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return prepare(name, MixedModel(dtype))


def one_dimensional_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def two_by_two_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, name: str, placement: str) -> None:
    """fully_shard as the optimizer prefers it, along dimension 0, or 1 where it divides; hsdp: preferred, 2 x 2."""
    mesh = two_by_two_mesh() if placement == "hsdp" else one_dimensional_mesh()
    roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
    cls, world_size = optim.find(name), mesh.size(mesh.ndim - 1)

    def preferred(param: nn.Parameter) -> Shard:
        if placement == "columns":
            return Shard(int(param.ndim > 1 and param.shape[1] % world_size == 0))
        return Shard(cls.shard_dim(roles[param], param.shape, world_size))

    fully_shard(model, mesh=mesh, shard_placement_fn=None if placement == "rows" else preferred)


def trained(name: str, arrange: Callable[[nn.Module], None] | None = None, steps: int = STEPS) -> dict[str, Tensor]:
    """Weights and state, whole, after some steps."""
    model = new_model(name)
    if arrange is not None:
        arrange(model)
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, steps)
    return {**weights(model), **states(model, optimizer)}


def all_trained(placement: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    return {name: trained(name, lambda model, name=name: shard(model, name, placement)) for name in names}


@cache
def trained_alone(name: str) -> dict[str, Tensor]:
    """In one process, unsharded; not to be changed."""
    torch.manual_seed(0)
    return trained(name)


NAMES = optim.names()
LAYOUTS = [
    *(("preferred", 2, NAMES), ("rows", 3, NAMES), ("columns", 2, optim.names(of_matrices=True)), ("hsdp", 4, NAMES)),
    *(("preferred", world_size, NAMES[i::3]) for i, world_size in enumerate((1, 3, 4))),
]
"""Placement, ranks, optimizers: each of them in every placement, and on one of the other numbers of ranks."""


@pytest.mark.parametrize(("placement", "world_size", "names"), only_first_quick(LAYOUTS))
def test_sharded_equals_one_process(placement: str, world_size: int, names: list[str]) -> None:
    for results in run_distributed(all_trained, world_size, placement, names):
        assert list(results) == names
        for name in names:
            assert_equal(results[name], trained_alone(name), tolerance(name))


def layout_of_this_rank(placement: str, name: str = "dct_adamw") -> dict[str, tuple[str, tuple[int, ...]]]:
    model = new_model(name)
    shard(model, name, placement)
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
    spectral = run_distributed(layout_of_this_rank, 4, "preferred", "sst")
    assert spectral[2]["matrix_12x24.u_active"] == ("S(0)", (1, 12))
    assert spectral[3]["matrix_12x24.u_active"] == ("S(0)", (0, 12))
    assert "matrix_3x12.u_frozen" not in spectral[0], "all of it is active"
    assert spectral[1]["matrix_5x4.sigma_frozen"] == ("S(0)", (0,))
    adapters = run_distributed(layout_of_this_rank, 4, "preferred", "relora")
    assert adapters[3]["matrix_6x17.lora_A.default.weight"] == ("S(0)", (0, 17))
    assert adapters[3]["matrix_6x17.base_layer.weight"] == ("S(0)", (0, 17))


def keys_and_kinds_on_this_rank() -> dict[str, list[tuple[str, str]]]:
    found = {}
    for name in optim.names():
        model = new_model(name)
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
                sharded = entry in BLENDED or (entry == "age" and value.ndim == 1)  # SST: of each row
                assert isinstance(value, DTensor) == sharded, (tuple(param.shape), entry)
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
    model = prepare(name, Network())
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


def train_all_networks(placement: str, names: list[str]) -> dict[str, Any]:
    return {name: train_network(name, placement=placement) for name in names}


@pytest.mark.parametrize(
    ("placement", "world_size", "names"),
    only_first_quick([("preferred", 2, NAMES), ("rows", 3, NAMES[::2]), ("hsdp", 4, NAMES[1::2])]),
)
def test_training_through_fsdp_equals_one_process(placement: str, world_size: int, names: list[str]) -> None:
    by_rank = run_distributed(train_all_networks, world_size, placement, names)
    for name in names:
        losses, final = train_network(name, placement=None)
        assert len(set(losses)) == STEPS, name
        for results in by_rank:
            allowed = 10 * tolerance(name)  # the network amplifies what is allowed a step
            assert results[name][0] == pytest.approx(losses, abs=allowed)
            assert_equal(results[name][1], final, allowed)


# -------------------------------------------------------------------------------------------------------- communication


def collectives_of_each_step(name: str, placement: str, steps: int = STEPS) -> list[list[Collective]]:
    model = new_model(name)
    shard(model, name, placement)
    return collectives_of(model, build(name, model), steps)


def collectives_of(model: nn.Module, optimizer: optim.MatrixOptimizer, steps: int) -> list[list[Collective]]:
    recorded = []
    for step in range(steps):
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
            expected = [Collective("allreduce_", numbers, 8 * numbers, 2)] if step % REFRESH_INTERVAL == 0 else []
            assert calls == expected, step


@pytest.mark.slow
def test_a_single_rank_never_communicates() -> None:
    def worker() -> None:
        for placement in ("preferred", "rows"):
            for name in optim.names():
                recorded = collectives_of_each_step(name, placement)
                assert recorded == [[]] * len(recorded), name

    run_distributed(worker, 1)


@pytest.mark.parametrize("placement", ["preferred", "rows"])
def test_adamw_never_communicates(placement: str) -> None:
    for recorded in run_distributed(collectives_of_each_step, 2, "adamw", placement):
        assert recorded == [[]] * len(recorded)


def test_dct_adamw_turns_over_only_the_matrices_sharded_along_their_projected_dimension() -> None:
    wide = [shape for shape in MATRIX_SHAPES if shape[0] < shape[1]]
    for recorded in run_distributed(collectives_of_each_step, 2, "dct_adamw", "rows"):
        ordinary = [call.operation for call in recorded[1]]
        assert ordinary == ["alltoall_base_"] * (2 * len(wide)), "there and back"
        assert [call.operation for call in recorded[0]].count("allreduce_") == 1


class Case(NamedTuple):
    name: str
    arguments: dict[str, Any]
    rules: dict[str, dict[str, Any]] | None = None


# Of these sizes Hadamard matrices exist for the smaller dimension.
SMALL_POWERS_OF_TWO = {"1x8|5x1|8x8|5x4|12x24|24x12": {}, "matrix": {"role": "vector"}}

CASES = {name: Case(name, {}) for name in optim.names()}
PARTS = {
    **{
        f"basis {basis}": Case(
            "low_rank_adamw",
            {"basis": basis, "residual": "drop", "moments": "keep"},
            SMALL_POWERS_OF_TWO if basis == "hadamard" else None,
        )
        for basis in BASES
    },
    **{f"residual {key}": Case("low_rank_adamw", {"basis": "identity", "residual": key}) for key in RESIDUALS},
    "8bit": Case("dct_adamw", {"state_dtype": "8bit"}),
    "point rank": Case("riemannian_adamw", {"point_rank": 2}),
    "trion identity": Case("trion", {"basis": "identity"}),
}


DEALT_ROUND = {"muon"}
"""Whole matrices are one rank's work, another's each: it is their sum over the ranks that can be foreseen."""


HSDP_CASES = ("adamw", "dct_adamw", "fira", "muon", "relora", "scale", "sst")
CHANGED_AT_THE_END = {"relora", "sst"}
AT_MOST = {"sst"}
"""How many rows change places is drawn: foreseen are all that are active."""


def promised_bytes(optimizer: optim.MatrixOptimizer, world_size: int) -> tuple[int, int]:
    """Per ordinary step, and per step that chooses directions."""
    step_bytes, refresh_bytes = 0, 0
    for group in optimizer.param_groups:
        for param in group["params"] if group["role"] in optimizer.updates else ():
            traffic = weight_traffic(optimizer, param, group, world_size)
            step_bytes += traffic.step_bytes
            refresh_bytes += traffic.refresh_bytes
    always = any(group.get("refresh_interval") == 1 for group in optimizer.param_groups)
    return step_bytes + always * refresh_bytes, step_bytes + refresh_bytes


def counted_and_promised(
    cases: dict[str, Case], placement: str, dtype: torch.dtype
) -> dict[str, list[tuple[int, int]]]:
    """Of each case, at the first step after a refresh and at the next refresh: bytes counted, bytes promised."""
    found = {}
    for label, case in cases.items():
        model = new_model(case.name, dtype)
        shard(model, case.name, placement)
        arguments = dict(case.arguments)
        cls = optim.find(case.name)
        own = inspect.signature(cls).parameters
        for setting in {update.interval_setting for update in cls.updates.values()} & own.keys():
            # converted layers change at the end of a step, directions at its beginning
            arguments[setting] = 3 if case.name in CHANGED_AT_THE_END else 2
        if "resvd_every" in own:
            arguments["resvd_every"] = 0  # rarer than what is promised
        optimizer = optim.create(case.name, optim.param_groups(model, rules=case.rules), **arguments)
        counted = []
        for calls in collectives_of(model, optimizer, 3)[1:]:
            # What one rank decided goes to the replicas too; the promise is for one.
            again = sum(call.bytes for call in calls if call.operation == "broadcast_") // 2
            counted.append(sum(call.bytes for call in calls) - again * (placement == "hsdp"))
        shards = next(model.parameters()).device_mesh.size(-1)
        found[label] = list(zip(counted, promised_bytes(optimizer, shards), strict=True))
    return found


@pytest.mark.parametrize(
    ("placement", "world_size", "dtype", "cases"),
    only_first_quick(
        [
            ("preferred", 2, torch.float64, CASES | PARTS),
            ("preferred", 4, torch.bfloat16, {**CASES, "svd": PARTS["basis svd"]}),
            ("hsdp", 4, torch.float32, {name: CASES[name] for name in HSDP_CASES}),
        ]
    ),
)
def test_collectives_carry_the_bytes_that_are_promised(
    placement: str, world_size: int, dtype: torch.dtype, cases: dict[str, Case]
) -> None:
    """To the rank with the largest shares; of what is dealt round, on average.

    17 columns do not divide by 2, nor 6 by 4: turning over is counted.
    """
    first, *others = by_rank = run_distributed(counted_and_promised, world_size, cases, placement, dtype)
    for label, pairs in first.items():
        for i, (counted, promised) in enumerate(pairs):
            if label in DEALT_ROUND:
                mean = sum(found[label][i][0] for found in by_rank) / world_size
                assert mean <= promised <= 1.25 * mean, label  # the promise is of even shares, rounded up
            elif label in AT_MOST and i == 1:
                assert promised / 4 < counted <= promised, label
            else:
                assert counted == promised, label
                assert all(other[label][i][0] <= counted for other in others), label
    silent = {label for label, pairs in first.items() if not any(counted for counted, _ in pairs)}
    assert silent == {"adamw", "riemannian_adamw"} & set(cases)


def drawn_bytes(name: str, *, decomposed: bool) -> int:
    """What a rank hands over where layers of ``LAYER_RANK`` change factors, in float64; of SST drawn in sequence."""
    total = 0
    for rows, columns in MATRIX_SHAPES:
        r, k = LAYER_RANK, min(rows, columns)
        if k < r:
            continue
        if name == "relora":
            total += r * columns  # A, to be multiplied
            continue
        arriving = 0 if decomposed else min(r, k - r)
        total += k + r * (rows + columns) + 1  # all sigma; U and V, and a number, to say how orthogonal they are
        total += 2 * arriving * (rows + columns + 1)  # there and back: u, v and sigma
        if decomposed:
            total += rows * columns  # W is summed on its owner
            total += k * (rows + columns + 1)  # who tells the others
    return 8 * total


@pytest.mark.parametrize("name", ["relora", "sst"])
def test_layers_communicate_where_factors_change_and_nothing_in_between(name: str) -> None:
    def worker() -> tuple[list[int], list[set[str]]]:
        model = new_model(name)
        shard(model, name, "preferred")
        settings = {"sampling": "sequential"} if name == "sst" else {}
        recorded = collectives_of(model, build(name, model, **settings), 2 * REFRESH_INTERVAL + 1)
        return [sum(call.bytes for call in calls) for calls in recorded], [{c.operation for c in r} for r in recorded]

    for counted, operations in run_distributed(worker, 2):
        expected = [0] * (2 * REFRESH_INTERVAL + 1)
        expected[REFRESH_INTERVAL - 1] = drawn_bytes(name, decomposed=False)
        expected[2 * REFRESH_INTERVAL - 1] = drawn_bytes(name, decomposed=True)
        assert counted == expected
        told = {"allreduce_"} if name == "relora" else {"allreduce_", "reduce_", "broadcast_"}
        assert operations[2 * REFRESH_INTERVAL - 1] == told


@pytest.mark.parametrize("name", ["relora", "sst"])
def test_what_a_change_of_factors_costs_is_predicted(name: str) -> None:
    """By ``communicated_bytes``, as a refresh is of other methods: the interval, and more than nothing."""
    interval = {"relora": "restart_every", "sst": "resample_every"}[name]
    sent = communicated_bytes(name, new_model(name), world_size=2, **{interval: 7})
    assert sent.step_payload == 0
    assert sent.refresh_payload > 0
    assert sent.interval == 7


@pytest.mark.parametrize("name", ["relora", "sst"])
def test_layers_sharded_within_their_rows_are_refused_before_these_change(name: str) -> None:
    """A vector would be normalised by a part of its length; not only at the first draw or restart.

    So every test here shards converted layers by rows, and none along dimension 1.
    """

    def worker() -> None:
        model = new_model(name)

        def columns(param: nn.Parameter) -> Shard:
            return Shard(1 if param.ndim == 2 and param.shape[1] % 2 == 0 else 0)

        fully_shard(model, mesh=one_dimensional_mesh(), shard_placement_fn=columns)
        before = weights(model)
        with pytest.raises(ValueError, match=r"sharded along dimension 1; its rows .*must stay whole: shard it along"):
            run_steps(model, build(name, model), 0, 1)
        cut = [key for key, param in model.named_parameters() if param.placements[0] == Shard(1)]
        after = weights(model)
        changed = [key for key in cut if not torch.equal(after[key], before[key])]
        assert all(key.startswith(("embedding", "head", "matrix_1x8.")) for key in changed), "AdamW cuts no rows"

    run_distributed(worker, 2)


@pytest.mark.parametrize(("name", "fused"), [("dct_adamw", False), ("dct_adamw", True), ("fira", False)])
def test_a_rank_without_rows_takes_part_in_turning_a_matrix_over(name: str, fused: bool) -> None:
    """Of 9 rows in 4 parts the last has none; and of 6 columns none too."""

    @torch.no_grad()
    def train(mesh: DeviceMesh | None) -> Tensor:
        value = gradient("weight", torch.Size((9, 6)), 0)
        sharded = value if mesh is None else distribute_tensor(value, mesh, [Shard(1)], src_data_rank=None)
        param = nn.Parameter(sharded)
        optimizer = build(name, [{"params": [("w", param)], "role": "matrix"}])
        for step in range(5):
            param.grad = laid_out_as(param, gradient("w", param.shape, step))
            (slot,) = optimizer.slots()
            if fused:
                update = optimizer.update_of(slot.group)
                coordinates = update.project_gradient(slot, refresh=True)
                assert coordinates is not None
                update.step_coordinates(slot, coordinates)
            else:
                optimizer.step()
        return param.full_tensor() if isinstance(param, DTensor) else param.detach()

    for final in run_distributed(lambda: train(one_dimensional_mesh()), 4):
        assert (final - train(None)).abs().max() <= tolerance(name)


def test_collectives_are_seen_inside_dtensor_too() -> None:
    """Or the counts above would prove nothing."""

    def worker() -> tuple[list[str], list[str]]:
        sharded = distribute_tensor(torch.ones(4, 4), one_dimensional_mesh(), [Shard(0)], src_data_rank=None)
        with Collectives() as gather:
            sharded.full_tensor()
        with Collectives() as reduce:
            dist.all_reduce(torch.ones(3))
        return [call.operation for call in gather.calls], [call.operation for call in reduce.calls]

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
        model = new_model(name)
        optimizer = build(name, model)
        if through_state_dict:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        shard(model, name, placement)
        swap_parameters(model, optimizer)
        run_steps(model, optimizer, 0, REFRESH_INTERVAL + 1)
        assert set(optimizer.state) == set(model.parameters())
        before = {**weights(model), **states(model, optimizer)}
        after = trained(name, lambda model, name=name: shard(model, name, placement), REFRESH_INTERVAL + 1)
        results[name] = (before, after)
    return results


@pytest.mark.parametrize(("placement", "through_state_dict"), only_first_quick([("preferred", False), ("rows", True)]))
def test_built_before_sharding_equals_built_after(placement: str, through_state_dict: bool) -> None:
    for results in run_distributed(built_before_and_after_sharding, 2, placement, through_state_dict):
        for before, after in results.values():
            assert_equal(before, after)


def moved_to_another_placement() -> dict[str, Any]:
    results = {}
    for name in optim.names():
        source, target = new_model(name), new_model(name)
        # Not this optimizer's own preference: AdamW prefers rows, and nothing would move.
        shard(source, "dct_adamw", "preferred")
        shard(target, name, "rows")
        source_optimizer, optimizer = build(name, source), build(name, target)
        run_steps(source, source_optimizer, 0, 4)
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
                ours.copy_(laid_out_as(ours, theirs.full_tensor()))
        optimizer.load_state_dict(source_optimizer.state_dict())
        run_steps(target, optimizer, 4, STEPS)
        plain = new_model(name)
        plain_optimizer = build(name, plain)
        plain_optimizer.load_state_dict(source_optimizer.state_dict())
        results[name] = (
            {**weights(target), **states(target, optimizer)},
            states(plain, plain_optimizer),
            states(source, source_optimizer),
        )
    return results


@pytest.mark.slow
def test_state_moves_between_placements_and_to_an_unsharded_optimizer() -> None:
    for results in run_distributed(moved_to_another_placement, 2):
        for name, (moved, plain, source) in results.items():
            assert_equal(plain, source)
            assert_equal(moved, trained_alone(name), tolerance(name))


def resumed_into_swapped_parameters() -> dict[str, Any]:
    """A checkpoint loaded after the swap and before the first step."""
    results = {}
    for name in optim.names():
        source = new_model(name)
        source_optimizer = build(name, source)
        run_steps(source, source_optimizer, 0, 4)
        model = new_model(name)
        model.load_state_dict(source.state_dict())
        optimizer = build(name, model)
        shard(model, name, "preferred")
        swap_parameters(model, optimizer)
        optimizer.load_state_dict(source_optimizer.state_dict())
        run_steps(model, optimizer, 4, STEPS)
        results[name] = {**weights(model), **states(model, optimizer)}
    return results


@pytest.mark.slow
def test_an_unsharded_checkpoint_resumes_in_a_sharded_optimizer() -> None:
    for results in run_distributed(resumed_into_swapped_parameters, 3):
        for name, result in results.items():
            assert_equal(result, trained_alone(name), tolerance(name))


def test_replacing_parameters_after_an_update_is_refused() -> None:
    def worker() -> list[str]:
        refused = []
        for name in optim.names():
            model = new_model(name)
            optimizer = build(name, model)
            run_steps(model, optimizer, 0, 1)
            shard(model, name, "preferred")
            swap_parameters(model, optimizer)
            before = weights(model)
            set_gradients(model, 1)
            with pytest.raises(RuntimeError, match=r"replaced after it had made updates.*shard the model first"):
                optimizer.step()
            assert_equal(weights(model), before)
            refused.append(name)
        return refused

    assert run_distributed(worker, 2) == [optim.names()] * 2


# ----------------------------------------------------------------------------------------------------------- hard cases


@pytest.mark.parametrize("placement", only_first_quick(["preferred", "rows"]))
def test_a_gradient_missing_on_one_rank_at_a_refresh_does_not_hang(placement: str) -> None:
    """That rank adds nothing to the sums and leaves its rows alone; directions stay equal on all ranks."""

    def worker() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        results = {}
        for name in optim.names():
            model = new_model(name)
            shard(model, name, placement)
            optimizer = build(name, model)
            missing = trained_matrix(model.matrix_24x12)
            plain = optim.find(name).layers is None
            for step in range(REFRESH_INTERVAL + 2):
                set_gradients(model, step)
                # what changes converted layers, with or without gradients, comes at the end of a step
                skipped = dist.get_rank() == 1 and step in ({3} if plain else {2, 3})
                if skipped:
                    missing.grad = None
                before = missing.to_local().clone()
                optimizer.step()
                if plain or step != REFRESH_INTERVAL - 1:
                    assert torch.equal(missing.to_local(), before) == skipped, name
            state = optimizer.state[missing]
            basis = {key: value.clone() for key, value in state.items() if key.startswith("basis")}
            results[name] = (basis, weights(model))
        return results

    first, second = run_distributed(worker, 2)
    for name in optim.names():
        for one, other in zip(first[name], second[name], strict=True):
            assert_equal(one, other)
        assert all(value.isfinite().all() for value in first[name][1].values())
    assert all(first[name][0] for name in optim.names() if "basis" in inspect.signature(optim.find(name)).parameters)


def test_a_gradient_not_finite_on_one_shard_keeps_the_columns_on_all_ranks() -> None:
    def worker() -> tuple[list[int], list[int]]:
        model = new_model("dct_adamw")
        shard(model, "dct_adamw", "preferred")
        optimizer = build("dct_adamw", model)
        hurt = model.matrix_24x12.weight
        run_steps(model, optimizer, 0, REFRESH_INTERVAL)
        before = optimizer.state[hurt]["basis_index"].tolist()
        set_gradients(model, REFRESH_INTERVAL)
        if dist.get_rank() == 1:
            hurt.grad.to_local()[0, 0] = float("inf")
        with pytest.warns(UserWarning, match=r"the gradient of 'matrix_24x12\.weight' is not finite"):
            optimizer.step()
        assert optimizer.skipped_refreshes == 1
        return before, optimizer.state[hurt]["basis_index"].tolist()

    before, after = zip(*run_distributed(worker, 2), strict=True)
    assert before == after


# ----------------------------------------------------------------------------------------------- unlike ones together

DIFFERENT_PARTS: dict[str, dict[str, Any]] = {
    "12x24|5x4": {"basis": "svd", "residual": "error_feedback", "moments": "keep"},
    "24x12": {"basis": "subspace", "residual": "fira", "refresh_interval": 2},
    "17x6|1x8": {"basis": "random_columns", "residual": "sign", "moments": "reset", "refresh_interval": 1},
    "6x17": {"basis": "gaussian", "residual": "apollo_mini", "moments": "keep"},
    "8x8": {"basis": "power", "residual": "ldadam", "refresh_interval": 1, "state_dtype": "float32"},
}


def train_different_parts(placement: str | None) -> dict[str, Tensor]:
    model = new_model("low_rank_adamw")
    if placement is not None:
        shard(model, "low_rank_adamw", placement)
    groups = optim.param_groups(model, rules=DIFFERENT_PARTS)
    optimizer = optim.create("low_rank_adamw", groups, lr=1e-2, refresh_interval=3)
    run_steps(model, optimizer, 0, STEPS)
    return {**weights(model), **states(model, optimizer)}


@pytest.mark.parametrize(("placement", "world_size"), [("preferred", 3), ("rows", 2)])
def test_matrices_of_different_methods_keep_step(placement: str, world_size: int) -> None:
    """Refreshes, rounds and sums of one do not get mixed up with those of another."""
    expected = train_different_parts(None)
    for results in run_distributed(train_different_parts, world_size, placement):
        assert_equal(results, expected, tolerance("fira"))


def test_matrices_of_different_dtypes_keep_step() -> None:
    """One sum over the ranks for each."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32]

    def train(name: str, mesh: DeviceMesh | None) -> tuple[list[Tensor], list[int]]:
        params = []
        for i, dtype in enumerate(dtypes):
            value = gradient(f"weight {i}", torch.Size((24, 12)), 0).to(dtype)
            sharded = value if mesh is None else distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
            params.append(nn.Parameter(sharded))
        optimizer = build(name, [{"params": [(str(i), p) for i, p in enumerate(params)], "role": "matrix"}])
        sums = []
        for step in range(REFRESH_INTERVAL + 1):
            for i, param in enumerate(params):
                param.grad = laid_out_as(param, gradient(str(i), param.shape, step).to(param.dtype))
            with Collectives() as collectives:
                optimizer.step()
            sums.append(len(collectives.calls))
        return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params], sums

    def worker() -> dict[str, tuple[list[Tensor], list[int]]]:
        return {name: train(name, one_dimensional_mesh()) for name in ("dct_adamw", "apollo")}

    for results in run_distributed(worker, 2):
        for name, (final, sums) in results.items():
            # two dtypes of arithmetic, float32 and float64; APOLLO sums at every step, and once more for its draw
            assert sums == {"dct_adamw": [2, 0, 0, 2], "apollo": [4, 2, 2, 4]}[name]
            for value, expected in zip(final, train(name, None)[0], strict=True):
                assert value.dtype == expected.dtype
                precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[value.dtype]
                assert (value - expected).abs().max() <= precision


# ------------------------------------------------------------------------------------------- more than two dimensions

BY_METHOD = {r"conv.*weight": {"role": "matrix"}}


class Convolutions(nn.Module):
    """Taken as the first dimension by all others, one is wide and one tall. Never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 5, dtype=torch.float64)  # (6, 20)
        self.conv2 = nn.Conv2d(3, 25, 2, dtype=torch.float64)  # (25, 12)
        self.flat = nn.Linear(7, 12, dtype=torch.float64)


def train_convolutions(
    name: str,
    rules: dict[str, dict[str, Any]] | None,
    arrange: Callable[[nn.Module], Any] = lambda model: None,
) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(0)
    model = prepare(name, Convolutions())
    arrange(model)
    arguments = {"lr": 1e-2, "weight_decay": 0.1}
    if "refresh_interval" in inspect.signature(optim.find(name)).parameters:
        arguments["refresh_interval"] = 3
    optimizer = optim.create(name, optim.param_groups(model, rules=rules), **arguments)
    run_steps(model, optimizer, 0, 5)
    return model, optimizer


def all_convolutions(placement: str) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name in optim.names():
        model, optimizer = train_convolutions(name, BY_METHOD, lambda model, name=name: shard(model, name, placement))
        results[name] = {**weights(model), **states(model, optimizer)}
    return results


def test_parameters_of_more_dimensions_sharded_equal_one_process() -> None:
    for results in run_distributed(all_convolutions, 3, "preferred"):
        for name in optim.names():
            model, optimizer = train_convolutions(name, BY_METHOD)
            assert_equal(results[name], {**weights(model), **states(model, optimizer)}, tolerance(name))


@pytest.mark.parametrize("name", optim.names())
def test_more_dimensions_are_the_first_by_all_others(name: str) -> None:
    def flatten(model: nn.Module) -> None:
        for module in (model.conv1, model.conv2):
            module.weight = nn.Parameter(module.weight.detach().flatten(1))

    model, optimizer = train_convolutions(name, BY_METHOD)
    shapes = {key: param.shape for key, param in model.named_parameters()}
    # gradients are drawn by name and shape: those of the flat ones are the flattened
    flat, flat_optimizer = train_convolutions(name, BY_METHOD, flatten)
    for key, value in weights(flat).items():
        assert torch.equal(value.view(shapes[key]), weights(model)[key]), key
    for key, value in states(flat, flat_optimizer).items():
        assert torch.equal(value.flatten(), states(model, optimizer)[key].flatten()), key


@pytest.mark.parametrize("name", optim.names())
def test_without_a_rule_more_dimensions_get_adamw(name: str) -> None:
    """They are never skipped, and their weight decay is that of the group."""
    model, _ = train_convolutions(name, None)
    adamw, _ = train_convolutions("adamw", None)
    expected, settings = weights(adamw), optim.create(name, model).param_groups[0]
    assert not torch.equal(expected["conv2.weight"], weights(Convolutions())["conv2.weight"])
    if (settings["betas"], settings["eps"]) == ((0.9, 0.999), 1e-8):
        # gradients are drawn by name: the bias beside an adapter has another
        named = {"conv1.weight", "conv2.weight", "conv1.bias", "flat.bias"} & weights(model).keys()
        assert named >= {"conv1.weight", "conv2.weight", "conv1.bias"}
        for key in named:
            assert torch.equal(weights(model)[key], expected[key]), key
    else:
        torch.manual_seed(0)
        before = weights(Convolutions())
        for key in ("conv1.weight", "conv2.weight"):
            assert (weights(model)[key] != before[key]).all()


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("rules", [BY_METHOD, None], ids=["matrix", "vector"])
def test_the_layout_in_memory_does_not_matter(name: str, rules: dict[str, dict[str, Any]] | None) -> None:
    """A weight may be channels_last, transposed, or a part of a larger tensor; and so may its gradient."""

    def turn(model: nn.Module) -> None:
        model.conv2.to(memory_format=torch.channels_last)
        model.conv1.weight = nn.Parameter(model.conv1.weight.detach().transpose(0, 2).contiguous().transpose(0, 2))
        for module in model.flat.modules():  # of a converted layer, all it has
            for key, param in list(module.named_parameters(recurse=False)):
                value = param.detach()
                value = value.mT.contiguous().mT if value.ndim == 2 else torch.stack([value] * 2, 1)[:, 0]
                setattr(module, key, nn.Parameter(value, requires_grad=param.requires_grad))
        assert not any(param.is_contiguous() for key, param in model.named_parameters() if not key.startswith("conv1.b")
                       and not key.startswith("conv2.b"))  # fmt: skip

    model, optimizer = train_convolutions(name, rules)
    turned, turned_optimizer = train_convolutions(name, rules, turn)
    # torch's fused AdamW, which only contiguous tensors get, rounds otherwise
    assert_equal(weights(turned), weights(model), tolerance(name))
    assert_equal(states(turned, turned_optimizer), states(model, optimizer), tolerance(name))


def test_more_dimensions_sharded_along_another_than_the_first_are_refused() -> None:
    def worker() -> None:
        for name in ("dct_adamw", "muon", "trion"):
            weight = distribute_tensor(torch.ones(4, 6, 3), one_dimensional_mesh(), [Shard(1)])
            param = nn.Parameter(weight)
            group = {"params": [("conv", param)], "role": "matrix", "weight_layout": "out,rest"}
            optimizer = optim.create(name, [group])
            param.grad = laid_out_as(param, torch.ones(4, 6, 3))
            with pytest.raises(ValueError, match=r"of shape \(4, 6, 3\) sharded along dimension 1: .* along the first"):
                optimizer.step()

    run_distributed(worker, 2)


# ------------------------------------------------------------------------------------------------------------ bfloat16


def bfloat16_steps(placement: str | None) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name in optim.names():
        model = new_model(name, torch.bfloat16)
        if placement is not None:
            shard(model, name, placement)
        optimizer = build(name, model)
        run_steps(model, optimizer, 0, REFRESH_INTERVAL + 1)
        results[name] = {**weights(model), **states(model, optimizer)}
    return results


@pytest.mark.parametrize("placement", ["preferred", "rows"])
@pytest.mark.slow
def test_bfloat16_keeps_its_dtypes_when_sharded(placement: str) -> None:
    expected = bfloat16_steps(None)
    for results in run_distributed(bfloat16_steps, 2, placement):
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
        model = new_model("dct_adamw")
        shard(model, "dct_adamw", "preferred")
        return all(
            torch.equal(laid_out_as(p, value := gradient(n, p.shape, 0)).full_tensor(), value)
            for n, p in model.named_parameters()
        )

    assert run_distributed(worker, 3) == [True, True, True]
