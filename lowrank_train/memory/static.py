"""Bytes a training holds between its steps: predicted from shapes, and measured. The two are equal, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lowrank_train import optim
from lowrank_train.models.fsdp import shard_dims
from lowrank_train.optim.shards.layout import StateTensor, local, local_shape
from lowrank_train.optim.storage.int8_weight import held_bytes

if TYPE_CHECKING:
    from lowrank_train.plan import Plan

__all__ = ["StaticMemory", "measured", "predicted"]


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one rank, as SST's paper counts them: no activations, logits, workspace or gathered weights."""

    weights: int
    gradients: int
    """One for each number that is trained, in its own type."""
    optimizer_state: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.gradients + self.optimizer_state


def predicted(plan: Plan, *, shard: int = 0) -> StaticMemory:
    """Return what one rank will hold, ``shard`` of those that share a copy of the model."""
    shards = plan.mesh.shards
    dims = shard_dims(plan.model, plan.optimizer_class, shards)
    weights = gradients = 0
    for param in plan.model.parameters():
        spec = StateTensor(tuple(param.shape), param.dtype, "parameter")
        shape = local_shape(spec, dims.get(param, 0), shard, shards)
        weights += held_bytes(param, shape)
        gradients += math.prod(shape) * param.dtype.itemsize if param.requires_grad else 0
    return StaticMemory(weights, gradients, plan.state_bytes(shard=shard))


def measured(model: nn.Module, optimizer: optim.MatrixOptimizer) -> StaticMemory:
    """Return what this rank holds; gradients are there after a backward pass only."""
    weights = [local(param) for param in model.parameters()]
    gradients = [local(param.grad) for param in model.parameters() if param.grad is not None]
    return StaticMemory(
        sum(map(held_bytes, weights)),
        sum(grad.numel() * grad.element_size() for grad in gradients),
        optim.state_bytes(optimizer),
    )
