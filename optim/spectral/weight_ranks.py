"""A rank for every matrix, chosen from the singular values of the weights under one budget of optimizer state.

    sigma_l       singular values of W_l; of a stack the root mean square of those of its matrices, index by index
    score_l,i     what sigma_l,i is worth, see ``optim.spectral.ranks``
    cost_l(r)     bytes of state of the low-rank engine at rank r, at most those of the whole matrix
    r_l         = #{i : score_l,i >= t},   t the smallest with sum_l cost_l(r_l) <= budget

A matrix whose state at r_l would be as large as that of all its directions is *whole*: it keeps all of them, in the
basis ``identity``, which is AdamW. Where a higher rank costs less, because 8-bit storage begins at a size, it stands
for the lower one.

The singular values come from W^T W in float64. Sharded, W^T W is summed over the ranks, and one rank finds the singular
values and tells the others, so that all ranks choose the same.

Source: Jaiswal et al., WeLore (arXiv 2407.11239), who factorise weights by such ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.optim.arguments.surroundings import undisturbed
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.linalg import gram
from lowrank_train.optim.low_rank.settings import low_rank_state, resolved_rank
from lowrank_train.optim.parameters import stacks
from lowrank_train.optim.parameters.group_checks import SHARED_SETTINGS
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.collectives import decide_on_one_rank
from lowrank_train.optim.shards.layout import local, matrix_shape
from lowrank_train.optim.shards.placements import in_work_layout, is_scattered
from lowrank_train.optim.shards.tall import tall
from lowrank_train.optim.spectral.ranks import allocate_ranks, scores
from lowrank_train.optim.storage.int8_weight import Int8Weight
from lowrank_train.optim.storage.quantization import as_stored

__all__ = ["choose_ranks", "has_values", "rank_settings", "ranks_from_weights", "whole_rank"]


def ranks_from_weights(
    model: nn.Module,
    *,
    rank: int | None = None,
    budget_bytes: int | None = None,
    score: str = "energy",
    multiple: int = 1,
    floor: int = 1,
    basis: str = "subspace",
    residual: str = "drop",
    state_dtype: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return rules for ``optim.param_groups`` that give every matrix its own rank, chosen from the weights.

    ``LowRankAdamW(param_groups(model, rules=ranks_from_weights(model, rank=64)), basis="subspace", residual="drop")``

    Args:
        model: with its weights, before or after ``fully_shard``; sharded, every rank must call this.
        rank: the budget is the bytes that this rank of every matrix takes; None: a quarter of its smaller side.
        budget_bytes: of the state of all matrices together, over all ranks; instead of what ``rank`` takes.
        score: what a singular value is worth, a name of ``optim.spectral.ranks.SCORES``. ``uniform`` reads no weights
            and gives every matrix the same share of its ``rank``.
        multiple: ranks are multiples of it, or the whole smaller side.
        floor: the least rank.
        basis: the optimizer's, which is part of the cost.
        residual: the optimizer's, also part of the cost.
        state_dtype: the optimizer's.

    Returns:
        Regular expression of one name -> ``{"rank": r}``, or ``{"rank": min(m, n), "basis": "identity"}`` for a matrix
        that is whole.

    Raises:
        ValueError: a model without matrices or without values (on meta), weights that are not finite, settings out of
            range, and a budget below the least ranks.
    """
    settings = {"rank": rank, "basis": basis, "residual": residual, "state_dtype": state_dtype}
    slots = [
        Slot(name, param, {}, {"weight_layout": "out,in", **SHARED_SETTINGS, **settings, **group})
        for group in param_groups(model)
        if group["role"] == "matrix"
        for name, param in group["params"]
    ]
    if not slots:
        raise ValueError("the model has no parameter with role 'matrix'; expected at least one to give a rank to")
    absent = next((slot.name for slot in slots if not has_values(slot.param)), None)
    if absent is not None and score != "uniform":
        raise ValueError(f"{absent!r} has no values (it is on meta); expected the weights that ranks are chosen from")
    with undisturbed(), torch.no_grad():
        ranks = choose_ranks(slots, budget_bytes=budget_bytes, score=score, multiple=multiple, floor=floor)
    return {f"^{re.escape(slot.name)}$": rank_settings(slot, own) for slot, own in zip(slots, ranks, strict=True)}


def has_values(param: Tensor) -> bool:
    """Return whether a parameter has numbers that can be read: not on meta, and no fake tensor."""
    part = local(param)
    return not part.is_meta and getattr(part, "fake_mode", None) is None


def rank_settings(slot: Slot, rank: int) -> dict[str, Any]:
    """Return the group settings of a matrix that is given a rank; raises ValueError if the rank does not fit."""
    resolved_rank(slot.name, tuple(_one(slot).shape), rank)
    if _Costs.of(slot).is_whole(rank):
        return {"rank": whole_rank(slot), "basis": "identity"}
    return {"rank": rank}


def whole_rank(slot: Slot) -> int:
    """Return min(m, n) of a matrix, or of the matrices of a stack."""
    return min(matrix_shape(_one(slot).shape))


def choose_ranks(
    slots: Sequence[Slot], *, budget_bytes: int | None, score: str, multiple: int, floor: int
) -> list[int]:
    """Return the rank of each matrix; that of a stack is shared by its matrices. A collective where one is sharded.

    Args:
        slots: matrices with their settings ``rank``, ``basis``, ``residual`` and ``state_dtype``.
        budget_bytes: of all their state, over all ranks; None: what ``rank`` of each takes.
        score: a name of ``optim.spectral.ranks.SCORES``. The uniform ranks are chosen for ``uniform``, and where a
            parameter has no values; their bytes are at most the budget too.
        multiple: ranks are multiples of it, or the whole smaller side.
        floor: the least rank.

    Raises:
        ValueError: settings out of range, weights that are not finite, and a budget below the least ranks.
    """
    if budget_bytes is not None and (type(budget_bytes) is not int or budget_bytes < 1):
        raise ValueError(f"budget_bytes={budget_bytes!r}; expected a whole number >= 1 or None")
    costs = [_Costs.of(slot, multiple) for slot in slots]
    uniform = [resolved_rank(slot.name, tuple(_one(slot).shape), slot.group["rank"]) for slot in slots]
    if budget_bytes is None:
        budget_bytes = sum(int(cost.table[rank]) for cost, rank in zip(costs, uniform, strict=True))
    # a share of its uniform rank is worth the same in every matrix
    tables = [
        -torch.arange(1, cost.largest + 1, dtype=torch.float64) / rank
        for cost, rank in zip(costs, uniform, strict=True)
    ]
    scores(score, torch.ones(1), torch.ones(2))  # raises for an unknown name
    if score != "uniform" and all(has_values(slot.param) for slot in slots):
        spectra = _singular_values(slots)
        tables = [scores(score, sigma, cost.table) for sigma, cost in zip(spectra, costs, strict=True)]
    try:
        ranks = allocate_ranks(tables, [cost.table for cost in costs], budget_bytes, multiple=multiple, floor=floor)
    except ValueError as error:
        hint = "; raise budget_bytes (or rank), or lower floor and multiple" if "budget" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    return [cost.best[rank] for cost, rank in zip(costs, ranks, strict=True)]


# --------------------------------------------------------------------------------------------------------------- costs


class _Costs:
    """Bytes of state of a matrix or stack at every rank from 0, counted once whatever the number of ranks."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        basis: str,
        residual: str,
        state_dtype: str | None,
        matrices: int,
        multiple: int,
    ) -> None:
        def bytes_at(rank: int, basis: str) -> int:
            layout = as_stored(low_rank_state(shape, dtype, rank, basis=basis, residual=residual), state_dtype)
            return matrices * sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())

        self.largest = min(matrix_shape(shape))
        self.whole = bytes_at(self.largest, "identity")
        costs = [min(self.whole, bytes_at(rank, basis)) for rank in range(1, self.largest + 1)]
        # rank 0 is what does not grow with it, or the first singular value would seem dear
        costs.insert(0, max(0, 2 * costs[0] - costs[1]) if self.largest > 1 else 0)
        self.best = list(range(self.largest + 1))
        """Rank -> itself, or a higher one that costs less."""
        cheapest = self.largest
        for rank in range(self.largest, 0, -1):
            if costs[cheapest] < costs[rank]:
                self.best[rank] = cheapest
            elif rank % multiple == 0:
                cheapest = rank
        self.table = torch.tensor([costs[rank] for rank in self.best]).cummax(0).values  # (largest + 1,)

    @staticmethod
    def of(slot: Slot, multiple: int = 1) -> _Costs:
        """Return the costs of a matrix or stack, by its settings."""
        one, group = _one(slot), slot.group
        if type(multiple) is not int or multiple < 1:
            raise ValueError(f"multiple={multiple!r}; expected a whole number >= 1")
        parts = group["basis"], group["residual"], group["state_dtype"]
        return _costs(tuple(one.shape), one.dtype, *parts, slot.param.numel() // one.numel(), multiple)

    def is_whole(self, rank: int) -> bool:
        """Return whether all directions take no more than this rank."""
        return int(self.table[rank]) >= self.whole


_costs = lru_cache(maxsize=256)(_Costs)


def _one(slot: Slot) -> Tensor:
    """Return something of the shape and dtype of one matrix of a weight."""
    apart = stacks.is_taken_apart(slot.param.shape, slot.group)
    return stacks.matrix_like(slot.param, slot.group) if apart else slot.param


# ------------------------------------------------------------------------------------------------------------- spectra


class _Matrix(NamedTuple):
    """A matrix that its ranks hold together, or those of a stack that this rank holds alone."""

    owner: int  # place of the weight among all
    param: Tensor  # says how it is sharded
    alone: list[Tensor] | None = None  # whole, on this rank


def _singular_values(slots: Sequence[Slot]) -> list[Tensor]:
    """Return the singular values (k,) of each matrix, on the CPU; raises ValueError if weights are not finite."""
    matrices: list[_Matrix] = []
    for owner, slot in enumerate(map(_at_work, slots)):
        parts = [part.param for part in _parts(slot)]
        alone = stacks.has_own_matrices(slot)
        matrices += [_Matrix(owner, slot.param, parts)] if alone else [_Matrix(owner, part) for part in parts]

    def statistics(i: int) -> Tensor:
        """Return W^T W; where matrices lie whole on one rank, the sum of their squared singular values."""
        _, param, alone = matrices[i]
        if alone is None:
            return _gram(param)
        none = torch.zeros(like[i]["squares"].shape, dtype=torch.float64, device=local(param).device)
        return sum((_squares(_gram(local(matrix))) for matrix in alone), none)

    def decide(i: int, total: Tensor) -> dict[str, Tensor]:
        return {"squares": _squares(total) if matrices[i].alone is None else total}

    totals = [torch.zeros(whole_rank(slot), dtype=torch.float64) for slot in slots]
    like = [{"squares": torch.empty_like(totals[matrix.owner], device="meta")} for matrix in matrices]
    for i, decision in decide_on_one_rank([matrix.param for matrix in matrices], statistics, decide, like):
        totals[matrices[i].owner] += decision["squares"].cpu()
    for slot, total in zip(slots, totals, strict=True):
        if not total.isfinite().all():
            raise ValueError(f"{slot.name!r} holds numbers that are not finite; expected weights to choose a rank from")
        total /= slot.param.numel() // _one(slot).numel()
    return [total.sqrt() for total in totals]


def _at_work(slot: Slot) -> Slot:
    """Return a weight sharded over one mesh axis at most; a collective where it is sharded over several."""
    param = slot.param.detach()
    return Slot(slot.name, in_work_layout(param, param, values=True) if is_scattered(param) else param, {}, slot.group)


def _parts(slot: Slot) -> list[Slot]:
    """Return the matrices of a weight that this rank has a part of."""
    return list(stacks.parts(slot)) if stacks.is_taken_apart(slot.param.shape, slot.group) else [slot]


def _gram(param: Tensor) -> Tensor:
    """Return W^T W (d, d) of this rank's rows, in float64."""
    part = local(param)
    values = part.wide(torch.float32) if isinstance(part, Int8Weight) else part
    return gram(tall(param, values))


def _squares(product: Tensor) -> Tensor:
    """Return the squared singular values (d,) from W^T W, falling; nan if they cannot be found."""
    if product.isfinite().all():
        try:
            return torch.linalg.eigvalsh(product).clamp(min=0).flip(0)
        except LinAlgError:
            pass
    return product.new_full((len(product),), torch.nan)
