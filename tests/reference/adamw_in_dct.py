"""DCT-AdamW, slowly: one matrix, float64, one equation per line, nothing shared with the fast code.

Oriented tall: the weight is (m, d) with d = min(R, C); a wide matrix is transposed on the way in and out.

    (1)  q_k[i] = c_k cos(pi k (2 i + 1) / (2 d)),  c_0 = sqrt(1/d),  c_k = sqrt(2/d)
    (2)  e_k = sum_a (sum_i G[a, i] q_k[i])^2;  the r largest, in ascending order of k, are the columns of Q_r
    (3)  R = Q_old^T Q_new;  M <- M R;  V <- |V R|;  age <- age R
    (4)  g = G Q_r;  M <- b1 M + (1 - b1) g;  V <- b2 V + (1 - b2) g^2;  age <- age + 1
    (5)  u = (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps)
    (6)  W <- (1 - lr wd) W - lr u Q_r^T
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REFERENCE_OF = ("dct_adamw",)

Matrix = NDArray[np.float64]


def dct_column(k: int, d: int) -> Matrix:
    """Equation (1), one element at a time."""
    scale = math.sqrt(1 / d) if k == 0 else math.sqrt(2 / d)
    return np.array([scale * math.cos(math.pi * k * (2 * i + 1) / (2 * d)) for i in range(d)])


def columns(indices: list[int], d: int) -> Matrix:
    """Q_r (d, r)."""
    return np.stack([dct_column(k, d) for k in indices], axis=1)


def strongest(gradient: Matrix, r: int) -> list[int]:
    """Equation (2)."""
    d = gradient.shape[1]
    energies = []
    for k in range(d):
        q = dct_column(k, d)
        energies.append(sum(float(np.dot(row, q)) ** 2 for row in gradient))
    return sorted(sorted(range(d), key=lambda k: -energies[k])[:r])


@dataclass
class ReferenceDCTAdamW:
    """One matrix and its optimizer; ``step`` takes the gradients in order."""

    weight: Matrix  # (R, C)
    rank: int
    lr: float
    refresh_interval: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        self.is_wide = self.weight.shape[0] < self.weight.shape[1]
        m, d = max(self.weight.shape), min(self.weight.shape)
        self.steps = 0
        self.indices: list[int] | None = None
        self.M = np.zeros((m, self.rank))
        self.V = np.zeros((m, self.rank))
        self.age = np.zeros(self.rank)
        self.d = d

    def step(self, gradient: Matrix) -> None:
        """Equations (2) to (6)."""
        G = gradient.T if self.is_wide else gradient
        W = self.weight.T if self.is_wide else self.weight
        b1, b2 = self.betas

        if self.steps % self.refresh_interval == 0:
            new = strongest(G, self.rank)
            if self.indices is not None:
                # Rounded, because it is a 0/1 matrix: 1e-16 of an old second moment, leaked into a column that enters,
                # would be as large as the square of a small gradient there.
                R = np.round(columns(self.indices, self.d).T @ columns(new, self.d), 12)
                self.M = self.M @ R
                self.V = np.abs(self.V @ R)
                self.age = self.age @ R
            self.indices = new
        assert self.indices is not None
        Q = columns(self.indices, self.d)

        g = G @ Q
        self.M = b1 * self.M + (1 - b1) * g
        self.V = b2 * self.V + (1 - b2) * g**2
        self.age = self.age + 1
        u = (self.M / (1 - b1**self.age)) / (np.sqrt(self.V / (1 - b2**self.age)) + self.eps)
        W = (1 - self.lr * self.weight_decay) * W - self.lr * u @ Q.T

        self.weight = W.T if self.is_wide else W
        self.steps += 1
