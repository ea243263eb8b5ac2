"""Bytes of state: predicted = counted = a formula written down independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import optim
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, build, run_steps, tiny_llama, tiny_opt

RANK = 2

# An nn.Linear with one input has min(m, n) = 1, so the mixed model is used with the default rank.
MODELS: list[Any] = [
    pytest.param(tiny_llama, RANK, id="llama"),
    pytest.param(lambda: tiny_llama(tied=True), RANK, id="llama_tied"),
    pytest.param(tiny_opt, RANK, id="opt"),
    pytest.param(lambda: nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)), RANK, id="sequential"),
    pytest.param(MixedModel, None, id="mixed"),
]
ARGUMENTS: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "adamw": lambda rank: {},
    "dct_adamw": lambda rank: {"rank": rank},
}

STEP_BYTES = 4
INDEX_BYTES = 4


def adamw_bytes(elements: int, itemsize: int) -> int:
    return 2 * elements * itemsize + STEP_BYTES


def dct_adamw_bytes(rows: int, rank: int, itemsize: int) -> int:
    """Two moments of the given rows, one index and one age per direction."""
    return 2 * rows * rank * itemsize + 2 * rank * INDEX_BYTES + STEP_BYTES


def is_matrix(name: str, param: Tensor) -> bool:
    return param.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "head"))


def expected_bytes(name: str, model: nn.Module, rank: int | None, world_size: int = 1, shard: int = 0) -> int:
    """The closed formula, with torch.chunk's share of an uneven dimension: ceil(size / world_size) for the first."""

    def share(size: int) -> int:
        step = math.ceil(size / world_size)
        return min(step, max(0, size - shard * step))

    total = 0
    for key, param in model.named_parameters():
        size = param.element_size()
        if name == "dct_adamw" and is_matrix(key, param):
            m, d = max(param.shape), min(param.shape)
            total += dct_adamw_bytes(share(m), rank or max(1, d // 4), size)
        else:
            total += adamw_bytes(share(param.shape[0]) * math.prod(param.shape[1:]), size)
    return total


def test_every_registered_optimizer_is_covered() -> None:
    assert sorted(ARGUMENTS) == optim.names()


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize(("make", "rank"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_equals_counted_equals_formula(
    name: str, make: Callable[[], nn.Module], rank: int | None, dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    arguments = ARGUMENTS[name](rank)
    optimizer = build(name, model, **arguments)
    counted = optim.state_bytes(optimizer)
    assert counted == optim.predicted_state_bytes(name, model, **arguments)
    assert counted == expected_bytes(name, model, rank)
    with torch.device("meta"):
        weightless = make().to(dtype)
    assert optim.predicted_state_bytes(name, weightless, **arguments) == counted


@pytest.mark.parametrize("name", optim.names())
def test_steps_do_not_change_the_bytes(name: str) -> None:
    model = MixedModel()
    optimizer = build(name, model)
    before = optim.state_bytes(optimizer)
    run_steps(model, optimizer, 0, 9)
    assert optim.state_bytes(optimizer) == before


def test_state_bytes_counts_torch_optimizers_too() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    assert optim.state_bytes(optimizer) == 0
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    assert optim.state_bytes(optimizer) == 2 * (12 + 3) * 4 + 2 * 4


def test_prediction_reports_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rank=1000 exceeds"):
        optim.predicted_state_bytes("dct_adamw", MixedModel(), rank=1000)
    with pytest.raises(ValueError, match="takes no argument 'rnk'"):
        optim.predicted_state_bytes("dct_adamw", MixedModel(), rnk=1)


def sharded_bytes() -> dict[str, int]:
    """Counted on this rank, by optimizer and model."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    counted = {}
    for name in optim.names():
        for label, (make, rank) in sharded_models().items():
            model = make()
            roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
            cls = optim.find(name)
            fully_shard(
                model,
                mesh=mesh,
                shard_placement_fn=lambda p, cls=cls, roles=roles: Shard(cls.shard_dim(roles[p], p.shape, world_size)),
            )
            counted[f"{name} {label}"] = optim.state_bytes(build(name, model, **ARGUMENTS[name](rank)))
    return counted


def sharded_models() -> dict[str, tuple[Callable[[], nn.Module], int | None]]:
    return {"llama": (tiny_llama, RANK), "mixed": (MixedModel, None)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_holds_what_is_predicted_for_it(world_size: int) -> None:
    by_rank = run_distributed(sharded_bytes, world_size)
    for shard, counted in enumerate(by_rank):
        for name in optim.names():
            for label, (make, rank) in sharded_models().items():
                model, arguments = make(), ARGUMENTS[name](rank)
                predicted = optim.predicted_state_bytes(name, model, world_size=world_size, shard=shard, **arguments)
                assert counted[f"{name} {label}"] == predicted, (shard, name, label)
                assert predicted == expected_bytes(name, model, rank, world_size, shard), (shard, name, label)
    assert by_rank[0] != by_rank[-1], "sizes must be uneven, or the test could not tell the shards apart"
