"""AdamW: the baseline, equal to ``torch.optim.AdamW(fused=True)`` bit for bit, as one more optimizer of this package.

    theta <- (1 - lr wd) theta;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    theta <- theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), Algorithm 2.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.common_updates import ADAMW
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments

__all__ = ["AdamW"]


class AdamW(MatrixOptimizer):
    """AdamW on every parameter, whatever its role.

    Args:
        params: parameters, named parameters or groups; ``optim.param_groups(model)`` also exempts norms and biases
            from weight decay.

    State: two moments like the parameter, and a step count.
    """

    published = Published(paper="Loshchilov & Hutter, arXiv 1711.05101", when="memory does not matter; the baseline")
    updates: ClassVar = {"matrix": ADAMW}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
