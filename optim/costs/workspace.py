"""What a step of an optimizer needs beyond parameters, gradients and state: predicted from shapes and settings.

Every update says what it needs (``Update.workspace``), beside its code. Here it is added up in the order of a step
(``optim.core.stepping``): parameters that are updated in place go together, one update after the other; those that are
copied go in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.update import Update
from lowrank_train.optim.core.working_copies import AT_ONCE, copied_tensors, is_copied
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.parameters.stacks import leading, matrix_like
from lowrank_train.optim.shards.blocks import chunks, largest_block
from lowrank_train.optim.shards.layout import StateTensor, local_shape, matrix_shape, projected_dim
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace
from lowrank_train.optim.storage.int8_weight import Int8Weight
from lowrank_train.optim.storage.rounding import store_bytes

__all__ = ["step_workspace"]


@dataclass(frozen=True)
class _Ranks:
    """The ranks that parameters are sharded over, and which of them is meant."""

    world_size: int
    shard: int
    on_cpu: bool

    def local(self, spec: StateTensor, dim: int) -> tuple[int, ...]:
        """Return the shape of a tensor on this rank."""
        return local_shape(spec, dim, self.shard, self.world_size)


@dataclass(frozen=True)
class _Part:
    """One parameter, or one matrix of a stack."""

    update: Update
    shape: MatrixShape
    numbers: int
    """Numbers of the weight on this rank."""
    is_copied: bool
    copy: int
    """Bytes of the copy that a step works on."""
    storing: int
    """Bytes to round the copy of the weight."""


def step_workspace(
    optimizer: MatrixOptimizer,
    *,
    world_size: int = 1,
    shard: int = 0,
    on_cpu: bool = False,
    one_at_a_time: bool = False,
    among: Collection[Tensor] | None = None,
) -> Workspace:
    """Return what the updates of a step need; what follows them says ``optimizer.end_bytes``.

    Args:
        optimizer: of a model on meta, never sharded: only shapes and settings are read.
        world_size: ranks a parameter is sharded over.
        shard: which of them.
        on_cpu: whether blocks are smaller, and cosine transforms by FFT.
        one_at_a_time: whether parameters are updated singly, as their gradients come.
        among: parameters whose updates count; None: all.
    """
    ranks = _Ranks(world_size, shard, on_cpu)
    slots = [slot for slot in optimizer.slots() if among is None or slot.param in among]
    parts = [part for slot in slots for part in _parts(optimizer, slot, ranks)]
    if one_at_a_time:
        together = [[part] for part in parts]
    else:
        copied = [part for part in parts if part.is_copied]
        in_place = [part for part in parts if not part.is_copied]
        together = [in_place, *chunks(copied, [part.numbers for part in copied], AT_ONCE)]
    found = [_workspace(members) for members in together]
    return Workspace(
        step=max((each.step for each in found), default=0),
        refresh=max((each.refresh for each in found), default=0),
        kept={key: size for each in found for key, size in each.kept.items()},
    )


def _workspace(parts: Sequence[_Part]) -> Workspace:
    """Return what parameters that are updated together need: their copies, and the most of one update or of storing."""
    members: dict[Update, list[MatrixShape]] = {}
    for part in parts:
        members.setdefault(part.update, []).append(part.shape)
    found = [update.workspace(shapes) for update, shapes in members.items()]
    copies = sum(part.copy for part in parts)
    step = max([each.step for each in found] + [part.storing for part in parts], default=0)
    refresh = max([each.refresh for each in found], default=0)
    kept = {key: size for each in found for key, size in each.kept.items()}
    return Workspace(copies + step, copies + max(refresh, step), kept)


def _parts(optimizer: MatrixOptimizer, slot: Slot, ranks: _Ranks) -> Iterator[_Part]:
    """Yield a parameter, or the matrices of a stack that this rank has a part of."""
    param, group, update = slot.param, slot.group, optimizer.update_of(slot.group)
    dim, count = optimizer.shard_dim(group["role"], param.shape, ranks.world_size), 1
    if update.takes_apart(param, group):
        one, stacked = matrix_like(param, group), leading(param.shape, group)
        count = param.numel() // one.numel()
        if dim < stacked:  # whole matrices
            here = ranks.local(StateTensor(tuple(param.shape), param.dtype, "parameter"), dim)
            count, ranks = math.prod(here[:stacked]), _Ranks(1, 0, ranks.on_cpu)
        dim = max(0, dim - stacked)
        dim = 1 - dim if group["weight_layout"] == "in,out" else dim
        slot = slot._replace(param=one)
    yield from [_part(update, slot, dim, ranks)] * count


def _part(update: Update, slot: Slot, dim: int, ranks: _Ranks) -> _Part:
    name, param, group, shape = slot.name, slot.param, slot.group, tuple(slot.param.shape)
    kept = update.matrix_layout(name, param, group)
    is_tall = len(shape) > 1 and not update.is_element_wise
    d, m = sorted(matrix_shape(shape)) if is_tall else (math.prod(shape[1:]), shape[0] if shape else 1)
    x = MatrixShape(
        name=name,
        m=m,
        d=d,
        rows=ranks.local(StateTensor((m, d), param.dtype, "rows"), 0)[0],
        dtype=param.dtype,
        group=group,
        state=kept,
        is_turned=is_tall and ranks.world_size > 1 and dim == projected_dim(shape),
        on_cpu=ranks.on_cpu,
    )
    promotion = update.promotes(slot)
    plain = update.matrix_layout(name, param, {**group, "state_dtype": None})
    copies = copied_tensors(slot, kept, plain, promotion)
    here = ranks.local(StateTensor(shape, param.dtype, "parameter"), dim)
    block = largest_block(here[0], math.prod(here[1:]), on_cpu=ranks.on_cpu) if here else 1
    return _Part(
        update,
        x,
        param.numel() // ranks.world_size,
        is_copied(slot, promotion),
        sum(math.prod(ranks.local(spec, dim)) * spec.dtype.itemsize for spec in copies),
        store_bytes(block, in_int8=isinstance(param, Int8Weight)) if promotion.rounded else 0,
    )
