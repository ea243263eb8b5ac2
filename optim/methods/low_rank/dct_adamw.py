"""DCT-AdamW: AdamW whose moments live on r columns of the discrete cosine transform.

    every ``refresh_interval`` steps:
        Q_r <- the r columns q of the cosine transform Q (d, d) with the largest ||G q||           (d, r)
        M, V, age follow their columns; a column that enters starts from M = V = 0, age = 0
    g = G Q_r                                                                                      (m, r)
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2;   age <- age + 1                           age (r,)
    W <- (1 - lr wd) W - lr (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps) Q_r^T

    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Read on in ``optim.low_rank.step`` (one matrix), ``optim.low_rank.bases.columns`` and ``dct`` (which columns).

Source: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models"
(arXiv 2505.17967), DCT-AdamW.

We differ from the released code:
  * ``refresh_interval`` is 100 and not 1, because a column that enters starts from nothing (docs/quickstart.md);
  * moments follow their columns exactly; the code multiplies them by a matrix in place, or by default not at all;
  * bias correction is per column, and columns are ranked by the l2 norm (``basis="dct_l1"`` ranks as the code);
  * there is no error feedback unless asked for, and then with all 256 levels;
  * weights of more than two dimensions are not skipped.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["DCTAdamW"]


class DCTAdamW(LowRankOptimizer):
    """AdamW whose moments live on r columns of the discrete cosine transform; the projector costs r integers.

    Args:
        basis: dct; dct_l1, for comparison, ranks the columns as the released code.
        residual: drop, or error_feedback or error_feedback_8bit, the paper's option.
        moments: rotate (by index, exact), keep or reset.

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, 8 r bytes of integers, two counters.
    Communication when sharded: one all-reduce of sum(min(m, n)) numbers per refresh; nothing at other steps.
    """

    published = Published(
        paper="Modoranu et al., arXiv 2505.17967",
        when="the least communication with Adam's steps; dropping the residual costs perplexity",
    )
    parts = Parts(basis="dct", residual="drop", moments="rotate")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_interval: int = 100,
        basis: str = "dct",
        residual: str = "drop",
        moments: str = "rotate",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
