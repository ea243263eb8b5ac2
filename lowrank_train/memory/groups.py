"""The bytes of FSDP2's groups: one for each decoder layer, and the root for embeddings, final norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lowrank_train.models.fsdp import shard_dims
from lowrank_train.optim.storage.int8_weight import Int8Weight, held_bytes

if TYPE_CHECKING:
    from lowrank_train.plan import Plan

__all__ = ["Group", "fsdp_groups"]


@dataclass(frozen=True)
class Group:
    """Bytes of an FSDP group."""

    gathered: int
    """Whole parameters, in the type of the arithmetic; beside them, with more than one rank, those kept in int8."""
    travelling: int
    """The buffer they are gathered in."""
    widened: int
    """The largest parameter kept in int8, in the type of the arithmetic: a single rank copies it."""
    turned: int
    """Those of them that are sharded along dimension 1: they are put together in a second copy."""
    gradients: int
    """Whole gradients, in the type of the arithmetic."""
    reduced: int
    """Bytes of the gradients in the type they are reduced in."""
    stored: int
    """Bytes of the gradients in the type of the weights, in which their shards are kept."""
    last: int
    """The last of the gradients, which FSDP2 holds on to until all are reduced, with more than one rank."""

    def reducing(self, world_size: int) -> int:
        """Return the most that is needed to reduce: gradients beside their copy, or that beside this rank's share of
        the sum.
        """
        last = self.last if world_size > 1 else 0
        converted = self.stored // world_size if self.stored < self.reduced else 0
        return self.reduced + max(self.gradients, self.reduced // world_size + last + converted)

    def summed(self, world_size: int, accumulates: bool) -> int:
        """Return the share of a rank as HSDP summed it, where that is not the gradient itself: FSDP2 keeps both."""
        return self.reduced // world_size if self.stored < self.reduced or accumulates else 0


def fsdp_groups(plan: Plan, compute: int) -> tuple[list[Group], Group]:
    """Return the groups of the decoder layers, in order, and the root.

    Args:
        plan: of the run.
        compute: bytes of a number in the arithmetic.
    """
    model, shards = plan.model, plan.mesh.shards
    dims = shard_dims(model, plan.optimizer_class, shards)
    blocks = [list(layer.parameters()) for layer in model.get_decoder().layers]
    inside = {param for block in blocks for param in block}
    rest = [param for param in model.parameters() if param not in inside]
    narrowest = compute if plan.world_size == 1 else 4  # in which gradients are reduced, unless the weights are wider
    groups = [_group(params, dims, compute, narrowest, shared=shards > 1) for params in (*blocks, rest)]
    return groups[:-1], groups[-1]


def _group(
    params: list[nn.Parameter], dims: dict[Tensor, int], itemsize: int, narrowest: int, *, shared: bool
) -> Group:
    def compute(param: Tensor) -> int:
        return param.numel() * (itemsize if param.is_floating_point() else param.element_size())

    trained = [param for param in params if param.requires_grad]
    in_int8 = [param for param in params if isinstance(param, Int8Weight)]
    held = sum(map(held_bytes, in_int8))
    whole = sum(map(compute, params))
    return Group(
        gathered=whole + held * shared,
        travelling=whole - sum(map(compute, in_int8)) + held,
        widened=max(map(compute, in_int8), default=0) * (not shared),
        turned=sum(compute(param) for param in params if dims.get(param, 0) != 0),
        gradients=sum(map(compute, trained)),
        reduced=sum(param.numel() * max(param.element_size(), narrowest) for param in trained),
        stored=sum(param.numel() * param.element_size() for param in trained),
        last=compute(trained[-1]) if trained else 0,
    )
