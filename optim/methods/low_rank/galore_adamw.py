"""GaLore: AdamW on the projection of the gradient onto its leading singular vectors; the residual is dropped.

    every T = ``refresh_interval`` steps:
        Q_r <- the r leading right singular vectors of G                                           (d, r)
    g = G Q_r                                                                                      (m, r)
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2                           kept when Q_r changes
    W <- (1 - lr wd) W - lr scale (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps) Q_r^T

    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507),
Algorithm 2.

We differ:
  * singular vectors come from subspace iteration, unless ``basis="svd"``;
  * one rule for the side that is projected, also where the rank equals a dimension;
  * a rank above min(m, n) is an error, not a silent clamp;
  * weight decay comes first, as torch's.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["GaLoreAdamW"]


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on the projection of the gradient onto its leading singular vectors; the residual is dropped.

    Args:
        lr: learning rate of all groups; matrices move by ``lr * scale``. Float or tensor.
        scale: the paper's alpha.
        basis: subspace (two rounds of subspace iteration from the last basis) or svd (exact).
        moments: keep (the paper), reset or rotate.

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype.
    Communication when sharded: n r numbers summed and n r broadcast per round of a refresh (svd: n^2 summed).
    """

    published = Published(paper="Zhao et al., arXiv 2403.03507", when="a comparison with published results")
    parts = Parts(basis="subspace", residual="drop", moments="keep")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 0.25,
        basis: str = "subspace",
        moments: str = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
