"""SST, slowly: one layer, float64, one triplet at a time, nothing shared with the fast code.

Zhao et al. (arXiv 2405.15481v3), Algorithm 2; U (m, k), Sigma (k), V (n, k), k = min(m, n), G = dL/dW:

    (3)   W = U diag(Sigma) V^T
    (4)   Sigma_i <- max(Sigma_i - lr_t Adam(U_i^T G V_i), 0)           for all i
    (7)   U_i <- U_i / |U_i|,  V_i <- V_i / |V_i|                       for i in S, after the step
    (8)   dL/dSigma_i = U_i^T G V_i
    (9)   dL/dU_i = Sigma_i G V_i,   dL/dV_i = Sigma_i G^T U_i          "default"
    (14)  U_i <- U_i - lr_t Adam(G V_i)                                 for i in S, "enhanced"
    (15)  V_i <- V_i - lr_t Adam(G^T U_i)                               for i in S

    round start       [U, Sigma, V] = SVD(U diag(Sigma) V^T)
    iteration start   S is drawn; exp_avg, exp_avg_sq and timestep of U, V and Sigma <- 0
    warm-up           lr_t = lr min(1, (s + 1) / warm), s steps after the iteration began
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

REFERENCE_OF = ("sst",)

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass
class Adam:
    """The moments of one vector or number, with a timestep of their own."""

    betas: tuple[float, float]
    eps: float
    m: Vector | float = 0.0
    v: Vector | float = 0.0
    t: int = 0

    def direction(self, g: Vector | float) -> Vector | float:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat = self.m / (1 - b1**self.t)
        v_hat = self.v / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


@dataclass
class ReferenceSST:
    """One layer and its optimizer: ``begin_iteration``, then ``step`` and ``end_iteration`` until that is true."""

    weight: Matrix  # (m, n), before training
    lr: float
    resample_every: int  # T3
    resvd_every: int  # T2; 0: never
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    enhanced: bool = True
    # what is not in the paper:
    weight_decay: float = 0.0
    keep_sigma_moments: bool = False
    keep_vector_moments: bool = False

    steps: int = 0
    negative: int = 0
    """How often a singular value fell below 0."""
    S: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decompose(self.weight)

    def decompose(self, W: Matrix) -> None:
        """Equation (3); columns of V are singular vectors, as those of U are. Moments of other vectors mean nothing."""
        U, self.Sigma, Vt = np.linalg.svd(W, full_matrices=False)
        self.U, self.V = U.copy(), Vt.T.copy()
        self.reset_sigma()
        self.reset_vectors(range(len(self.Sigma)))

    def reset_sigma(self) -> None:
        self.adam_sigma = [Adam(self.betas, self.eps) for _ in self.Sigma]

    def reset_vectors(self, indices: Sequence[int]) -> None:
        if not hasattr(self, "adam_u"):
            self.adam_u, self.adam_v = {}, {}
        for i in indices:
            self.adam_u[i] = Adam(self.betas, self.eps)
            self.adam_v[i] = Adam(self.betas, self.eps)

    def W(self) -> Matrix:
        """Equation (3)."""
        W = np.zeros((len(self.U), len(self.V)))
        for i, sigma in enumerate(self.Sigma):
            W += sigma * np.outer(self.U[:, i], self.V[:, i])
        return W

    def begin_iteration(self, S: Sequence[int]) -> None:
        """The sample is given; moments are forgotten, or those that are kept are not."""
        before, self.S = self.S, sorted(S)
        if not self.keep_sigma_moments:
            self.reset_sigma()
        for i in range(len(self.Sigma)):
            if not (self.keep_vector_moments and i in before and i in self.S):
                self.reset_vectors([i])

    def end_iteration(self) -> bool:
        """Whether an iteration ended with the last step; the re-SVD, if one is due."""
        if self.steps % self.resample_every != 0:
            return False
        iteration = self.steps // self.resample_every
        if self.resvd_every != 0 and iteration % self.resvd_every == 0:
            self.decompose(self.W())
        return True

    def learning_rate(self) -> float:
        """Warm-up."""
        s = self.steps % self.resample_every
        return self.lr * min(1.0, (s + 1) / self.warmup_steps)

    def step(self, G: Matrix) -> None:
        """Equations (4), (7), (8), (9) or (14) and (15); all gradients are those of the factors before the step."""
        lr = self.learning_rate()
        U, Sigma, V = self.U.copy(), self.Sigma.copy(), self.V.copy()

        for i in range(len(Sigma)):
            g = float(U[:, i] @ G @ V[:, i])  # (8)
            decayed = (1 - lr * self.weight_decay) * Sigma[i]
            self.Sigma[i] = decayed - lr * self.adam_sigma[i].direction(g)
            self.negative += int(self.Sigma[i] < 0)
            self.Sigma[i] = max(self.Sigma[i], 0.0)  # (4)

        for i in self.S:
            scale = 1.0 if self.enhanced else Sigma[i]
            g_u = scale * (G @ V[:, i])  # (14), or (9)
            g_v = scale * (G.T @ U[:, i])  # (15), or (9)
            u = U[:, i] - lr * self.adam_u[i].direction(g_u)
            v = V[:, i] - lr * self.adam_v[i].direction(g_v)
            self.U[:, i] = u / math.sqrt(float(u @ u))  # (7)
            self.V[:, i] = v / math.sqrt(float(v @ v))

        self.steps += 1
