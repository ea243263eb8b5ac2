"""The ranks of WeLore's optimizer, slowly: plain SVDs, one equation per line, nothing shared with the fast code.

W (m, n), d = min(m, n), M = max(m, n); a stack of E matrices of that shape has one rank. In float64:

    (1)  sigma_i = sqrt(mean over the E matrices of (their i-th singular value)^2)
    (2)  s_i = sigma_i^2 / sum sigma^2                          energy;   minmax and relative as in the paper
    (3)  cost(r) = E min(8 (2 M r + r d) + 4 r + 8,  8 (2 M d) + 8 d + 8)         r directions, or all of them whole
    (4)  ranks = one threshold for all s of all matrices, the lowest with sum cost(r) <= budget
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.reference.directions import Matrix
from tests.reference.rank_allocation import allocate_ranks

REFERENCE_OF = ("welore_adamw",)


def singular_values(W: Matrix) -> Matrix:
    """(1), of a matrix (m, n) or a stack (E, m, n)."""
    matrices = W if W.ndim == 3 else W[None]
    squares = np.zeros(min(matrices.shape[1:]))
    for matrix in matrices:
        squares = squares + np.linalg.svd(matrix, compute_uv=False) ** 2
    return np.sqrt(squares / len(matrices))


def score(name: str, sigma: Matrix) -> Matrix:
    """(2)."""
    if name == "energy":
        return sigma**2 / np.sum(sigma**2)
    if name == "relative":
        return sigma / sigma[0]
    assert name == "minmax"
    return (sigma - sigma[-1]) / (sigma[0] - sigma[-1])


def cost(shape: Sequence[int], r: int) -> int:
    """(3)."""
    matrices = shape[0] if len(shape) == 3 else 1
    d, M = sorted(shape[-2:])
    return matrices * min(8 * (2 * M * r + r * d) + 4 * r + 8, 8 * (2 * M * d) + 8 * d + 8)


def chosen_ranks(weights: Sequence[Matrix], name: str, budget: int, multiple: int, floor: int) -> list[int]:
    """(4); a rank whose state is as large as that of all directions means all of them."""
    scores = [list(score(name, singular_values(W))) for W in weights]
    costs = [[cost(W.shape, r) for r in range(min(W.shape[-2:]) + 1)] for W in weights]
    ranks = allocate_ranks(scores, costs, budget, multiple=multiple, floor=floor)
    assert ranks is not None
    whole = [min(W.shape[-2:]) for W in weights]
    return [d if cost(W.shape, r) == cost(W.shape, d) else r for W, r, d in zip(weights, ranks, whole, strict=True)]
