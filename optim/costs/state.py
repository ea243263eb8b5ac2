"""Bytes of optimizer state: predicted from shapes, and counted. The two are equal, exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.optim.core.coverage import unwarned
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.methods import create
from lowrank_train.optim.shards.layout import local, local_shape

__all__ = ["layout_bytes", "predicted_state_bytes", "state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state tensors this rank holds (host memory included), of any torch optimizer."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


def predicted_state_bytes(
    name: str, model: nn.Module | list[dict[str, Any]], *, world_size: int = 1, shard: int = 0, **arguments: Any
) -> int:
    """Return the bytes of state that ``create(name, model, **arguments)`` holds on one rank.

    Args:
        name: one of ``optim.names()``.
        model: or groups that ``optim.param_groups`` made of it, with rules perhaps; on any device (shapes and dtypes
            are read, so ``meta`` costs nothing).
        world_size: ranks a parameter is sharded over; 1 for none.
        shard: which of them, 0 .. world_size - 1 (the first hold the larger shards).
        arguments: the optimizer's own.

    Raises:
        ValueError: as ``create`` does.
    """
    groups = [
        {**group, "params": [(key, torch.empty(p.shape, dtype=p.dtype, device="meta")) for key, p in group["params"]]}
        for group in (param_groups(model) if isinstance(model, nn.Module) else model)
    ]
    with unwarned():
        optimizer = create(name, groups, **arguments)
    return layout_bytes(optimizer, world_size=world_size, shard=shard)


def layout_bytes(
    optimizer: MatrixOptimizer, *, world_size: int = 1, shard: int = 0, on_device_only: bool = False
) -> int:
    """Return the bytes of state by the layouts of an optimizer as it is now; arguments as for
    ``predicted_state_bytes``.

    The parameters may be sharded or not: their global shapes are read. ``on_device_only``: without state that is
    offloaded.
    """
    total = 0
    for slot in optimizer.slots():
        if on_device_only and slot.group["offload_state"]:
            continue
        dim = optimizer.shard_dim(slot.group["role"], slot.param.shape, world_size)
        for spec in optimizer.state_layout(slot.name, slot.param, slot.group).values():
            total += math.prod(local_shape(spec, dim, shard, world_size)) * spec.dtype.itemsize
    return total
