"""AdamW inside every optimizer of this package: the update of whatever the method does not train.

Parameters, gradients and moments of one dtype go to torch's fused kernel. Others are converted in blocks of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.core import adam as rules
from lowrank_train.optim.core.working_copies import COUNTER, rounding_seed
from lowrank_train.optim.parameters.slot import Slot, dense_gradient, stored_gradient
from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.collectives import max_over_shards
from lowrank_train.optim.shards.layout import StateTensor, first_column, local
from lowrank_train.optim.storage.quantization import read, write
from lowrank_train.optim.storage.rounding import store

__all__ = ["adamw_state", "step_adamw"]


def adamw_state(param: Tensor) -> dict[str, StateTensor]:
    """Return the state of AdamW by torch's names, in torch's dtypes."""
    return {
        "step": StateTensor((), torch.float32, "replicated"),
        "exp_avg": StateTensor(tuple(param.shape), param.dtype, "parameter"),
        "exp_avg_sq": StateTensor(tuple(param.shape), param.dtype, "parameter"),
    }


def step_adamw(slots: list[Slot]) -> None:
    """Update parameters of one group by AdamW, shard by shard; those without a gradient stay as they are."""
    slots = [slot for slot in slots if slot.grad is not None]
    if not slots:
        return
    plain = [slot for slot in slots if _is_plain(slot)]
    if plain:
        _step(
            slots[0].group,
            [local(slot.param) for slot in plain],
            [local(dense_gradient(slot)) for slot in plain],
            [local(slot.state["exp_avg"]) for slot in plain],
            [local(slot.state["exp_avg_sq"]) for slot in plain],
            [slot.state["step"] for slot in plain],
        )
    for slot in slots:
        if not _is_plain(slot):
            _step_in_blocks(slot)


def _step(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    rules.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


def _step_in_blocks(slot: Slot) -> None:
    """Update a parameter which, or whose moments, the arithmetic must convert; blocks of rows are converted in turn."""
    dtype = torch.promote_types(slot.param.dtype, torch.float32)
    param, grad, state = local(slot.param), local(dense_gradient(slot)), slot.state
    offset = first_column(slot.param)
    last_step = state["step"].clone()
    width = math.prod(param.shape[1:])
    if COUNTER in state:
        state[COUNTER] += 1
    seeds = {key: rounding_seed(slot, key) for key in ("weight", "exp_avg", "exp_avg_sq")}
    # Columns that are shared with other ranks share scales, in a collective: one block, the same on all of them.
    # An empty shard is one block too, or its step would not be counted.
    blocks = row_blocks(param.shape[0], width, param.device) if offset is None and param.numel() else [slice(None)]
    for rows in blocks:
        weight = param[rows].to(dtype)
        exp_avg = read(state, "exp_avg", rows, width, dtype, offset or 0)
        exp_avg_sq = read(state, "exp_avg_sq", rows, width, dtype, offset or 0)
        state["step"].copy_(last_step)  # the rule counts one update, whatever the number of blocks
        _step(slot.group, [weight], [grad[rows].to(dtype)], [exp_avg], [exp_avg_sq], [state["step"]])
        store(slot.param, weight, seeds["weight"], rows)
        for key, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if seeds[key] is not None and state[key].dtype == torch.bfloat16:
                store(state[key], value, seeds[key], rows)
            else:
                write(state, key, rows, value, offset or 0, lambda scale: max_over_shards(slot.param, scale))


def _is_plain(slot: Slot) -> bool:
    """Whether AdamW may work on it in place: in one type, which the fused kernel rounds once or which needs none."""
    tensors = [local(slot.param), local(slot.state["exp_avg"]), local(stored_gradient(slot))]
    is_wide = slot.param.dtype.itemsize >= torch.float32.itemsize
    one_type = len({tensor.dtype for tensor in tensors}) == 1
    return one_type and COUNTER not in slot.state and (is_wide or all(tensor.is_contiguous() for tensor in tensors))
