"""Trion, slowly: one matrix, float64, one equation per line, nothing shared with the fast code.

Modoranu et al. (arXiv 2505.17967), Trion; oriented tall: a wide weight is transposed on the way in and out.

    (1)  q_k[i] = c_k cos(pi k (2 i + 1) / (2 d)),  c_0 = sqrt(1/d),  c_k = sqrt(2/d)
    (2)  B = M + G
    (3)  e_k = sum_a (sum_i B[a, i] q_k[i])^2;  the r largest, in ascending order of k, are the columns of Q_r
    (4)  b = B Q_r;  D = B - b Q_r^T;  M <- mu B + (1 - mu) D
    (5)  o = NewtonSchulz(b)
    (6)  W <- (1 - lr wd) W - lr max(1, sqrt(R / C)) o Q_r^T
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.reference.muon import newton_schulz

REFERENCE_OF = ("trion",)

Matrix = NDArray[np.float64]


def cosine(k: int, d: int) -> Matrix:
    """Equation (1)."""
    c = math.sqrt((1 if k == 0 else 2) / d)
    return np.array([c * math.cos(math.pi * k * (2 * i + 1) / (2 * d)) for i in range(d)])


@dataclass
class ReferenceTrion:
    """One matrix and its optimizer; ``step`` takes the gradients in order."""

    weight: Matrix  # (R, C)
    rank: int
    lr: float
    momentum: float = 0.95
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        self.M = np.zeros_like(self.weight)  # (R, C)
        self.indices: list[int] = []

    def step(self, gradient: Matrix) -> None:
        """Equations (2) to (6)."""
        R, C = self.weight.shape
        is_wide, d, mu = R < C, min(R, C), self.momentum

        B = self.M + gradient
        B = B.T if is_wide else B
        energies = [sum(float(np.dot(row, cosine(k, d))) ** 2 for row in B) for k in range(d)]
        self.indices = sorted(sorted(range(d), key=lambda k: -energies[k])[: self.rank])
        Q = np.stack([cosine(k, d) for k in self.indices], axis=1)

        b = B @ Q
        D = B - b @ Q.T
        M = mu * B + (1 - mu) * D
        O = newton_schulz(b) @ Q.T  # noqa: E741

        self.M = M.T if is_wide else M
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        self.weight = self.weight - self.lr * max(1.0, math.sqrt(R / C)) * (O.T if is_wide else O)
