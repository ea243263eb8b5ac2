"""The state of a matrix whose rank is chosen, and what it costs in bytes: ``optim.methods.welore_adamw``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.core.optimizer import Slot, adamw_state
from lowrank_train.optim.core.working_copies import counted
from lowrank_train.optim.low_rank.engine import low_rank_state
from lowrank_train.optim.shards.layout import StateTensor, allocate, matrix_shape
from lowrank_train.optim.storage.quantization import as_stored

__all__ = [
    "RankCosts",
    "gram_layout",
    "is_dense",
    "rank_layout",
    "rank_of",
    "reallocate",
    "shown_rank",
    "stored_layout",
]

_TRANSPORTED = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "column_age", "age", "basis")
"""What a change of rank writes anew. The rest stays: counters, and what the residual has stored."""


def rank_layout(
    param: Tensor, group: Mapping[str, Any], rank: int | None, *, with_gram: bool
) -> dict[str, StateTensor]:
    """State of a matrix of a rank; None: dense."""
    gram = {"gradient_gram": gram_layout(param)} if with_gram else {}
    return {**_layout_of(param.shape, param.dtype, rank, basis=group["basis"], residual=group["residual"]), **gram}


def _layout_of(
    shape: Sequence[int], dtype: torch.dtype, rank: int | None, *, basis: str, residual: str
) -> dict[str, StateTensor]:
    counters = {
        "step": StateTensor((), torch.float32, "host"),
        "skipped_refreshes": StateTensor((), torch.int32, "host"),
        "model_step": StateTensor((), torch.float32, "host"),
    }
    if rank is not None:
        return {**counters, **low_rank_state(shape, dtype, rank, basis=basis, residual=residual)}
    layout = adamw_state(torch.empty(tuple(shape), dtype=dtype, device="meta"))
    return {"age": layout.pop("step"), **counters, **layout}


def gram_layout(param: Tensor) -> StateTensor:
    """Of the sum of G^T G."""
    d = min(matrix_shape(param.shape))
    return StateTensor((d, d), torch.promote_types(param.dtype, torch.float32), "replicated")


def stored_layout(slot: Slot, rank: int | None, *, with_gram: bool) -> dict[str, StateTensor]:
    """As ``rank_layout``, in the types that moments are stored in."""
    stored = as_stored(rank_layout(slot.param, slot.group, rank, with_gram=with_gram), slot.group["state_dtype"])
    return counted(stored, slot.param, slot.group)


class RankCosts:
    """Bytes of state of one matrix, counted once whatever the number of ranks, at every rank from 0."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        basis: str,
        residual: str,
        state_dtype: str | None,
        multiple: int,
    ) -> None:
        def bytes_at(rank: int | None) -> int:
            layout = as_stored(_layout_of(shape, dtype, rank, basis=basis, residual=residual), state_dtype)
            return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())

        self.largest = min(matrix_shape(shape))
        self.dense = bytes_at(None)
        costs = [min(self.dense, bytes_at(rank)) for rank in range(1, self.largest + 1)]
        # rank 0 is what does not grow with it, or the first singular value would seem dear
        costs.insert(0, max(0, 2 * costs[0] - costs[1]) if self.largest > 1 else 0)
        self.best = list(range(self.largest + 1))
        """Rank -> itself, or a higher one that costs less: 8-bit storage begins at a size."""
        cheapest = self.largest
        for rank in range(self.largest, 0, -1):
            if costs[cheapest] < costs[rank]:
                self.best[rank] = cheapest
            elif rank % multiple == 0:
                cheapest = rank
        self.table = torch.tensor([costs[rank] for rank in self.best]).cummax(0).values  # (largest + 1,)

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> RankCosts:
        """Of a matrix in a group."""
        parts = group["basis"], group["residual"], group["state_dtype"], group["multiple"]
        return _costs(tuple(shape), dtype, *parts)

    @staticmethod
    def of_slot(slot: Slot) -> RankCosts:
        """Of one with state."""
        return RankCosts.of(slot.param.shape, slot.param.dtype, slot.group)

    def low_rank(self, rank: int) -> int | None:
        """The rank of the engine that an allocated one means; None: dense, which costs no more."""
        return rank if int(self.table[rank]) < self.dense else None


_costs = lru_cache(maxsize=256)(RankCosts)


def is_dense(slot: Slot) -> bool:
    """Whether AdamW updates a matrix."""
    return "column_age" not in slot.state


def rank_of(state: Mapping[str, Tensor]) -> int | None:
    """Directions of a matrix; None: dense."""
    return state["column_age"].numel() if "column_age" in state else None


def shown_rank(slot: Slot) -> int:
    """For people: the whole, of a dense matrix."""
    return rank_of(slot.state) or min(matrix_shape(slot.param.shape))


def reallocate(slot: Slot, rank: int | None, *, with_gram: bool) -> None:
    """Zeros for what depends on the rank. In place: updates fused into backward hold the state itself."""
    new = {}
    for key, spec in stored_layout(slot, rank, with_gram=with_gram).items():
        kept = slot.state.get(key) if key not in _TRANSPORTED else None
        new[key] = allocate(spec, slot.param) if kept is None else kept
    slot.state.clear()
    slot.state.update(new)
