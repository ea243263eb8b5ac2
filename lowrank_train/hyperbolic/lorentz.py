"""The Lorentz model of hyperbolic space, as functions of plain tensors whose last dimension is (time, space).

    <x, y> = -x_0 y_0 + x_1 y_1 + ... + x_n y_n          a point x has <x, x> = -k and x_0 > 0, k > 0

The curvature is -1/k. The origin is (sqrt(k), 0, ..., 0). Whatever can be had from the space part alone is: a time made
as sqrt(k + |space|^2) is on the manifold to rounding, far out too, where -x_0^2 + |space|^2 loses all digits.

Source: Nickel & Kiela (arXiv 1806.03417) for the model; Chen et al., "Fully Hyperbolic Neural Networks" (arXiv
2105.14686) for the squared distance and the centroid (their Eq. 6; Law et al., ICML 2019).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_train.common.errors import UserError

__all__ = [
    "centroid",
    "check_curvature",
    "check_points",
    "distance",
    "inner",
    "lift",
    "manifold_error",
    "on_manifold",
    "poincare",
    "squared_distance",
    "time_error",
]

MAX_RADIUS = 10.0
"""A length in units of sqrt(k). Beyond it, cosh leaves what float32 can subtract (Chen et al. clamp there too)."""

_TINY = 1e-8
"""Smallest -<s, s> / k that a sum of points is divided by the root of, where all weights were dropped."""


def check_curvature(k: float) -> float:
    """Return the constant itself. Raises UserError unless it is a positive number."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < math.inf:
        raise UserError(f"curvature={k!r}; expected k > 0, for which points have <x, x> = -k and space curvature -1/k")
    return float(k)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return <x, y>; (..., n + 1) and (..., n + 1) -> (...)."""
    products = x * y
    return products[..., 1:].sum(-1) - products[..., 0]


def on_manifold(space: Tensor, k: float = 1.0) -> Tensor:
    """Return the point with a given space part; (..., n) -> (..., n + 1)."""
    time = (k + space.square().sum(-1, keepdim=True)).sqrt()
    return torch.cat([time, space], dim=-1)


def lift(v: Tensor, k: float = 1.0) -> Tensor:
    """Return the end of the geodesic from the origin with velocity (0, v); (..., n) -> (..., n + 1).

    The exponential map at the origin, sqrt(k) (cosh a, sinh(a) v / |v|) with a = |v| / sqrt(k), at most ``MAX_RADIUS``.
    """
    root = math.sqrt(k)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    radius = (length / root).clamp_max(MAX_RADIUS)
    return on_manifold(v / length * (root * torch.sinh(radius)), k)


def squared_distance(x: Tensor, y: Tensor, k: float = 1.0) -> Tensor:
    """Return <x - y, x - y> = -2 k - 2 <x, y>; (..., n + 1) and (..., n + 1) -> (...)."""
    return -2 * k - 2 * inner(x, y)


def distance(x: Tensor, y: Tensor, k: float = 1.0) -> Tensor:
    """Return the length of the geodesic, sqrt(k) arccosh(-<x, y> / k); (..., n + 1) and (..., n + 1) -> (...).

    Computed as 2 sqrt(k) arcsinh(sqrt(<x - y, x - y> / 4 k)), which is exactly 0 from a point to itself.
    """
    difference = x - y
    squared = inner(difference, difference).clamp_min(0)
    return 2 * math.sqrt(k) * torch.asinh((squared / (4 * k)).sqrt())


def centroid(total: Tensor, k: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
    """Return the point sqrt(k) s / sqrt(-<s, s>) for a sum s of weighted points; (..., n + 1) -> (..., n + 1).

    It has the least weighted sum of squared distances to the points (Chen et al., Eq. 6). -<s, s> is at least k times
    the square of the sum of the weights. In float32 it drowns in the rounding of s_0^2 where points are far out (s_0 of
    1,000 and more): where less than half of the least it can be is left, that least is put in its place.

    Args:
        total: s.
        k: of the manifold.
        weight: sum of the weights, (..., 1) or a number.
    """
    least = k * weight**2
    square = -inner(total, total).unsqueeze(-1)
    square = torch.where(square < least / 2, least, square).clamp_min(_TINY * k)
    return total * (k / square).sqrt()


def poincare(x: Tensor, k: float = 1.0) -> Tensor:
    """Return the point in the unit ball, space / (time + sqrt(k)); (..., n + 1) -> (..., n)."""
    return x[..., 1:] / (x[..., :1] + math.sqrt(k))


def manifold_error(x: Tensor, k: float = 1.0) -> float:
    """Return the largest |<x, x> / k + 1| of points (..., n + 1), in float64; infinite if one is not finite or has no
    time > 0.
    """
    exact = x.detach().double()
    if not bool(torch.isfinite(exact).all()) or bool((exact[..., 0] <= 0).any()):
        return math.inf
    return float((inner(exact, exact) / k + 1).abs().max()) if exact.numel() else 0.0


def time_error(x: Tensor, k: float = 1.0) -> float:
    """Return the largest |x_0 - t| / t, t = sqrt(k + |space|^2) the time that points (..., n + 1) should have, in
    float64.

    Rounding is about the epsilon of the dtype here wherever a point is, while in ``manifold_error`` it grows as x_0^2.
    """
    exact = x.detach().double()
    right = (k + exact[..., 1:].square().sum(-1)).sqrt()
    return float(((exact[..., 0] - right).abs() / right).max()) if exact.numel() else 0.0


def check_points(x: Tensor, k: float = 1.0, *, name: str = "points", tolerance: float | None = None) -> Tensor:
    """Return the points themselves, (..., n + 1), after a check.

    Args:
        x: what should be points.
        k: of the manifold.
        name: for the message.
        tolerance: of |<x, x> / k + 1| relative to x_0^2 / k, as rounding is; None: 10 roundings of the dtype.

    Raises:
        UserError: a point is farther off the manifold, is not finite, or lies on the other sheet (time <= 0).
    """
    check_curvature(k)
    if x.ndim == 0 or x.shape[-1] < 2:
        raise UserError(f"{name}: shape {tuple(x.shape)}; expected (..., n + 1), a time and at least one coordinate")
    exact = x.detach().double()
    allowed = 10 * torch.finfo(x.dtype).eps if tolerance is None else tolerance
    error = (inner(exact, exact) / k + 1).abs() / (exact[..., 0].square() / k).clamp_min(1)
    wrong = ~torch.isfinite(error) | (error > allowed) | (exact[..., 0] <= 0)
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        point = exact[first]
        raise UserError(
            f"{name}: the point at index {first} is not on the manifold: its time is {point[0]:.6g}, expected "
            f"{math.sqrt(k + float(point[1:].square().sum())):.6g} for k={k:g} (relative tolerance {allowed:.1g}); "
            "make points with lowrank_train.hyperbolic.lorentz.on_manifold(space, k)"
        )
    return x
