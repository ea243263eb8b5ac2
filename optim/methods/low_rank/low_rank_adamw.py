"""LowRankAdamW: the open form of the low-rank engine. Every part is chosen by name.

    every ``refresh_interval`` steps:
        Q_r <- ``basis``, from statistics of G                                                     (d, r)
        M, V, age <- ``moments``: kept, reset, or rotated to the new basis
    g = G Q_r                                                                                      (m, r)
    M <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2;   age <- age + 1                           age (r,)
    u = (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps)
    W <- (1 - lr wd) W - lr (scale u Q_r^T + residual_scale residual(G - g Q_r^T))

    W, G (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

``optim.low_rank.engine`` has it in full, ``optim.low_rank.bases`` and ``optim.low_rank.residuals`` have the parts. A
published method is a choice of them; each has its own file beside this one.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts

__all__ = ["LowRankAdamW"]


class LowRankAdamW(LowRankOptimizer):
    """Adam in a low-rank basis, every part of it chosen by name: for experiments, and for the best combination found.

    Raises:
        ValueError: at construction, for groups without roles, unknown names, parts that do not go together, and a rank
            or basis that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements, 4 r bytes of ages, 8 bytes of counters, basis and residual.
    Communication when sharded: what the basis and the residual need.
    """

    published = Published(
        paper="this project", when="**first choice**: best of all with a quarter of AdamW's state or less"
    )
    parts = Parts(basis="dct", residual="normalized", moments="rotate")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        basis: str = "dct",
        residual: str = "normalized",
        moments: str = "rotate",
        refresh_interval: int = 100,
        scale: float = 1.0,
        residual_scale: float = 1.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
