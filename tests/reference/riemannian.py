"""Riemannian Adam once more: float64, one point at a time, in the ambient space, each formula as it is published.

Becigneul & Ganea (arXiv 1810.00760), Algorithm 1 with Adam's corrections of bias: adam
Nickel & Kiela (arXiv 1806.03417), Eq. 9 (exponential map), and Eq. 7-8 (gradient), scaled to <x, x> = -k: Lorentz
Ganea et al. (arXiv 1805.09112), Eq. 4 (Moebius addition), Eq. 12 (exponential map), Eq. 13 (transport): Ball
on the unit sphere parallel transport is the rotation, in their plane, that takes x to y: Sphere
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

REFERENCE_OF = ("riemannian_adamw",)

__all__ = ["Ball", "Geometry", "Lorentz", "Sphere", "adam", "low_rank_adam"]


class Geometry(ABC):
    """Vectors are of the ambient space."""

    @abstractmethod
    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor: ...

    @abstractmethod
    def inner(self, x: Tensor, a: Tensor, b: Tensor) -> float: ...

    @abstractmethod
    def exp(self, x: Tensor, u: Tensor) -> Tensor: ...

    @abstractmethod
    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor: ...

    def to_origin(self, x: Tensor, v: Tensor) -> Tensor:
        """Coordinates of a tangent vector that all points can share."""
        return v

    def from_origin(self, x: Tensor, w: Tensor) -> Tensor:
        return w


class Lorentz(Geometry):
    def __init__(self, k: float) -> None:
        self.k = k

    def minkowski(self, a: Tensor, b: Tensor) -> Tensor:
        return -a[0] * b[0] + (a[1:] * b[1:]).sum()

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        flipped = torch.cat([-euclidean[:1], euclidean[1:]])
        return flipped + self.minkowski(x, flipped) / self.k * x

    def inner(self, x: Tensor, a: Tensor, b: Tensor) -> float:
        return float(self.minkowski(a, b))

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        length = math.sqrt(max(self.inner(x, u, u), 0))
        if length == 0:
            return x
        angle = length / math.sqrt(self.k)
        return math.cosh(angle) * x + math.sqrt(self.k) * math.sinh(angle) * u / length

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v + self.minkowski(y, v) / (self.k - self.minkowski(x, y)) * (x + y)

    def origin(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_tensor([math.sqrt(self.k)]), torch.zeros_like(x[1:])])

    def to_origin(self, x: Tensor, v: Tensor) -> Tensor:
        return self.transport(x, self.origin(x), v)[1:]

    def from_origin(self, x: Tensor, w: Tensor) -> Tensor:
        return self.transport(self.origin(x), x, torch.cat([w.new_zeros(1), w]))


class Ball(Geometry):
    def __init__(self, c: float) -> None:
        self.c = c

    def factor(self, x: Tensor) -> Tensor:
        return 2 / (1 - self.c * x @ x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        c, ab, aa, bb = self.c, a @ b, a @ a, b @ b
        return ((1 + 2 * c * ab + c * bb) * a + (1 - c * aa) * b) / (1 + 2 * c * ab + c * c * aa * bb)

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        return euclidean / self.factor(x) ** 2

    def inner(self, x: Tensor, a: Tensor, b: Tensor) -> float:
        return float(self.factor(x) ** 2 * (a @ b))

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        length = float(u.norm())
        if length == 0:
            return x
        root = math.sqrt(self.c)
        return self.add(x, math.tanh(root * float(self.factor(x)) * length / 2) * u / (root * length))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """(lambda_x / lambda_y) gyr[y, -x] v; gyr[a, b] w = -(a + b) + (a + (b + w)) is linear in w of any length."""
        length = float(v.norm())
        if length == 0:
            return v
        w = v / length * 0.1 / math.sqrt(self.c)
        turned = self.add(-self.add(y, -x), self.add(y, self.add(-x, w)))
        return self.factor(x) / self.factor(y) * turned * length / (0.1 / math.sqrt(self.c))

    def to_origin(self, x: Tensor, v: Tensor) -> Tensor:
        """Times lambda_0 = 2, so that its length is the metric's."""
        return 2 * self.transport(x, torch.zeros_like(x), v)

    def from_origin(self, x: Tensor, w: Tensor) -> Tensor:
        return self.transport(torch.zeros_like(x), x, w / 2)


class Sphere(Geometry):
    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        return euclidean - (x @ euclidean) * x

    def inner(self, x: Tensor, a: Tensor, b: Tensor) -> float:
        return float(a @ b)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """Divided by its length, 1: errors of rounding would grow tenfold in 5 steps."""
        length = float(u.norm())
        y = x if length == 0 else math.cos(length) * x + math.sin(length) * u / length
        return y / y.norm()

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        if torch.equal(x, y):
            return v
        direction = self.gradient(x, y)
        direction = direction / direction.norm()
        cosine, sine = x @ y, direction @ y
        plane = torch.outer(x, x) + torch.outer(direction, direction)
        turn = torch.outer(direction, x) - torch.outer(x, direction)
        return v + (cosine - 1) * plane @ v + sine * turn @ v

    def from_origin(self, x: Tensor, w: Tensor) -> Tensor:
        return self.gradient(x, w)


def adam(
    geometry: Geometry,
    points: Tensor,  # (n, d)
    gradients: list[Tensor],  # (n, d) each, in the ambient space
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    amsgrad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Points, first moments (n, d), tangent there, and second moments (n,) after one step per gradient."""
    return low_rank_adam(geometry, points, gradients, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad)


def low_rank_adam(
    geometry: Geometry,
    points: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    amsgrad: bool = False,
    rank: int | None = None,
    interval: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``adam``; with a rank, what the first moments lose at the end of each step is lost."""
    xs = [x.clone() for x in points]
    ms = [torch.zeros_like(x) for x in points]
    vs, largest = [0.0] * len(xs), [0.0] * len(xs)
    directions = None
    for t, gradient in enumerate(gradients, 1):
        for i in range(len(xs)):
            x, g = xs[i], geometry.gradient(xs[i], gradient[i])
            ms[i] = betas[0] * ms[i] + (1 - betas[0]) * g
            vs[i] = betas[1] * vs[i] + (1 - betas[1]) * geometry.inner(x, g, g)
            largest[i] = max(largest[i], vs[i])
            v = largest[i] if amsgrad else vs[i]
            u = -lr * ms[i] / (1 - betas[0] ** t) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
            y = geometry.exp(x, u)
            ms[i], xs[i] = geometry.transport(x, y, ms[i]), y
        if rank is not None:
            shared = torch.stack([geometry.to_origin(x, m) for x, m in zip(xs, ms, strict=True)])
            if (t - 1) % interval == 0:
                directions = torch.linalg.svd(shared).Vh[:rank]
            assert directions is not None
            kept = shared @ directions.mT @ directions
            ms = [geometry.from_origin(x, w) for x, w in zip(xs, kept, strict=True)]
    return torch.stack(xs), torch.stack(ms), torch.tensor(vs, dtype=torch.float64)
