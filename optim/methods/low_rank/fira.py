"""Fira: GaLore, and the residual of the gradient scaled row by row as Adam scaled the projection.

    every T = ``refresh_interval`` steps:
        Q_r <- the r leading right singular vectors of G                                           (d, r)
    g = G Q_r;   D = G - g Q_r^T                                                                   (m, r), (m, d)
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2                           kept when Q_r changes
    u = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps);   phi_i = |u_i| / |g_i|                   row by row
    W <- (1 - lr wd) W - lr (scale u Q_r^T + limit(phi D))

    limit(S): if ||S||_F exceeds 1.01 times its value at the last step, S is scaled down to that.
    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv 2410.01623),
Algorithm 1.

We differ: singular vectors come from subspace iteration, unless ``basis="svd"``. The released code removes only
``scale`` of the projection from G; ``residual="fira_released"`` does the same.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["Fira"]


class Fira(LowRankOptimizer):
    """GaLore, and the residual scaled row by row as Adam scaled the projection, with a limit on its growth.

    Args:
        lr: learning rate of all groups; float or tensor.
        scale: the paper's alpha, of the update inside the basis.
        basis: subspace or svd, as for GaLore, or any orthonormal one.
        residual: fira (the paper); fira_released, for comparison, removes only ``scale`` of the projection from the
            residual, as the released code.
        moments: keep (the paper), reset or rotate.

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype and one norm.
    Communication when sharded: as GaLore, and one number per matrix at every step.
    """

    published = Published(
        paper="Chen et al., arXiv 2410.01623", when="you have GaLore's settings and want more from them"
    )
    parts = Parts(basis="subspace", residual="fira", moments="keep")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 0.25,
        basis: str = "subspace",
        residual: str = "fira",
        moments: str = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
