"""Low-rank Adam with a rank per matrix, slowly: float64, one equation per line, nothing shared with the fast code.

All matrices are oriented tall: W (m, d), d = min(R, C). t = 1, 2, ... counts the updates; the basis is the exact SVD,
the rest is dropped, moments rotate. Every matrix, with its gradient G:

    (1)  if t is one of the A updates before an allocation:  Gamma <- Gamma + G^T G        (0 when these begin)
    (2)  W <- (1 - lr wd) W
    (3)  low-rank: if (t - 1) mod T = 0:  V_old = V;  V = leading r right singular vectors of G (largest entry > 0);
         M, V2, age <- carried(M, V2, age, R = V_old V^T)                                      (not at t = 1)
    (4)  g = G V^T (low-rank) or G (dense);  M <- b1 M + (1 - b1) g;  V2 <- b2 V2 + (1 - b2) g o g;  age <- age + 1
    (5)  u = (M / (1 - b1^age)) / (sqrt(V2 / (1 - b2^age)) + eps),  age per column
    (6)  W <- W - lr alpha u V (low-rank) or W - lr u (dense)

    carried:  column j with age 0 counts as M^_j = V2^_j = 0, else M^_j = M_j / (1 - b1^age_j), V2^_j likewise;
              a = the largest age;  M^' = M^ R;  V2^' = |(V2^ - M^ o M^)(R o R) + M^' o M^'|
              M' = M^' (1 - b1^a),  V2' = V2^' (1 - b2^a),  all ages a

After update t, if t = A or t > A and (t - A) mod E = 0:

    (7)  s_i = lambda_i(Gamma) / sum lambda(Gamma),  lambda falling, of every matrix
    (8)  r(theta) = max(1, #{i : s_i >= theta}) of every matrix; theta the smallest of all s with cost <= budget,
         cost(r) = min(8 (2 m r + r d) + 4 r + 12, 8 (2 m d) + 16) bytes; where the second is not more: dense
    (9)  unless t = A: nothing changes if sum |cost(r new) - cost(r old)| <= h budget
    (10) fewer: leading rows of V and columns of M, V2, age.   more: rows of a Gaussian matrix (its seed is crc32 of
         "seed/name/t"), each minus its projections on all rows before it, normalised; M = V2 = age = 0
         to dense: carried with R = V.   from dense: V = leading r right singular vectors of M; carried with R = V^T
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.reference.directions import Matrix


def leading_vectors(X: Matrix, r: int) -> Matrix:
    """Rows: right singular vectors of X, the largest entry of each positive."""
    rows = np.linalg.svd(X, full_matrices=False)[2][:r].copy()
    for row in rows:
        if row[np.argmax(np.abs(row))] < 0:
            row *= -1
    return rows


@dataclass
class Factor:
    """One matrix, tall; r = None is dense."""

    name: str
    W: Matrix
    r: int | None
    M: Matrix = field(init=False)
    V2: Matrix = field(init=False)
    age: Matrix = field(init=False)
    V: Matrix | None = None
    Gamma: Matrix | None = None

    def __post_init__(self) -> None:
        width = self.r or self.W.shape[1]
        self.M = np.zeros((self.W.shape[0], width))
        self.V2 = np.zeros((self.W.shape[0], width))
        self.age = np.zeros(width)

    def cost(self, r: int) -> tuple[int, bool]:
        """(8): bytes, and whether it is dense."""
        m, d = self.W.shape
        low, dense = 8 * (2 * m * r + r * d) + 4 * r + 12, 8 * (2 * m * d) + 16
        return min(low, dense), dense <= low

    @property
    def rank(self) -> int:
        return self.W.shape[1] if self.r is None else self.r


@dataclass
class ReferenceWeLoreAdamW:
    """All matrices of a model; ``step`` takes their gradients by name."""

    weights: dict[str, Matrix]
    rank: int
    lr: float
    average_steps: int  # A
    reallocate_every: int  # E
    refresh_interval: int  # T
    hysteresis: float = 0.1  # h
    scale: float = 1.0  # alpha
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.t = 0
        self.events: list[str] = []
        self.factors = []
        self.budget = 0
        for name, weight in self.weights.items():
            W = weight if weight.shape[0] >= weight.shape[1] else weight.T
            factor = Factor(name, W, self.rank)
            cost, dense = factor.cost(self.rank)
            self.budget += cost
            self.factors.append(Factor(name, W, None if dense else self.rank))

    @property
    def ranks(self) -> dict[str, int]:
        return {factor.name: factor.rank for factor in self.factors}

    def is_allocation(self, t: int) -> bool:
        return t == self.average_steps or (
            t > self.average_steps and (t - self.average_steps) % self.reallocate_every == 0
        )

    def step(self, gradients: dict[str, Matrix]) -> None:
        self.t += 1
        b1, b2 = self.betas
        for factor in self.factors:
            G = gradients[factor.name]
            G = G if G.shape[0] >= G.shape[1] else G.T
            if any(self.is_allocation(t) for t in range(self.t, self.t + self.average_steps)):  # (1)
                factor.Gamma = G.T @ G if factor.Gamma is None else factor.Gamma + G.T @ G
            factor.W = (1 - self.lr * self.weight_decay) * factor.W  # (2)
            g = G
            if factor.r is not None:
                if (self.t - 1) % self.refresh_interval == 0:  # (3)
                    old, factor.V = factor.V, leading_vectors(G, factor.r)
                    if old is not None:
                        self.carry(factor, old @ factor.V.T)
                g = G @ factor.V.T
            factor.M = b1 * factor.M + (1 - b1) * g  # (4)
            factor.V2 = b2 * factor.V2 + (1 - b2) * g * g
            factor.age = factor.age + 1
            u = np.zeros_like(factor.M)  # (5)
            for j in range(u.shape[1]):
                M_hat = factor.M[:, j] / (1 - b1 ** factor.age[j])
                V2_hat = factor.V2[:, j] / (1 - b2 ** factor.age[j])
                u[:, j] = M_hat / (np.sqrt(V2_hat) + self.eps)
            if factor.r is None:  # (6)
                factor.W = factor.W - self.lr * u
            else:
                factor.W = factor.W - self.lr * self.scale * u @ factor.V
        if self.is_allocation(self.t):
            self.allocate()

    def carry(self, factor: Factor, R: Matrix) -> None:
        b1, b2 = self.betas
        M_hat, V2_hat = np.zeros_like(factor.M), np.zeros_like(factor.V2)
        for j in range(M_hat.shape[1]):
            if factor.age[j] > 0:
                M_hat[:, j] = factor.M[:, j] / (1 - b1 ** factor.age[j])
                V2_hat[:, j] = factor.V2[:, j] / (1 - b2 ** factor.age[j])
        a = factor.age.max()
        new_M = M_hat @ R
        new_V2 = np.abs((V2_hat - M_hat * M_hat) @ (R * R) + new_M * new_M)
        factor.M = new_M * (1 - b1**a)
        factor.V2 = new_V2 * (1 - b2**a)
        factor.age = np.full(R.shape[1], a)

    def allocate(self) -> None:
        tables = []
        for factor in self.factors:  # (7)
            values = np.linalg.eigvalsh(factor.Gamma)[::-1]
            tables.append(values / values.sum())
            factor.Gamma = None
        chosen = [1] * len(tables)
        for theta in sorted({s for table in tables for s in table}, reverse=True):  # (8)
            counts = [max(1, sum(1 for s in table if s >= theta)) for table in tables]
            if sum(f.cost(r)[0] for f, r in zip(self.factors, counts, strict=True)) > self.budget:
                break
            chosen = counts
        moved = 0
        for factor, r in zip(self.factors, chosen, strict=True):
            moved += abs(factor.cost(r)[0] - factor.cost(factor.rank)[0])
        if self.t != self.average_steps and moved <= self.hysteresis * self.budget:  # (9)
            self.events.append("kept")
            return
        for factor, r in zip(self.factors, chosen, strict=True):  # (10)
            self.change(factor, None if factor.cost(r)[1] else r)

    def change(self, factor: Factor, r: int | None) -> None:
        if r == factor.r:
            return
        if r is None:
            self.events.append("to dense")
            self.carry(factor, factor.V)
            factor.V = None
        elif factor.r is None:
            self.events.append("from dense")
            factor.V = leading_vectors(factor.M, r)
            self.carry(factor, factor.V.T)
        elif r < factor.r:
            self.events.append("fewer")
            factor.V = factor.V[:r]
            factor.M, factor.V2, factor.age = factor.M[:, :r], factor.V2[:, :r], factor.age[:r]
        else:
            self.events.append("more")
            generator = torch.Generator().manual_seed(zlib.crc32(f"0/{factor.name}/{self.t}".encode()))
            rows = list(factor.V)
            shape = (r - factor.r, factor.W.shape[1])
            for row in torch.randn(shape, generator=generator, dtype=torch.float64).numpy():
                for _ in range(2):
                    for other in rows:
                        row = row - (row @ other) * other
                rows.append(row / np.sqrt(row @ row))
            factor.V = np.stack(rows)
            nothing = np.zeros((factor.W.shape[0], r - factor.r))
            factor.M, factor.V2 = np.hstack([factor.M, nothing]), np.hstack([factor.V2, nothing])
            factor.age = np.concatenate([factor.age, np.zeros(r - factor.r)])
        factor.r = r
