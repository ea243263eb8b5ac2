"""FRUGAL: AdamW on a random part of the columns of every matrix, the sign of the gradient on the others.

    every ``refresh_interval`` steps:
        C <- r of the d columns, drawn without replacement;   M, V <- 0
    on columns C:     M <- b1 M + (1 - b1) G;   V <- b2 V + (1 - b2) G^2
                      W <- (1 - lr wd) W - lr (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps)
    on the others:    W <- (1 - lr wd) W - lr residual_scale sign(G)

    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C). With another basis Q_r than columns:
    Adam on G Q_r, the sign of G - G Q_r Q_r^T.

Source: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training"
(arXiv 2411.07837), column-wise splitting.

We differ: the density is spent on columns of every matrix, not on a drawn set of whole matrices, so that state does not
move between parameters.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["FRUGAL"]


class FRUGAL(LowRankOptimizer):
    """AdamW on a random quarter of the columns of every matrix, the sign of the gradient on the others.

    Args:
        rank: columns with Adam's state per matrix, 1 .. min(m, n); None keeps a quarter (the paper's density 0.25).
        refresh_interval: steps between two draws of columns.
        basis: random_columns, or random, svd, subspace, as the paper compares.
        residual_scale: factor of the sign: 1 for pretraining, 0.1 for fine-tuning in the paper.

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, 8 r bytes of integers.
    Communication when sharded: one number per matrix at a refresh.
    """

    published = Published(
        paper="Zmushko et al., arXiv 2411.07837", when="the cheapest way to drop three quarters of the state"
    )
    parts = Parts(basis="random_columns", residual="sign", moments="reset")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        basis: str = "random_columns",
        residual_scale: float = 1.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
