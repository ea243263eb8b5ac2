"""Parameters and their state as a step works on them, where they are kept as something else between steps.

    kept                                                   worked on
    weight, moments in bfloat16, rounded stochastically    float32
    moments in fewer bits, of a method that knows of none  float32
    state in host memory                                   the same on the parameter's device
    weight sharded over several mesh axes                  gathered to one of them (``optim.shards.placements``)

A copy has the shape, the shards and the gradient of what it stands for, so no method knows of it. Matrices are copied
a few at a time; what a step holds beyond them does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_train.optim.parameters.slot import COUNTER, Promotion, Slot
from lowrank_train.optim.shards.blocks import chunks
from lowrank_train.optim.shards.collectives import max_over_shards
from lowrank_train.optim.shards.layout import StateTensor, first_column, laid_out_as, local, shard_count
from lowrank_train.optim.shards.placements import from_work_layout, in_work_layout, placed_as
from lowrank_train.optim.storage.quantization import MOMENTS, read, write
from lowrank_train.optim.storage.rounding import seed_of, store

__all__ = [
    "AT_ONCE",
    "chunked",
    "copied",
    "copied_tensors",
    "gathered",
    "is_copied",
    "rounding_seed",
    "settled",
]

AT_ONCE = 2**26
"""Numbers of the matrices that are copied together: 256 MiB of float32, or one matrix that is larger."""


def rounding_seed(slot: Slot, key: str) -> Tensor | None:
    """Return a seed for storing the weight or a state tensor of a slot, another each time; None if it is rounded to the
    nearest.
    """
    if COUNTER not in slot.state:
        return None
    return seed_of(f"{slot.name}/{key}", slot.state[COUNTER])


def is_copied(slot: Slot, promotion: Promotion) -> bool:
    """Return whether a step needs a copy of a parameter or of its state."""
    converted = promotion.moments and slot.group["state_dtype"] is not None and bool(slot.state)
    return bool(slot.group["offload_state"]) or promotion.rounded or converted


def copied_tensors(
    slot: Slot, kept: Mapping[str, StateTensor], plain: Mapping[str, StateTensor], promotion: Promotion
) -> list[StateTensor]:
    """Return the tensors of a copy, where a step needs one.

    Args:
        slot: what is copied.
        kept: the layout of its state.
        plain: the layout of its state without ``state_dtype``.
        promotion: what is converted.
    """
    if not is_copied(slot, promotion):
        return []
    exact = torch.promote_types(slot.param.dtype, torch.float32)
    tensors = [StateTensor(tuple(slot.param.shape), exact, "parameter")] if promotion.rounded else []
    for key, spec in kept.items():
        if key in MOMENTS and (promotion.moments or (promotion.rounded and spec.dtype == torch.bfloat16)):
            tensors.append(replace(plain[key], dtype=exact))
        elif slot.group["offload_state"] and spec.layout != "host":
            tensors.append(spec)
    return tensors


def chunked(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Group the slots that are copied together; the groups are the same on every rank."""
    sizes = [slot.param.numel() // shard_count(slot.param) for slot in slots]
    yield from chunks(list(slots), sizes, AT_ONCE)


def settled(slot: Slot) -> Slot:
    """Return a slot whose gradient has its parameter's placements; a collective where backward left it with others.

    Raises ValueError if only one of the two is distributed.
    """
    gradient = slot.grad
    if gradient is None:
        return slot
    placed = placed_as(gradient, slot.param, slot.name)
    return slot if placed is gradient else slot._replace(moved=placed)


@contextmanager
def gathered(slots: Sequence[Slot], scattered: Callable[[Slot], bool]) -> Iterator[list[Slot]]:
    """Yield slots in the layout that a step works in (``optim.shards.placements``); weights are stored again on
    leaving.

    Args:
        slots: as they are kept.
        scattered: whether a parameter is worked on in the work layout, in which its state is kept.
    """
    ready = []
    for slot in slots:
        if not scattered(slot):
            ready.append(settled(slot))
            continue
        gradient, param = slot.grad, in_work_layout(slot.param.detach(), slot.param, values=True)
        moved = None if gradient is None else in_work_layout(gradient, slot.param, values=True)
        ready.append(slot._replace(param=param, stands_for=slot.param, moved=moved))
    yield ready
    for slot, worked_on in zip(slots, ready, strict=True):
        if worked_on.param is not slot.param:
            local(slot.param).copy_(from_work_layout(worked_on.param, slot.param))


@contextmanager
def copied(
    slots: Sequence[Slot], layouts: Sequence[Mapping[str, StateTensor]], promotions: Sequence[Promotion]
) -> Iterator[list[Slot]]:
    """Give slots to work on; what they hold in the end is stored.

    Args:
        slots: as they are kept.
        layouts: of the state of each.
        promotions: of each, what is converted.
    """
    copies = [_copy(*of_slot) for of_slot in zip(slots, layouts, promotions, strict=True)]
    yield copies
    for slot, copy in zip(slots, copies, strict=True):
        if copy is not slot:
            _store(slot, copy)


def _copy(slot: Slot, layout: Mapping[str, StateTensor], promotion: Promotion) -> Slot:
    if not is_copied(slot, promotion):
        return slot
    exact = torch.promote_types(slot.param.dtype, torch.float32)
    blocks = {key: local(value) for key, value in slot.state.items() if layout[key].layout != "host"}
    if slot.group["offload_state"]:
        device = local(slot.param).device
        blocks = {key: block.to(device, non_blocking=True, copy=True) for key, block in blocks.items()}
    width, offset = math.prod(local(slot.param).shape[1:]), first_column(slot.param) or 0
    state = dict(slot.state)
    for key, block in blocks.items():
        if key in MOMENTS and (promotion.moments or (promotion.rounded and block.dtype == torch.bfloat16)):
            moment = read(blocks, key, slice(None), width, exact, offset)
            like = slot.state[key] if moment.shape == block.shape else slot.param  # 4 bits are unpacked
            state[key] = laid_out_as(like, moment)
        elif block is not local(slot.state[key]):
            state[key] = laid_out_as(slot.state[key], block)
    param = slot.param
    if promotion.rounded:
        param = laid_out_as(slot.param, local(slot.param).to(exact))
        state[COUNTER] = state[COUNTER] + 1
    return slot._replace(param=param, state=state, stands_for=slot.param)


def _store(slot: Slot, copy: Slot) -> None:
    if copy.param is not slot.param:
        store(slot.param, local(copy.param), rounding_seed(copy, "weight"))
    for key, value in copy.state.items():
        kept = slot.state[key]
        moment = key.removesuffix("_scale")
        converted = copy.state[moment].dtype != slot.state[moment].dtype if moment in slot.state else False
        if value is kept or (key != moment and converted):  # a scale is written with its moment
            continue
        if kept.dtype == value.dtype:
            local(kept).copy_(local(value), non_blocking=True)
        elif f"{key}_scale" in slot.state:
            _store_in_codes(slot, key, local(value))
        else:
            store(kept, local(value), rounding_seed(copy, key))


def _store_in_codes(slot: Slot, key: str, value: Tensor) -> None:
    kept = {name: local(slot.state[name]) for name in (key, f"{key}_scale")}
    made = {name: codes.to(value.device) for name, codes in kept.items()}
    offset = first_column(slot.param) or 0
    write(made, key, slice(None), value, offset, lambda scale: max_over_shards(slot.param, scale))
    for name, codes in made.items():
        if codes is not kept[name]:
            kept[name].copy_(codes, non_blocking=True)
