"""The updates that every optimizer has: AdamW, points of manifolds, and what is frozen.

AdamW gives parameters, gradients and moments of one dtype to torch's fused kernel. It converts others in blocks of
rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.core import adam as rules
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.core.working_copies import rounding_seed
from lowrank_train.optim.manifolds import points
from lowrank_train.optim.parameters.slot import COUNTER, Slot, dense_gradient, stored_gradient
from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.collectives import max_over_shards
from lowrank_train.optim.shards.layout import StateTensor, first_column, local
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace
from lowrank_train.optim.storage.quantization import read, write, write_bytes
from lowrank_train.optim.storage.rounding import store, store_bytes

__all__ = ["ADAMW", "FROZEN", "POINTS", "AdamWUpdate", "update_for"]


class AdamWUpdate(Update):
    """AdamW, shard by shard; parameters without a gradient stay as they are."""

    takes = "as stored"
    is_element_wise = True
    words = "AdamW"

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return a step count and two moments, by torch's names, in torch's dtypes."""
        return {
            "step": StateTensor((), torch.float32, "replicated"),
            "exp_avg": StateTensor(tuple(param.shape), param.dtype, "parameter"),
            "exp_avg_sq": StateTensor(tuple(param.shape), param.dtype, "parameter"),
        }

    def step(self, slots: list[Slot]) -> None:
        """Update parameters, those of one group together."""
        groups: dict[int, list[Slot]] = {}
        for slot in slots:
            groups.setdefault(id(slot.group), []).append(slot)
        for members in groups.values():
            self.step_group(members, lr=members[0].group["lr"])

    def step_group(self, slots: list[Slot], *, lr: float | Tensor, clock: str = "step") -> None:
        """Update parameters of one group at the rate ``lr``; ``clock`` is the key of the state that counts updates."""
        slots = [slot for slot in slots if slot.grad is not None]
        plain = [slot for slot in slots if _is_plain(slot)]
        if plain:
            rules.adamw_(
                [local(slot.param) for slot in plain],
                [local(dense_gradient(slot)) for slot in plain],
                [local(slot.state["exp_avg"]) for slot in plain],
                [local(slot.state["exp_avg_sq"]) for slot in plain],
                [slot.state[clock] for slot in plain],
                lr=lr,
                **_constants(plain[0].group),
            )
        for slot in slots:
            if not _is_plain(slot):
                _step_in_blocks(slot, lr, clock)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return what converting a block of rows takes: nothing for torch's fused kernel.

        A block has both moments in the arithmetic's type, and weight and gradient where they are not; then what storing
        takes.
        """
        fused, largest = 0, 0
        for x in matrices:
            if x.state["exp_avg"].dtype == x.dtype and COUNTER not in x.state:
                fused += x.negated
                continue
            numbers, converted = x.block // x.itemsize, x.itemsize * x.is_narrow
            rounding = store_bytes(numbers, in_int8=False) if COUNTER in x.state else 0
            storing = max(numbers * max(converted, write_bytes(x.group["state_dtype"])), rounding)
            largest = max(largest, x.negated + numbers * (2 * x.itemsize + converted) + storing)
        return Workspace(step=max(fused, largest))


class PointsUpdate(Update):
    """Riemannian Adam on parameters whose rows are points of a manifold (``optim.manifolds.points``)."""

    takes = "as stored"
    interval_setting = "point_refresh_interval"
    words = "Riemannian Adam"

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return the state of points, with first moments as ``state_dtype`` says."""
        return points.point_state(name, param, group)

    def matrix_layout(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return the state of points: it is not rounded stochastically."""
        return self.state(name, param, group)

    def step(self, slots: list[Slot]) -> None:
        """Update one parameter after the other."""
        for slot in slots:
            gradient = dense_gradient(slot) if slot.grad is not None else None
            points.step_points(slot.name, slot.param, gradient, slot.state, slot.group)

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of a choice of directions."""
        return Traffic(refresh_bytes=points.refresh_bytes(shape, dtype, group))

    def interval(self, group: Mapping[str, Any]) -> int | None:
        """Return the steps between two choices of directions; None without ``point_rank``."""
        return None if group["point_rank"] is None else super().interval(group)

    def objection(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
        """Return that the manifold is another one, if it is."""
        return points.structural_objection(group, saved)


class FrozenUpdate(Update):
    """No update and no state: what is frozen takes no gradient."""

    takes = "as stored"
    words = "nothing but the method's exchanges"

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return no state."""
        return {}

    def step(self, slots: list[Slot]) -> None:
        """Leave the parameters as they are."""

    def is_gathered(self, slot: Slot) -> bool:
        """Return False: a step reads nothing of what is frozen."""
        return False


ADAMW = AdamWUpdate()
POINTS = PointsUpdate()
FROZEN = FrozenUpdate()


def update_for(role: str) -> Update:
    """Return the update of parameters that a method is not about."""
    return {"points": POINTS, "frozen": FROZEN}.get(role, ADAMW)


def _constants(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("betas", "eps", "weight_decay")}


def _step_in_blocks(slot: Slot, lr: float | Tensor, clock: str) -> None:
    """Update a parameter which, or whose moments, the arithmetic must convert; blocks of rows are converted in turn."""
    dtype = torch.promote_types(slot.param.dtype, torch.float32)
    param, grad, state = local(slot.param), local(dense_gradient(slot)), slot.state
    offset = first_column(slot.param)
    last_step = state[clock].clone()
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
        state[clock].copy_(last_step)  # the rule counts one update, whatever the number of blocks
        moments = [exp_avg], [exp_avg_sq]  # the gradient has no name, or its copy would stay until all is stored
        rules.adamw_([weight], [grad[rows].to(dtype)], *moments, [state[clock]], lr=lr, **_constants(slot.group))
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
