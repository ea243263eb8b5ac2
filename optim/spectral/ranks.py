"""A rank for every matrix of a model from their singular values, under one budget.

Matrix l has singular values sigma_1 >= ... >= sigma_k and a table of what it costs at rank 0 .. k. A score says how
much each singular value is worth, comparable between matrices; one threshold t for all of them keeps

    r_l(t) = #{i : score_{l,i} >= t},    t the smallest with sum_l cost_l(r_l(t)) <= budget

found exactly, by sorting the pooled scores once. Equal scores stay or go together, so that equal spectra get equal
ranks; and a larger budget never takes rank from any matrix.

    minmax            (sigma_i - sigma_k) / (sigma_1 - sigma_k)     Jaiswal et al., WeLore (arXiv 2407.11239)
    relative          sigma_i / sigma_1
    energy            sigma_i^2 / sum sigma^2
    energy_per_cost   the same by what it costs to keep, cost_l(i) - cost_l(i - 1)
    uniform           1 - (i - 1) / k: the same share of every matrix, whatever its spectrum

Where a matrix is cheaper left whole (factors of rank r hold r (m + n) numbers, the matrix m n), its cost stops growing
there: what lies beyond costs nothing more, and the matrix is whole.

We differ from WeLore's code: it has no search but thresholds by name of the model; a cost per rank; ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_train.optim.arguments.hyperparameters import check_whole

__all__ = ["SCORES", "allocate_ranks", "scores"]


def _minmax(sigma: Tensor, steps: Tensor) -> Tensor:
    spread = sigma[0] - sigma[-1]
    if spread == 0:  # a flat spectrum has no small values to drop: all are as the largest, unless there is nothing
        return torch.ones_like(sigma) * (sigma[0] > 0)
    return (sigma - sigma[-1]) / spread


def _relative(sigma: Tensor, steps: Tensor) -> Tensor:
    return sigma / sigma[0] if sigma[0] > 0 else torch.zeros_like(sigma)


def _energy(sigma: Tensor, steps: Tensor) -> Tensor:
    relative = _relative(sigma, steps)
    return relative.square() / relative.square().sum().clamp(min=1.0)


def _energy_per_cost(sigma: Tensor, steps: Tensor) -> Tensor:
    # an item that costs no more than the ones before comes with them, and must not divide by zero
    dearest = steps.cummax(0).values.clamp(min=1)
    return _energy(sigma, steps) / dearest


def _uniform(sigma: Tensor, steps: Tensor) -> Tensor:
    k = len(sigma)
    return 1 - torch.arange(k, dtype=sigma.dtype) / k


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minmax": _minmax,
    "relative": _relative,
    "energy": _energy,
    "energy_per_cost": _energy_per_cost,
    "uniform": _uniform,
}
"""Name -> (singular values (k,), cost of each (k,)) -> scores (k,), never rising."""


def scores(name: str, sigma: Tensor, costs: Tensor) -> Tensor:
    """Return what each singular value of one matrix is worth.

    Args:
        name: one of ``SCORES``.
        sigma: (k,), falling, not negative.
        costs: (k + 1,), what ranks 0 .. k cost.

    Returns:
        (k,) float64, never rising.

    Raises:
        ValueError: unknown name; singular values that are not finite, negative or not falling.
    """
    if name not in SCORES:
        raise ValueError(f"score={name!r}; expected one of {', '.join(SCORES)}")
    sigma = sigma.detach().double().cpu()
    if not torch.isfinite(sigma).all():
        raise ValueError("singular values that are not finite; the matrix has nan or infinite entries")
    if len(sigma) == 0 or (sigma < 0).any() or (sigma.diff() > 0).any():
        raise ValueError("singular values must be given from the largest to the smallest, none below 0")
    return SCORES[name](sigma, costs.double().diff())


def allocate_ranks(
    scores: Sequence[Tensor],
    costs: Sequence[Tensor],
    budget: int,
    *,
    multiple: int = 1,
    floor: int = 1,
    ceiling: int | None = None,
) -> list[int]:
    """Return the ranks of one threshold, the lowest that fits the budget.

    Args:
        scores: of each matrix, (k,), never rising.
        costs: of each matrix, (k + 1,) whole numbers, never falling: what ranks 0 .. k cost.
        budget: of all of them together, in the unit of the costs.
        multiple: ranks are whole multiples of it, or the whole k.
        floor: least rank of any matrix, rounded up to the multiple; at most k.
        ceiling: largest rank of any matrix; None: k.

    Returns:
        A rank of each matrix, 1 .. k.

    Raises:
        ValueError: the budget is below what the least ranks cost; values out of range.
    """
    _check(scores, costs, multiple, floor, ceiling)
    ladders = [torch.tensor(_ladder(len(score), multiple, floor, ceiling)) for score in scores]
    spent = sum(int(cost[ladder[0]]) for cost, ladder in zip(costs, ladders, strict=True))
    if spent > budget:
        raise ValueError(
            f"a budget of {budget:,} is too small: the least ranks cost {spent:,} (floor={floor}, multiple={multiple})"
        )
    # one item per step up a ladder; a step of several ranks is worth what its last is worth: all clear the threshold
    prices = torch.cat([cost[ladder].diff() for cost, ladder in zip(costs, ladders, strict=True)])
    values = torch.cat([score[ladder[1:] - 1] for score, ladder in zip(scores, ladders, strict=True)])
    matrix = torch.cat([torch.full((len(ladder) - 1,), index) for index, ladder in enumerate(ladders)])
    values, order = values.sort(descending=True, stable=True)
    fits = spent + prices[order].cumsum(0) <= budget
    is_last_of_equals = torch.ones_like(fits)
    is_last_of_equals[:-1] = values[1:] != values[:-1]
    ends = (fits & is_last_of_equals).nonzero()
    taken = int(ends[-1]) + 1 if len(ends) else 0
    steps = matrix[order[:taken]].bincount(minlength=len(ladders)).tolist()
    return [int(ladder[count]) for ladder, count in zip(ladders, steps, strict=True)]


def _ladder(k: int, multiple: int, floor: int, ceiling: int | None) -> list[int]:
    """The ranks a matrix may have, rising."""
    lowest = min(k, -(-floor // multiple) * multiple)
    highest = k if ceiling is None else min(k, max(ceiling, lowest))
    steps = [*range(lowest, highest + 1, multiple)]
    return steps if highest < k or steps[-1] == k else [*steps, k]


def _check(scores: Sequence[Tensor], costs: Sequence[Tensor], multiple: int, floor: int, ceiling: int | None) -> None:
    for key in (limits := {"multiple": multiple, "floor": floor, "ceiling": ceiling or 1}):
        check_whole(limits, key, 1)
    if ceiling is not None and ceiling < floor:
        raise ValueError(f"ceiling={ceiling} is below floor={floor}")
    for score, cost in zip(scores, costs, strict=True):
        assert len(cost) == len(score) + 1
        assert not (score.diff() > 0).any()
        assert not (cost.diff() < 0).any()
