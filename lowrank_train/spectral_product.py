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

from optim.spectral_factors import decode

__all__ = ["factored_is_cheaper", "spectral_product"]


def factored_is_cheaper(tokens: int, out: int, width: int, rank: int) -> bool:
    """Which way takes fewer multiplications in forward and backward together."""
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
    """The product (..., out), in the type of x."""
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
        segments = _segments(parameters, x.dtype)
        inner = []
        if factored:
            y = None if bias is None else bias.to(x.dtype).expand(x.shape[0], -1)
            for u, sigma, v in segments:
                z = x @ v.mT
                inner.append(z)
                y = (z * sigma) @ u if y is None else torch.addmm(y, z * sigma, u)
            assert y is not None
        else:
            weight = _weight(segments)
            y = x @ weight.mT if bias is None else torch.addmm(bias.to(x.dtype), x, weight.mT)
        ctx.save_for_backward(x, bias, *parameters, *inner)
        ctx.enhanced, ctx.factored = enhanced, factored
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dY (T, m) -> gradients of x, u_active, sigma_active, v_active, sigma_frozen and bias."""
        x, bias, *rest = ctx.saved_tensors
        parameters, inner = rest[:8], rest[8:]
        u_active, sigma_active, v_active, _, sigma_frozen = parameters[:5]
        segments = _segments(parameters, x.dtype)
        if ctx.factored:
            dx, du, dv, dsigma = _factored_gradients(x, dy, segments, inner, needs_dx=ctx.needs_input_grad[0])
        else:
            dx, du, dv, dsigma = _materialised_gradients(x, dy, segments, needs_dx=ctx.needs_input_grad[0])
        if not ctx.enhanced:
            column = segments[0][1].unsqueeze(1)
            du, dv = du * column, dv * column
        return (
            dx,
            du.to(u_active.dtype),
            dsigma[0].to(sigma_active.dtype),
            dv.to(v_active.dtype),
            None,
            None if sigma_frozen is None else dsigma[1].to(sigma_frozen.dtype),
            None,
            None,
            None,
            None if bias is None else dy.sum(0).to(bias.dtype),
            None,
            None,
        )


_Segment = tuple[Tensor, Tensor, Tensor]


def _segments(parameters: Any, dtype: torch.dtype) -> list[_Segment]:
    """(u, sigma, v) of the active and of the frozen triplets, in the type of the arithmetic."""
    u_active, sigma_active, v_active, u_frozen, sigma_frozen, v_frozen, u_scale, v_scale = parameters
    segments = [(u_active.to(dtype), sigma_active.to(dtype), v_active.to(dtype))]
    if sigma_frozen is not None:
        u, v = decode(u_frozen, u_scale, dtype), decode(v_frozen, v_scale, dtype)
        segments.append((u, sigma_frozen.to(dtype), v))
    return segments


def _weight(segments: list[_Segment]) -> Tensor:
    """W (m, n)."""
    weight = None
    for u, sigma, v in segments:
        # the smaller of the two products with sigma
        left, right = (u * sigma.unsqueeze(1), v) if u.shape[1] < v.shape[1] else (u, v * sigma.unsqueeze(1))
        weight = left.mT @ right if weight is None else weight.addmm_(left.mT, right)
    assert weight is not None
    return weight


def _factored_gradients(
    x: Tensor, dy: Tensor, segments: list[_Segment], inner: list[Tensor], *, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor]]:
    exact = torch.promote_types(x.dtype, torch.float32)
    dx, du, dv, dsigma = None, None, None, []
    for z, (u, sigma, v) in zip(inner, segments, strict=True):
        dz = dy @ u.mT
        dsigma.append((z * dz).sum(0, dtype=exact))
        if du is None:
            du, dv = z.mT @ dy, dz.mT @ x
        if needs_dx:
            scaled = dz * sigma
            dx = scaled @ v if dx is None else dx.addmm_(scaled, v)
    assert du is not None
    assert dv is not None
    return dx, du, dv, dsigma


def _materialised_gradients(
    x: Tensor, dy: Tensor, segments: list[_Segment], *, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor]]:
    exact = torch.promote_types(x.dtype, torch.float32)
    dx = dy @ _weight(segments) if needs_dx else None
    gradient = dy.mT @ x
    u, _, v = segments[0]
    du, dv = v @ gradient.mT, u @ gradient
    dsigma = [(dv * v).sum(1, dtype=exact)]
    for u, _, v in segments[1:]:
        # u_i^T G v_i by the side that leaves the smaller product
        inside = (v @ gradient.mT).mul_(u) if u.shape[1] < v.shape[1] else (u @ gradient).mul_(v)
        dsigma.append(inside.sum(1, dtype=exact))
    return dx, du, dv, dsigma
