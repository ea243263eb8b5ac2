"""Ranks by one threshold, slowly: every pooled score is tried, nothing shared with the fast code.

r_l(t) = the highest rung of matrix l's ladder whose ranks all score at least t, or the lowest rung
t = the smallest of the pooled scores (or one above all) with sum_l cost_l(r_l(t)) <= budget
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rungs(k: int, multiple: int, floor: int, ceiling: int | None) -> list[int]:
    """Ranks a matrix may have: whole multiples or k, from the floor (rounded up) to the ceiling."""
    lowest = floor
    while lowest % multiple:
        lowest += 1
    lowest = min(lowest, k)
    allowed = [r for r in range(1, k + 1) if r % multiple == 0 or r == k]
    highest = k if ceiling is None else max(ceiling, lowest)
    return [r for r in allowed if lowest <= r <= highest]


def ranks_at(threshold: float, scores: Sequence[Sequence[float]], ladders: Sequence[Sequence[int]]) -> list[int]:
    ranks = []
    for score, ladder in zip(scores, ladders, strict=True):
        rank = ladder[0]
        for rung in ladder:
            if all(value >= threshold for value in score[:rung]):
                rank = rung
        ranks.append(rank)
    return ranks


def allocate_ranks(
    scores: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    multiple: int = 1,
    floor: int = 1,
    ceiling: int | None = None,
) -> list[int] | None:
    """The ranks; None where even the lowest rungs cost more than the budget."""
    ladders = [rungs(len(score), multiple, floor, ceiling) for score in scores]
    candidates = sorted({value for score in scores for value in score} | {math.inf})
    for threshold in candidates:
        ranks = ranks_at(threshold, scores, ladders)
        if sum(cost[rank] for cost, rank in zip(costs, ranks, strict=True)) <= budget:
            return ranks
    return None
