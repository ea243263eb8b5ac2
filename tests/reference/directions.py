"""Which r directions of R^d a low-rank method keeps: slowly, in float64, nothing shared with the fast code.

A matrix A (m, d) is already oriented tall: d is its smaller dimension. Directions are rows V (r, d):

    project: g = A V^T (m, r);   lift: c -> c V (m, d)

Fixed bases keep r of d vectors known beforehand, q_0 .. q_(d-1), and remember their numbers in ascending order:

    (B1)  DCT-II, orthonormal:  q_k[i] = c_k cos(pi k (2 i + 1) / (2 d)),  c_0 = sqrt(1/d),  c_k = sqrt(2/d)
    (B2)  Sylvester-Hadamard:   q_k[i] = (-1)^(number of ones in the binary k AND i) / sqrt(d),  d a power of two
    (B3)  unit vectors:         q_k[i] = 1 if i = k else 0
    (B4)  the r largest of  e_k = sum_a <A_a, q_k>^2  (l2)  or  e_k = sum_a |<A_a, q_k>|  (l1);  a tie: the smaller k
          Modoranu et al., arXiv 2505.17967: "dynamic column selection"; l1 is their code's choice.

Dense bases compute r vectors of their own:

    (B5)  A = U S W^T;  V = the first r rows of W^T, each with its entry of largest magnitude positive
          Zhao et al., arXiv 2403.03507 (GaLore), Algorithm 2
    (B6)  block power iteration:  Y = A^T (A V^T);  Y = Q R with diag(R) > 0;  V = Q^T;  repeated
          as in Robert et al., arXiv 2410.16103 (LDAdam): one round from the old directions. At the very first choice
          there are no old directions, so the start is given, and there may be more rounds.

Given ones come from outside (random directions, which two implementations cannot draw alike).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """Rows V (r, d); ``numbers`` are the k of a fixed basis, None for a dense one."""

    rows: Matrix
    numbers: list[int] | None


Chooser = Callable[[Matrix, int, Directions | None, int], Directions]
"""(A (m, d), r, the old directions or None the first time, the step) -> the new directions."""


def dct_vector(k: int, d: int) -> Matrix:
    """(B1)"""
    scale = math.sqrt(1 / d) if k == 0 else math.sqrt(2 / d)
    return np.array([scale * math.cos(math.pi * k * (2 * i + 1) / (2 * d)) for i in range(d)])


def hadamard_vector(k: int, d: int) -> Matrix:
    """(B2)"""
    assert d.bit_count() == 1, "a Sylvester matrix exists for powers of two only"
    return np.array([(-1) ** (k & i).bit_count() / math.sqrt(d) for i in range(d)])


def unit_vector(k: int, d: int) -> Matrix:
    """(B3)"""
    return np.array([1.0 if i == k else 0.0 for i in range(d)])


def strongest(vector: Callable[[int, int], Matrix], *, power: int = 2) -> Chooser:
    """(B4): power 2 ranks by energy (l2), power 1 by the sum of magnitudes (l1)."""

    def choose(A: Matrix, r: int, old: Directions | None, step: int) -> Directions:
        d = A.shape[1]
        weights = []
        for k in range(d):
            q = vector(k, d)
            weights.append(sum(abs(float(np.dot(row, q))) ** power for row in A))
        by_weight = sorted(range(d), key=lambda k: -weights[k])  # stable: of equals the smaller k first
        numbers = sorted(by_weight[:r])
        return Directions(np.stack([vector(k, d) for k in numbers]), numbers)

    return choose


dct = strongest(dct_vector)
dct_l1 = strongest(dct_vector, power=1)
hadamard = strongest(hadamard_vector)
identity = strongest(unit_vector)


def svd(A: Matrix, r: int, old: Directions | None, step: int) -> Directions:
    """(B5)"""
    _, _, Wt = np.linalg.svd(A, full_matrices=False)
    rows = []
    for vector in Wt[:r]:
        rows.append(vector if vector[np.argmax(np.abs(vector))] > 0 else -vector)
    return Directions(np.stack(rows), None)


def iterated(start: Matrix, *, rounds: int = 2, first: int = 6) -> Chooser:
    """(B6): ``subspace`` has 2 rounds, and 6 from ``start`` (r, d) the first time; ``power`` has ``rounds=1``."""

    def choose(A: Matrix, r: int, old: Directions | None, step: int) -> Directions:
        V = start if old is None else old.rows
        for _ in range(first if old is None else rounds):
            Q, R = np.linalg.qr(A.T @ (A @ V.T))
            for j in range(r):
                if R[j, j] < 0:
                    Q[:, j] = -Q[:, j]
            V = Q.T
        return Directions(V, None)

    return choose


def given(rows_at: Mapping[int, Matrix]) -> Chooser:
    """Dense directions (r, d) by the step that they are chosen at."""
    return lambda A, r, old, step: Directions(rows_at[step], None)


def given_columns(numbers_at: Mapping[int, list[int]]) -> Chooser:
    """Unit vectors (B3) with the numbers of each step."""

    def choose(A: Matrix, r: int, old: Directions | None, step: int) -> Directions:
        d = A.shape[1]
        return Directions(np.stack([unit_vector(k, d) for k in numbers_at[step]]), numbers_at[step])

    return choose
