"""Element-wise updates on plain local tensors; no state, no sharding, no classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

__all__ = ["adam_direction", "adamw_"]


def adamw_(
    params: list[Tensor],  # any shapes, one dtype and device
    grads: list[Tensor],  # as params
    exp_avgs: list[Tensor],  # as params
    exp_avg_sqs: list[Tensor],  # as params
    steps: list[Tensor],  # () each, counts the updates made before this one
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update by AdamW (Loshchilov & Hutter 2019, Algorithm 2), in place, with the kernels of torch's fused AdamW.

    Several times faster than torch's default on CPUs too, and equal to it up to the rounding of single elements.
    """
    # The fused kernel takes memory in its order, whatever the strides: with a slice, or two layouts, it makes nonsense.
    tensors = [*params, *grads, *exp_avgs, *exp_avg_sqs]
    fused = all(t.device.type in ("cpu", "cuda", "meta") and t.is_contiguous() for t in tensors)
    _torch_adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=False,
        fused=fused,
        has_complex=any(torch.is_complex(p) for p in params),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adam_direction(
    grad: Tensor,  # (m, r)
    exp_avg: Tensor,  # (m, r), of the gradient's dtype, updated in place
    exp_avg_sq: Tensor,  # (m, r), changed in place
    bias_correction1: Tensor,  # (r,), 1 - beta1^age
    bias_correction2_sqrt: Tensor,  # (r,), sqrt(1 - beta2^age)
    *,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Return Adam's m_hat / (sqrt(v_hat) + eps), (m, r), with a bias correction per column.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2.
    """
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().div_(bias_correction2_sqrt).add_(eps)
    return (exp_avg / bias_correction1).div_(denominator)
