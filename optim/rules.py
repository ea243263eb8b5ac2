"""Element-wise updates on plain local tensors; no state, no sharding, no classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

__all__ = ["adam_update", "adamw_"]


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
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2), in place: torch's own kernels, fused on CUDA.

    On CPU this is the path ``torch.optim.AdamW`` takes by default, so results are bitwise equal to it.
    """
    fused = all(p.is_cuda for p in params)
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


def adam_update(
    grad: Tensor,  # (m, r)
    exp_avg: Tensor,  # (m, r), updated in place
    exp_avg_sq: Tensor,  # (m, r), updated in place
    age: Tensor,  # (r,), updates each column has seen, this one included
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Adam's step -lr * m_hat / (sqrt(v_hat) + eps), with a bias correction per column; returns (m, r).

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  m_hat = m / (1 - beta1^age), v_hat alike.
    Moments are kept in their own dtype and the arithmetic is done in the gradient's.
    """
    beta1, beta2 = betas
    m = exp_avg.to(grad.dtype).lerp_(grad, 1 - beta1)
    v = exp_avg_sq.to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if exp_avg.dtype != grad.dtype:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    age = age.double()
    bias_correction1 = 1 - beta1**age
    bias_correction2_sqrt = (1 - beta2**age).sqrt()
    denominator = v.sqrt().div_(bias_correction2_sqrt.to(grad.dtype)).add_(eps)
    return (m * (-lr / bias_correction1).to(grad.dtype)).div_(denominator)
