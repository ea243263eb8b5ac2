"""LDAdam: Adam in a basis that follows the gradient at every step, with rotated moments and error feedback.

    A = G + E                                                                    E: what earlier steps left out
    Q_r <- one round of power iteration on (1 - rho) A + rho M_hat Q_r^T, from the last Q_r        (d, r)
    M, V <- rotated to the new basis                                             ``optim.low_rank.bases.dense``
    g = A Q_r                                                                                      (m, r)
    E <- A - g Q_r^T + b1 / (1 - b1) (M_old Q_old^T - M Q_r^T)                   and what M lost by the change of basis
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2
    W <- (1 - lr wd) W - lr (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps) Q_r^T

    M_hat = M / (1 - b1^t). W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Source: Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (arXiv 2410.16103),
Algorithm 1.

We differ:
  * error feedback is a tensor of the state; the released code keeps it in ``p.grad`` and so breaks clipping and
    ``zero_grad``;
  * the first basis comes from six rounds of subspace iteration, not from an SVD.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["LDAdam"]


class LDAdam(LowRankOptimizer):
    """Adam in a basis that follows the gradient at every step, with rotated moments and error feedback.

    Args:
        rho: share of the old momentum in the matrix whose leading singular vectors are followed.

    State of an m x n matrix, m >= n: m n (error feedback) + 2 m r + n r elements in the parameter's dtype.
    Communication when sharded: n r numbers summed and n r broadcast at every step.
    """

    published = Published(
        paper="Robert et al., arXiv 2410.16103", when="the best perplexity matters more than memory and time"
    )
    parts = Parts(basis="power", residual="ldadam", moments="rotate")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, {**arguments(locals()), "refresh_interval": 1})
