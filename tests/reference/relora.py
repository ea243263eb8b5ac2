"""ReLoRA, slowly: one layer, float64, one equation per line, nothing shared with the fast code.

Lialin et al. (arXiv 2307.05695), moments reset to zero as in Zhao et al. (arXiv 2405.15481).

    (1)  H = W + s B A,  G = dL/dH,  dL/dA = s B^T G,  dL/dB = s G A^T
    (2)  for theta in A, B, g its gradient, j the number of gradients since the last restart, this one included:
             theta <- (1 - lr_t wd) theta
             m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
             theta <- theta - lr_t (m / (1 - b1^j)) / (sqrt(v / (1 - b2^j)) + eps)
    (3)  lr_t = lr before the first restart, lr min(1, j / warmup) after it
    (4)  after every T steps:  W <- W + s B A;  A <- a new draw;  B, m, v, j <- 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REFERENCE_OF = ("relora",)

Matrix = NDArray[np.float64]


@dataclass
class ReferenceReLoRA:
    """One layer and its optimizer; ``step`` takes the gradient of the loss as a function of H."""

    W: Matrix  # (out, in)
    draw: Callable[[int], Matrix]  # number of restarts so far -> A (r, in)
    rank: int
    lr: float
    restart_every: int
    warmup_steps: int
    alpha: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        self.s = self.alpha / self.rank
        self.restarts = 0
        self.begin()

    def begin(self) -> None:
        """A drawn, everything else 0."""
        self.A = self.draw(self.restarts)
        self.B = np.zeros((self.W.shape[0], self.rank))
        self.m = {"A": np.zeros_like(self.A), "B": np.zeros_like(self.B)}
        self.v = {"A": np.zeros_like(self.A), "B": np.zeros_like(self.B)}
        self.j = 0

    @property
    def H(self) -> Matrix:
        """What the layer multiplies with."""
        return self.W + self.s * self.B @ self.A

    def step(self, gradient: Callable[[Matrix], Matrix]) -> None:
        """Equations (1) to (4)."""
        G = gradient(self.H)
        gradients = {"A": self.s * self.B.T @ G, "B": self.s * G @ self.A.T}
        self.j += 1
        lr = self.lr
        if self.restarts > 0 and self.j < self.warmup_steps:
            lr = self.lr * self.j / self.warmup_steps
        b1, b2 = self.betas
        for name, g in gradients.items():
            theta = getattr(self, name)
            theta = (1 - lr * self.weight_decay) * theta
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
            m_hat = self.m[name] / (1 - b1**self.j)
            v_hat = self.v[name] / (1 - b2**self.j)
            setattr(self, name, theta - lr * m_hat / (np.sqrt(v_hat) + self.eps))
        if self.j == self.restart_every:
            self.W = self.H
            self.restarts += 1
            self.begin()
