"""y = x W^T + b for W = U diag(sigma) V^T, with the gradients of SST and never a dense one that outlives its layer.

    G = dL/dW = dY^T X (never stored);   d sigma_i = u_i^T G v_i             for all i     Eq. 8
    enhanced:  d u_i = G v_i,            d v_i = G^T u_i                     for i in A    Eq. 14, 15
    plain:     d u_i = sigma_i G v_i,    d v_i = sigma_i G^T u_i                           Eq. 9

Two ways to the same numbers, X (T, n), dY (T, m), U (k, m) and V (k, n) with a vector per row:

    factored       Z = X V^T;  Y = (Z sigma) U;   dZ = dY U^T;  d sigma = sum_t Z dZ;  d u_A = Z_A^T dY
                   d v_A = dZ_A^T X;  dX = (dZ sigma) V
    materialised   W = U^T (sigma V), in forward and once more in backward;  Y = X W^T;  dX = dY W;  G = dY^T X, freed
                   before the next layer;  d u_A = V_A G^T;  d v_A = U_A G;  d sigma = sum (U G) V

in 4 T k (m + n) + 2 T r (m + n) and 6 T m n + 6 k m n + 2 r m n multiplications: wide layers are cheaper factored than
dense, square ones cheaper materialised when there are many tokens. What waits for backward: X, and Z if factored.

Source: Zhao et al. (arXiv 2405.15481v3), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_train.optim.spectral.factors import decode

__all__ = ["factored_is_cheaper", "spectral_product"]


def factored_is_cheaper(tokens: int, out: int, width: int, rank: int) -> bool:
    """Return whether the factored way takes fewer multiplications in forward and backward together."""
    k = min(out, width)
    factored = 4 * tokens * k * (out + width) + 2 * tokens * rank * (out + width)
    materialised = 6 * (tokens + k) * out * width + 2 * rank * out * width
    return factored < materialised


def spectral_product(
    x: Tensor,  # (..., in)
    active: tuple[Tensor, Tensor, Tensor],  # u (r, out), sigma (r,), v (r, in)
    frozen: tuple[Tensor, Tensor, Tensor] | None,  # u (k - r, out), sigma (k - r,), v (k - r, in)
    scales: tuple[Tensor, Tensor] | None,  # (k - r, 1) each: of u and v of the frozen, where they are 8-bit codes
    bias: Tensor | None,  # (out,)
    *,
    enhanced: bool,
    factored: bool,
) -> Tensor:
    """Return the product (..., out), in the type of x."""
    frozen_parts = frozen if frozen is not None else (None, None, None)
    scale_parts = scales if scales is not None else (None, None)
    tokens = x.shape[:-1]
    y: Tensor = _SpectralProduct.apply(
        x.reshape(tokens.numel(), x.shape[-1]), *active, *frozen_parts, *scale_parts, bias, enhanced, factored
    )
    return y.view(*tokens, y.shape[-1])


class _SpectralProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u_active: Tensor,
        sigma_active: Tensor,
        v_active: Tensor,
        u_frozen: Tensor | None,
        sigma_frozen: Tensor | None,
        v_frozen: Tensor | None,
        u_scale: Tensor | None,
        v_scale: Tensor | None,
        bias: Tensor | None,
        enhanced: bool,
        factored: bool,
    ) -> Tensor:
        """X (T, n) -> Y (T, m)."""
        parameters = (u_active, sigma_active, v_active, u_frozen, sigma_frozen, v_frozen, u_scale, v_scale)
        u, sigma, v = _factors(parameters, x.dtype)
        z = x @ v.mT if factored else None
        left, right = (z, u * sigma.unsqueeze(1)) if z is not None else (x, _weight(u, sigma, v).mT)
        y = left @ right if bias is None else torch.addmm(bias.to(x.dtype), left, right)
        ctx.save_for_backward(x, z, bias, *parameters)
        ctx.enhanced = enhanced
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dY (T, m) -> gradients of x, u_active, sigma_active, v_active, sigma_frozen and bias."""
        x, z, bias, *parameters = ctx.saved_tensors
        u_active, sigma_active, v_active, _, sigma_frozen = parameters[:5]
        r = u_active.shape[0]
        u, sigma, v = _factors(parameters, x.dtype)
        exact = torch.promote_types(x.dtype, torch.float32)
        if z is not None:
            dz = dy @ u.mT
            dsigma = (z * dz).sum(0, dtype=exact)
            du, dv = z[:, :r].mT @ dy, dz[:, :r].mT @ x
            dx = dz @ (v * sigma.unsqueeze(1)) if ctx.needs_input_grad[0] else None
        else:
            dx = dy @ _weight(u, sigma, v) if ctx.needs_input_grad[0] else None
            gradient = dy.mT @ x
            if u.shape[1] < v.shape[1]:  # all G v_i or all G^T u_i, whichever are the smaller
                everything = v @ gradient.mT
                dsigma = (everything * u).sum(1, dtype=exact)
                du, dv = everything[:r], u[:r] @ gradient
            else:
                everything = u @ gradient
                dsigma = (everything * v).sum(1, dtype=exact)
                du, dv = v[:r] @ gradient.mT, everything[:r]
        if not ctx.enhanced:
            du, dv = du * sigma[:r].unsqueeze(1), dv * sigma[:r].unsqueeze(1)
        return (
            dx,
            du.to(u_active.dtype),
            dsigma[:r].to(sigma_active.dtype),
            dv.to(v_active.dtype),
            None,
            None if sigma_frozen is None else dsigma[r:].to(sigma_frozen.dtype),
            None,
            None,
            None,
            None if bias is None else dy.sum(0).to(bias.dtype),
            None,
            None,
        )


def _factors(parameters: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U (k, m), sigma (k,) and V (k, n), the active triplets first, in the type of the arithmetic."""
    u_active, sigma_active, v_active, u_frozen, sigma_frozen, v_frozen, u_scale, v_scale = parameters
    u, sigma, v = u_active.to(dtype), sigma_active.to(dtype), v_active.to(dtype)
    if sigma_frozen is None:
        return u, sigma, v
    return (  # one product of them all is faster than two, by more than the copies cost
        torch.cat([u, decode(u_frozen, u_scale, dtype)]),
        torch.cat([sigma, sigma_frozen.to(dtype)]),
        torch.cat([v, decode(v_frozen, v_scale, dtype)]),
    )


def _weight(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """W (m, n); the smaller factor is the one multiplied with sigma."""
    column = sigma.unsqueeze(1)
    return (u * column).mT @ v if u.shape[1] < v.shape[1] else u.mT @ (v * column)
