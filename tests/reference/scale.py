"""SCALE, slowly: one parameter, float64, output by output, nothing shared with the fast code.

Glentis et al. (arXiv 2506.16659), Algorithm 1, with the norm of the released code:

    (1)  m <- beta m + (1 - beta) g for the last layer, m = g for the others
    (2)  n_i = sqrt(mean over the inputs of output i of m^2), at least 1e-8
    (3)  W_i <- (1 - lr wd) W_i - lr m_i / n_i
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REFERENCE_OF = ("scale",)

Matrix = NDArray[np.float64]


@dataclass
class ReferenceSCALE:
    """One parameter and its optimizer; ``step`` takes the gradients in order."""

    weight: Matrix  # (outputs, inputs); an embedding is (inputs, outputs)
    role: str
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.m = np.zeros_like(self.weight)

    def step(self, g: Matrix) -> None:
        """Equations (1) to (3)."""
        beta = self.momentum if self.role == "head" else 0.0
        self.m = beta * self.m + (1 - beta) * g
        weight, m = (self.weight.T, self.m.T) if self.role == "embedding" else (self.weight, self.m)
        new = weight.copy()
        for i in range(len(weight)):
            n = max(math.sqrt(sum(float(x) ** 2 for x in m[i]) / len(m[i])), 1e-8)
            for j in range(len(weight[i])):
                new[i, j] = (1 - self.lr * self.weight_decay) * weight[i, j] - self.lr * m[i, j] / n
        self.weight = new.T if self.role == "embedding" else new
