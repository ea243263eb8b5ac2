"""Sharding of small models for tests that name a class, not a registered optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_train import optim
from lowrank_train.optim.costs.sent import weight_traffic
from tests.optim.models import MixedModel, run_steps, states, weights

Placement = Literal["preferred", "rows", "columns"]
Build = Callable[[nn.Module], optim.MatrixOptimizer]


def shard(model: nn.Module, cls: type[optim.MatrixOptimizer], placement: Placement) -> None:
    """fully_shard as the optimizer prefers it; or along dimension 0; or along 1 where FSDP2 accepts that."""
    world_size = dist.get_world_size()
    roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}

    def place(param: nn.Parameter) -> Shard:
        if placement == "preferred":
            return Shard(cls.shard_dim(roles[param], param.shape, world_size))
        divisible = param.ndim > 1 and param.shape[1] % world_size == 0
        return Shard(1 if placement == "columns" and divisible else 0)

    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), shard_placement_fn=place)


def trained(build: Build, steps: int, prepare: Callable[[nn.Module], None] = lambda model: None) -> dict[str, Tensor]:
    """Weights and state, whole, of a mixed model after some steps."""
    torch.manual_seed(0)
    model = MixedModel()
    prepare(model)
    optimizer = build(model)
    run_steps(model, optimizer, 0, steps)
    return {**weights(model), **states(model, optimizer)}


def promised_bytes(optimizer: optim.MatrixOptimizer, shape: tuple[int, ...], world_size: int, **settings: Any) -> int:
    """What a step of one bfloat16 weight is said to hand to collectives, with other settings than its first group."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return weight_traffic(optimizer, weight, optimizer.param_groups[0] | settings, world_size).step_bytes


class AllToAlls(TorchDispatchMode):
    """Records the bytes this rank hands to every all-to-all, and fails at other collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            assert func._schema.name == "c10d::alltoall_base_", func
            self.bytes.append(args[1].numel() * args[1].element_size())
        return func(*args, **(kwargs or {}))


class AllReduces(TorchDispatchMode):
    """Records the bytes of every all-reduce of this rank, and fails at other collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            assert func._schema.name == "c10d::allreduce_", func
            self.bytes += [tensor.numel() * tensor.element_size() for tensor in args[0]]
        return func(*args, **(kwargs or {}))
