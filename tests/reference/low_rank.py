"""Low-rank Adam, slowly: one matrix, float64, one equation per line, nothing shared with the fast code.

Oriented tall: W (m, d) with d = min(R, C); a wide matrix is transposed on the way in and out. t counts the updates
done. Directions V (r, d) and their choice (B1 .. B6): ``directions.py``.

At every step, with the gradient G:

    (1)  W <- (1 - lr wd) W
    (2)  A = G + E with error feedback, else A = G
    (3)  if t mod T = 0:  V_old = V;  V = choose(A);  M, V2, age carried over (not at t = 0)
         keep:    as they are                                                 GaLore, arXiv 2403.03507, released code
         reset:   M = V2 = 0, age = 0                                         FRUGAL, arXiv 2411.07837
         rotate:  (3a) fixed basis: the column of a vector that stays keeps M, V2, age; a vector that enters has 0
                       arXiv 2505.17967: R = Q_old^T Q_new, a 0/1 matrix;  M R, |V2 R|
                  (3b) dense basis: R = V_old V^T, M^ = M / (1 - b1^age), V2^ = V2 / (1 - b2^age),
                       M^' = M^ R,  V2^' = |(V2^ - M^ o M^)(R o R) + M^' o M^'|,  then times (1 - b^age) again
                       LDAdam, arXiv 2410.16103
    (4)  g = A V^T;  M <- b1 M + (1 - b1) g;  V2 <- b2 V2 + (1 - b2) g o g;  age <- age + 1
    (5)  u = (M / (1 - b1^age)) / (sqrt(V2 / (1 - b2^age)) + eps),  age per column
    (6)  W <- W - lr * update, with lift(c) = c V and D = A - lift(g), D_i = 0 where |D_i|^2 <= 64 eps |A_i|^2:

    drop                update = alpha lift(u)                                                          GaLore
    error_feedback      the same;  E <- stored(D), per row exact or (6a) rounded to 8 bits              arXiv 2505.17967
                        (6a)  s = max|row| / 127;  stored(row) = s round(row / s)
    ldadam              the same;  (6b) directions are chosen from  (1 - rho) A + rho lift_old(M / (1 - b1^age)),
                        and from A at t = 0;                                                     LDAdam, Algorithm 1
                        (6c)  E <- D + b1 / (1 - b1) (lift_old(M_old) - lift(M_old R)),  M_old as before (3)
    sign                update = alpha lift(u) + beta sign(D)                                           FRUGAL
    normalized          update_i = alpha lift(u)_i + beta sqrt((d - r) / d) D_i / rms(D_i), row by row; 0 for D_i = 0
    fira                (6d)  S_i = |u_i| / (|g_i| + 1e-8) D_i, row by row;                      Fira, arXiv 2410.01623
                        (6e)  if n > 0 and |S| > 1.01 n:  S <- S 1.01 n / |S|;   n <- |S|   (Frobenius)
                        update = alpha lift(u) + S
    fira_released       the same with D = A - alpha lift(g), which is what the authors' released code computes
    apollo              S_i = |u_i| / (|g_i| + 1e-8) G_i;  (6e);  update = alpha S            APOLLO, arXiv 2412.05270
    apollo_mini         S = |u| / (|g| + 1e-8) G, one number for the whole matrix;  (6e);  update = alpha S
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.reference.directions import Chooser, Directions, Matrix

REFERENCE_OF = ("low_rank_adamw", "galore_adamw", "fira", "frugal", "apollo", "apollo_mini", "ldadam")

COMPENSATED = ("error_feedback", "error_feedback_8bit", "ldadam")


def norm(x: Matrix) -> float:
    """Euclidean, of a vector or of all entries of a matrix."""
    return math.sqrt(sum(float(entry) ** 2 for entry in x.flat))


def quantized(X: Matrix) -> Matrix:
    """(6a)"""
    stored = np.zeros_like(X)
    for i, row in enumerate(X):
        s = np.max(np.abs(row)) / 127
        if s > 0:
            stored[i] = s * np.round(row / s)
    return stored


@dataclass
class ReferenceLowRankAdamW:
    """One matrix and its optimizer; ``step`` takes the gradients in order."""

    weight: Matrix  # (R, C)
    choose: Chooser
    residual: str
    moments: str
    rank: int
    lr: float
    refresh_interval: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    scale: float = 1.0  # alpha
    residual_scale: float = 1.0  # beta
    rho: float = 0.908

    def __post_init__(self) -> None:
        self.is_wide = self.weight.shape[0] < self.weight.shape[1]
        m, d = max(self.weight.shape), min(self.weight.shape)
        self.steps = 0
        self.directions: Directions | None = None
        self.M = np.zeros((m, self.rank))
        self.V2 = np.zeros((m, self.rank))
        self.age = np.zeros(self.rank)
        self.E = np.zeros((m, d))
        self.n = 0.0

    def step(self, gradient: Matrix) -> None:
        """(1) to (6)."""
        G = gradient.T if self.is_wide else gradient
        W = self.weight.T if self.is_wide else self.weight
        b1, b2 = self.betas

        W = (1 - self.lr * self.weight_decay) * W  # (1)
        A = G + self.E if self.residual in COMPENSATED else G  # (2)

        lost_momentum = np.zeros_like(A)
        if self.steps % self.refresh_interval == 0:  # (3)
            old, M_old = self.directions, self.M
            if self.residual == "ldadam" and old is not None:
                B = (1 - self.rho) * A + self.rho * (self.M / (1 - b1**self.age)) @ old.rows  # (6b)
            else:
                B = A
            self.directions = self.choose(B, self.rank, old, self.steps)
            if old is not None:
                self.carry_moments_over(old, self.directions)
                if self.residual == "ldadam":
                    R = old.rows @ self.directions.rows.T
                    lost_momentum = M_old @ old.rows - (M_old @ R) @ self.directions.rows
        assert self.directions is not None
        V = self.directions.rows

        g = A @ V.T  # (4)
        self.M = b1 * self.M + (1 - b1) * g
        self.V2 = b2 * self.V2 + (1 - b2) * g**2
        self.age = self.age + 1
        u = (self.M / (1 - b1**self.age)) / (np.sqrt(self.V2 / (1 - b2**self.age)) + self.eps)  # (5)

        W = W - self.lr * self.update(G, A, g, u)  # (6)
        if self.residual in COMPENSATED:
            D = A - g @ V
            if self.residual == "ldadam":
                self.E = D + b1 / (1 - b1) * lost_momentum  # (6c)
            elif self.residual == "error_feedback":
                self.E = D
            else:
                self.E = quantized(D)

        self.weight = W.T if self.is_wide else W
        self.steps += 1

    def carry_moments_over(self, old: Directions, new: Directions) -> None:
        """(3)"""
        b1, b2 = self.betas
        M, V2, age = self.M, self.V2, self.age
        if self.moments == "reset" or (self.moments == "rotate" and old.numbers is not None):
            self.M, self.V2, self.age = np.zeros_like(M), np.zeros_like(V2), np.zeros_like(age)
        if self.moments == "rotate" and old.numbers is not None and new.numbers is not None:  # (3a)
            for j, k in enumerate(new.numbers):
                if k in old.numbers:
                    i = old.numbers.index(k)
                    self.M[:, j], self.V2[:, j], self.age[j] = M[:, i], V2[:, i], age[i]
        elif self.moments == "rotate":  # (3b)
            R = old.rows @ new.rows.T
            M_hat, V_hat = M / (1 - b1**age), V2 / (1 - b2**age)
            M_new = M_hat @ R
            V_new = np.abs((V_hat - M_hat**2) @ R**2 + M_new**2)
            self.M, self.V2 = M_new * (1 - b1**age), V_new * (1 - b2**age)

    def update(self, G: Matrix, A: Matrix, g: Matrix, u: Matrix) -> Matrix:
        """The rows of (6), in their order."""
        assert self.directions is not None
        V = self.directions.rows
        r, d = V.shape
        D = A - g @ V
        if self.residual == "drop" or self.residual in COMPENSATED:
            return self.scale * u @ V
        for i in range(len(D)):
            if norm(D[i]) ** 2 <= 64 * np.finfo(np.float64).eps * norm(A[i]) ** 2:
                D[i] = 0
        if self.residual == "sign":
            return self.scale * u @ V + self.residual_scale * np.sign(D)
        if self.residual == "normalized":
            update = self.scale * u @ V
            for i in range(len(D)):
                rms = norm(D[i]) / math.sqrt(d)
                if rms > 0:
                    update[i] += self.residual_scale * math.sqrt((d - r) / d) * D[i] / rms
            return update
        if self.residual in ("fira", "fira_released"):
            if self.residual == "fira_released":
                D = A - self.scale * g @ V
            S = np.stack([norm(u[i]) / (norm(g[i]) + 1e-8) * D[i] for i in range(len(D))])  # (6d)
            return self.scale * u @ V + self.limited(S)
        if self.residual == "apollo":
            S = np.stack([norm(u[i]) / (norm(g[i]) + 1e-8) * G[i] for i in range(len(G))])
            return self.scale * self.limited(S)
        if self.residual == "apollo_mini":
            return self.scale * self.limited(norm(u) / (norm(g) + 1e-8) * G)
        raise AssertionError(self.residual)

    def limited(self, S: Matrix) -> Matrix:
        """(6e)"""
        if self.n > 0 and norm(S) > 1.01 * self.n:
            S = S * (1.01 * self.n / norm(S))
        self.n = norm(S)
        return S


def run(weight: Matrix, gradients: list[Matrix], **settings: object) -> list[Matrix]:
    """The weight after every step."""
    reference = ReferenceLowRankAdamW(weight, **settings)  # type: ignore[arg-type]
    weights = []
    for gradient in gradients:
        reference.step(gradient)
        weights.append(reference.weight)
    return weights
