"""Muon, slowly: one matrix, float64, one equation per line, nothing shared with the fast code.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as ``torch.optim.Muon`` orders and scales it:

    (1)  M <- mu M + (1 - mu) G
    (2)  X = mu M + (1 - mu) G if Nesterov, else M
    (3)  X <- X / max(||X||_F, 1e-7);  five times: A = X X^T, X <- a X + (b A + c A A) X,  on the wide side
    (4)  W <- (1 - lr wd) W
    (5)  W <- W - lr s X,  s = sqrt(max(1, R / C)) or 0.2 sqrt(max(R, C)) (Liu et al., arXiv 2502.16982, Eq. 4)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REFERENCE_OF = ("muon",)

Matrix = NDArray[np.float64]


def newton_schulz(G: Matrix) -> Matrix:
    """Equation (3), on the matrix itself: no Gram matrix outlives a step."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / max(math.sqrt(float(np.sum(X * X))), 1e-7)
    for _ in range(5):
        A = X @ X.T
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.T if G.shape[0] > G.shape[1] else X


@dataclass
class ReferenceMuon:
    """One matrix and its optimizer; ``step`` takes the gradients in order."""

    weight: Matrix  # (R, C)
    lr: float
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr: str = "original"
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        self.M = np.zeros_like(self.weight)

    def step(self, G: Matrix) -> None:
        """Equations (1) to (5)."""
        mu = self.momentum
        self.M = mu * self.M + (1 - mu) * G
        X = mu * self.M + (1 - mu) * G if self.nesterov else self.M
        O = newton_schulz(X)  # noqa: E741
        R, C = self.weight.shape
        s = math.sqrt(max(1, R / C)) if self.adjust_lr == "original" else 0.2 * math.sqrt(max(R, C))
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        self.weight = self.weight - self.lr * s * O
