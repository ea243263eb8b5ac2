"""APOLLO: the gradient itself, scaled as Adam scales its random projection. Full-rank steps, low-rank state.

    every ``refresh_interval`` steps:
        P <- N(0, 1 / r), drawn from a seed                                                        (d, r)
    g = G P                                                                                        (m, r)
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2                           kept when P changes
    u = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    phi_i = |u_i| / |g_i|                 APOLLO: one factor a row of the tall matrix
    phi   = ||u||_F / ||g||_F             APOLLO-Mini: one factor for the matrix, r = 1
    W <- (1 - lr wd) W - lr scale limit(phi G)

    limit(S): if ||S||_F exceeds 1.01 times its value at the last step, S is scaled down to that.
    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), Algorithm 1.

We differ:
  * P is the same on every device and rank (``optim.low_rank.bases.random``);
  * ``scale`` multiplies the step; the released code takes the root of its argument of this name.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["APOLLO", "APOLLOMini"]


class APOLLO(LowRankOptimizer):
    """The gradient itself, each row scaled as Adam scales its random projection: full-rank steps, low-rank state.

    Args:
        lr: learning rate of all groups; matrices move by ``lr * scale``. Float or tensor.
        refresh_interval: steps between two draws of the projection.
        scale: multiplies the step. The released code takes the root of its argument of this name, ours does not.
        basis: gaussian (the paper), random (orthonormal), or any other.

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, a seed and a norm.
    Communication when sharded: one number per matrix at every step.
    """

    published = Published(
        paper="Zhu et al., arXiv 2412.05270",
        when="a quarter of AdamW's state, in random directions; published at many sizes",
    )
    parts = Parts(basis="gaussian", residual="apollo", moments="keep")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 1.0,
        basis: str = "gaussian",
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))


class APOLLOMini(LowRankOptimizer):
    """The gradient itself, scaled by one number as Adam scales its projection on one random direction: SGD's memory.

    Args:
        lr: learning rate of all groups; matrices move by ``lr * scale``. Float or tensor.
        rank: random directions per matrix.
        refresh_interval: steps between two draws of the projection.
        scale: multiplies the step; the root of the 128 that the released code is given.

    State of an m x n matrix, m >= n: 2 m elements in the parameter's dtype, a seed and a norm.
    Communication when sharded: three numbers per matrix at every step.
    """

    name = "apollo_mini"
    published = Published(
        paper="Zhu et al., arXiv 2412.05270", when="no state to speak of, AdamW kept for embeddings and head"
    )
    parts = Parts(basis="gaussian", residual="apollo_mini", moments="keep")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 1,
        refresh_interval: int = 200,
        scale: float = 128**0.5,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
