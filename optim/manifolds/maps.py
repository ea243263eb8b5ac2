"""Manifolds whose points are rows of a parameter, in closed forms that survive points far from the origin.

A tangent vector at x is held as coordinates w in an orthonormal frame at x: its Riemannian length is |w|, whatever the
point, so lengths, second moments and quantised moments need no metric and cannot become negative by cancellation.

Lorentz and ball: the frame at the origin o, carried to x along the geodesic. With e = dL/dx the gradient in the ambient
space, u = a step and m = a moment in these coordinates, x' = the point reached:

    Lorentz, <x,x> = -x_0^2 + |x_s|^2 = -k,  x_0 = sqrt(k + |x_s|^2) > 0
        gradient   w   = e_s + (e_0 / sqrt(k) + e_s.x_s / (k + sqrt(k) x_0)) x_s                        d - 1 numbers
        lift       V_0 = x_s.u / sqrt(k),   V_s = u + x_s.u / (k + sqrt(k) x_0) x_s
        exp        x'_s = cosh(h) x_s + sinh(h) / h V_s,   h = |u| / sqrt(k);   x'_0 from x'_s
    ball, c |x|^2 < 1,  lambda = 2 / (1 - c |x|^2)
        gradient   w   = e / lambda                                                                         d numbers
        exp        x'  = x (+) z,   z = tanh(sqrt(c) |u| / 2) / (sqrt(c) |u|) u
    both           m'  = gyr[b, z] m          parallel transport along the step; b: x in the ball, c = 1 / k for Lorentz

    (+) is Moebius addition, gyr[a, b] the rotation by which it fails to be associative.

    sphere, |x| = 1, coordinates are those of the ambient space, tangent ones:
        gradient   w   = e - (x.e) x
        exp        x'  = cos(h) x + sin(h) / h u,   h = |u|
        transport  m'  = m - (u.m) (2 sin(h/2)^2 / h^2 u + sin(h) / h x)
    Stiefel, X^T X = I, Euclidean metric, ambient coordinates too:
        gradient   w   = E - X sym(X^T E)
        retraction X'  = Q of QR(X + U), diagonal of R positive
        transport  m'  = M - X' sym(X'^T M)

Everything is computed in float64 from what is stored, and x_0 is never read: it is what rounding spoils.

Sources: Nickel & Kiela (arXiv 1806.03417) for the Lorentz model; Ungar, "A gyrovector space approach to hyperbolic
geometry", 2008, and Ganea et al. (arXiv 1805.09112) for the ball; Absil et al., "Optimization algorithms on matrix
manifolds", 2008, for Stiefel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.linalg import orthonormal_columns

__all__ = ["Description", "Manifold", "describe_manifold", "find_manifold", "same_manifold"]

Description = tuple[str | float, ...]
"""What a parameter group and its checkpoint hold of a manifold: its name and constant, ``("lorentz", 1.0)``."""

_LONGEST_STEP = 10.0
"""The longest update, in radii of curvature: e^10 times as far out. HyboNet (arXiv 2105.14686) has this bound."""


class Manifold(ABC):
    """Abstract: a manifold. Points (n, ...) and coordinates w (n, ...) of tangent vectors are float64, one per row."""

    point_dims = 1
    """Dimensions of one point: 1 for a vector, 2 for a matrix."""

    low_rank = True
    """Whether coordinates of all points can share directions."""

    def objection(self, shape: Sequence[int]) -> str | None:
        """Return why rows of a parameter of this shape cannot be points; None if they can."""
        if len(shape) != 2 or shape[1] < 2:
            return "expected (rows, d), d >= 2, a point per row"
        return None

    def coordinates(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the coordinates of tangent vectors at the points of a parameter of this shape."""
        return tuple(shape)

    @abstractmethod
    def completed(self, x: Tensor) -> Tensor:
        """Return points from what is stored of them, with rounding errors repaired."""

    @abstractmethod
    def defect(self, x: Tensor) -> Tensor:
        """Return how far stored points are from the manifold, (n,), relative to their own size."""

    @abstractmethod
    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        """Return coordinates of the Riemannian gradient from the one in the ambient space, dL/dx."""

    def tangent(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the nearest coordinates that belong to a tangent vector."""
        return w

    @abstractmethod
    def lift(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the tangent vector of the ambient space with these coordinates."""

    @abstractmethod
    def move(self, x: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points reached by steps u, and there the coordinates of the moments m, transferred."""

    def storable(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what to store of points in ``dtype``, so that they are on the manifold as nearly as it can say."""
        return x


class _Lorentz(Manifold):
    """The upper sheet of the hyperboloid <x, x> = -k: curvature -1/k."""

    def __init__(self, k: float) -> None:
        self.k = k
        self.radius = math.sqrt(k)

    def coordinates(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All but time."""
        return (shape[0], shape[1] - 1)

    def completed(self, x: Tensor) -> Tensor:
        """Time from space."""
        return self._with_time(x[:, 1:])

    def defect(self, x: Tensor) -> Tensor:
        """Of time, relative to what it should be."""
        time = self._with_time(x[:, 1:])[:, 0]
        return (x[:, 0] - time).abs() / time

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        """Without a Minkowski product: nothing large is subtracted."""
        time, space = euclidean[:, :1], euclidean[:, 1:]
        return space + (time / self.radius + _dot(space, x[:, 1:]) / self._shift(x)) * x[:, 1:]

    def lift(self, x: Tensor, w: Tensor) -> Tensor:
        """By transport from the origin."""
        along = _dot(x[:, 1:], w)
        return torch.cat([along / self.radius, w + along / self._shift(x) * x[:, 1:]], dim=1)

    def move(self, x: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map, parallel transport."""
        u = _shortened(u, _LONGEST_STEP * self.radius)
        h = _norm(u) / self.radius
        space = torch.cosh(h) * x[:, 1:] + _ratio(torch.sinh(h), h) * self.lift(x, u)[:, 1:]
        ball = self.radius * x[:, 1:] / (self.radius + x[:, :1])
        z = 0.5 * _ratio(torch.tanh(h / 2), h / 2) * u
        return self._with_time(space), _gyration(ball, z, m, 1 / self.k)

    def storable(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Time for space as it will be when rounded."""
        return self._with_time(x[:, 1:].to(dtype).to(x.dtype))

    def _with_time(self, space: Tensor) -> Tensor:
        return torch.cat([(self.k + _dot(space, space)).sqrt(), space], dim=1)

    def _shift(self, x: Tensor) -> Tensor:
        return self.k + self.radius * x[:, :1]


class _PoincareBall(Manifold):
    """The ball c |x|^2 < 1 with the conformal metric: curvature -c."""

    def __init__(self, c: float) -> None:
        self.c = c
        self.root = math.sqrt(c)

    def completed(self, x: Tensor) -> Tensor:
        """As stored."""
        return x

    def defect(self, x: Tensor) -> Tensor:
        """0 in the ball."""
        length = self.root * _norm(x)[:, 0]
        return torch.where(length < 1, 0.0, length)  # nan is no point either

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        """dL/dx over the conformal factor, once: twice for the gradient, back once for its coordinates."""
        return euclidean / self._factor(x)

    def lift(self, x: Tensor, w: Tensor) -> Tensor:
        """By the conformal factor."""
        return w / self._factor(x)

    def move(self, x: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map, parallel transport."""
        u = _shortened(u, _LONGEST_STEP / self.root)
        h = self.root * _norm(u) / 2
        z = 0.5 * _ratio(torch.tanh(h), h) * u
        xz, xx, zz = 2 * self.c * _dot(x, z), self.c * _dot(x, x), self.c * _dot(z, z)
        y = ((1 + xz + zz) * x + (1 - xx) * z) / (1 + xz + xx * zz)
        return y, _gyration(x, z, m, self.c)

    def storable(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """No nearer to the boundary than geoopt's own projection leaves them."""
        margin = 1e-5 if dtype == torch.float64 else 4e-3
        return _shortened(x, (1 - margin) / self.root)

    def _factor(self, x: Tensor) -> Tensor:
        length = self.root * _norm(x)
        return 2 / ((1 - length) * (1 + length))


class _Sphere(Manifold):
    """Unit vectors."""

    def completed(self, x: Tensor) -> Tensor:
        """Of length 1."""
        return x / _norm(x).clamp_min(torch.finfo(x.dtype).tiny)

    def defect(self, x: Tensor) -> Tensor:
        """Of the length."""
        return (_norm(x)[:, 0] - 1).abs()

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        """What is orthogonal to x."""
        return self.tangent(x, euclidean)

    def tangent(self, x: Tensor, w: Tensor) -> Tensor:
        """What is orthogonal to x."""
        return w - _dot(x, w) * x

    def lift(self, x: Tensor, w: Tensor) -> Tensor:
        """The coordinates are those of the ambient space."""
        return w

    def move(self, x: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map, parallel transport."""
        h = _norm(u)
        sinc, half = _ratio(torch.sin(h), h), _ratio(torch.sin(h / 2), h / 2)
        y = self.completed(torch.cos(h) * x + sinc * u)
        return y, self.tangent(y, m - _dot(u, m) * (half.square() / 2 * u + sinc * x))


class _Stiefel(Manifold):
    """Matrices (a, b), a >= b, with orthonormal columns; Euclidean metric, retraction by QR."""

    point_dims = 2
    low_rank = False

    def objection(self, shape: Sequence[int]) -> str | None:
        """A row must be a whole matrix."""
        if len(shape) != 3 or shape[1] < shape[2]:
            return "expected (rows, a, b), a >= b: a point is a whole matrix, so a single one is (1, a, b)"
        return None

    def completed(self, x: Tensor) -> Tensor:
        """Orthonormal columns."""
        return orthonormal_columns(x)

    def defect(self, x: Tensor) -> Tensor:
        """Largest entry of X^T X - I."""
        identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        return (x.mT @ x - identity).abs().amax((1, 2))

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        """The tangent part."""
        return self.tangent(x, euclidean)

    def tangent(self, x: Tensor, w: Tensor) -> Tensor:
        """The orthogonal projection."""
        inner = x.mT @ w
        return w - x @ (inner + inner.mT) / 2

    def lift(self, x: Tensor, w: Tensor) -> Tensor:
        """The coordinates are those of the ambient space."""
        return w

    def move(self, x: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction, transport by projection."""
        y = orthonormal_columns(x + u)
        return y, self.tangent(y, m)


_TABLE: dict[str, tuple[type[Manifold], str | None]] = {
    "lorentz": (_Lorentz, "k"),
    "poincare_ball": (_PoincareBall, "c"),
    "sphere": (_Sphere, None),
    "stiefel": (_Stiefel, None),
}
"""Name -> class and its constant, which must be positive."""

_GEOOPT = {"Lorentz": "lorentz", "PoincareBall": "poincare_ball", "Sphere": "sphere", "EuclideanStiefel": "stiefel"}
_OTHER_METRIC = ("CanonicalStiefel", "EuclideanStiefelExact")


def describe_manifold(manifold: Any) -> Description:
    """Name and constant of a manifold, in plain values that any checkpoint holds.

    Args:
        manifold: of geoopt (``Lorentz``, ``PoincareBall``, ``Sphere``, ``Stiefel(canonical=False)``, subclasses and the
            exact variants of the middle two), or a description: ``"sphere"``, ``("lorentz", 1.0)``.

    Raises:
        ValueError: a manifold not known here, a constant that is not positive, or one that is learned.
    """
    if isinstance(manifold, str):
        manifold = (manifold,)
    if isinstance(manifold, Sequence):
        return _checked(tuple(manifold))
    bases = [cls.__name__ for cls in type(manifold).__mro__ if cls.__module__.split(".")[0] == "geoopt"]
    name = next((_GEOOPT[base] for base in bases if base in _GEOOPT), None)
    if name is None or any(base in _OTHER_METRIC for base in bases):
        raise ValueError(
            f"manifold={manifold!r} has no step and transport here; expected geoopt's Lorentz, PoincareBall, Sphere or "
            f"Stiefel(canonical=False), or a name of {', '.join(_TABLE)} with its constant: leave the key out for "
            "parameters of Euclidean space"
        )
    if any(param.requires_grad for param in manifold.parameters()):
        raise ValueError(
            f"manifold={manifold!r} learns its curvature, which would move every point off it at every step; expected "
            "a constant (learnable=False): to learn one, give the layer a scale of its own"
        )
    if getattr(manifold, "projector", None) is not None:
        raise ValueError(f"manifold={manifold!r} is a subspace of a sphere; expected a whole one")
    constant = _TABLE[name][1]
    return _checked((name,) if constant is None else (name, float(getattr(manifold, constant))))


def find_manifold(description: Sequence[str | float]) -> Manifold:
    """Return the maths of a description."""
    return _built(tuple(description))


def same_manifold(one: Sequence[str | float] | None, other: Sequence[str | float] | None) -> bool:
    """Return whether two descriptions agree, constants up to the rounding of float32."""
    if one is None or other is None:
        return one is other
    constants = zip(one[1:], other[1:], strict=False)
    return (
        one[0] == other[0]
        and len(one) == len(other)
        and all(math.isclose(float(a), float(b), rel_tol=1e-6) for a, b in constants)
    )


@lru_cache(maxsize=64)
def _built(description: Description) -> Manifold:
    return _TABLE[str(description[0])][0](*description[1:])


_LARGEST_CONSTANT = 1e12
"""The largest k and c: beyond it, or below its inverse, products of coordinates leave the range of float32."""


def _checked(description: Description) -> Description:
    name = description[0] if description else None
    if name not in _TABLE:
        raise ValueError(f"manifold={description!r}; expected a name of {', '.join(_TABLE)}, with its constant")
    constant = _TABLE[str(name)][1]
    if len(description) != (1 if constant is None else 2):
        expected = f"({name!r},)" if constant is None else f"({name!r}, {constant})"
        raise ValueError(f"manifold={description!r}; expected {expected}")
    if constant is None:
        return description
    value = description[1]
    if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(
            f"manifold={description!r}: {constant}={value!r}; expected a number > 0: the curvature is "
            f"{'-1/k' if constant == 'k' else '-c'}, negative by itself"
        )
    if not 1 / _LARGEST_CONSTANT <= value <= _LARGEST_CONSTANT:
        raise ValueError(
            f"manifold={description!r}: {constant}={value!r}; expected a number from {1 / _LARGEST_CONSTANT:g} to "
            f"{_LARGEST_CONSTANT:g}, whose square float32 can hold"
        )
    return (str(name), float(value))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=1, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """f(h) / h where that tends to 1 at 0."""
    return torch.where(denominator > 0, numerator / denominator, 1.0)


def _shortened(a: Tensor, longest: float) -> Tensor:
    """Rows no longer than that; those that are not, bit for bit."""
    length = _norm(a)
    return torch.where(length > longest, a * (longest / length), a)


def _gyration(a: Tensor, b: Tensor, w: Tensor, c: float) -> Tensor:
    """gyr[a, b] w in the ball of curvature -c (Ungar): an orthogonal map, the identity where b = 0."""
    ab, aw, bw = _dot(a, b), _dot(a, w), _dot(b, w)
    aa, bb = _dot(a, a), _dot(b, b)
    along_a = c * (bw + 2 * c * ab * bw - c * aw * bb)
    along_b = -c * (aw + c * bw * aa)
    return w + 2 * (along_a * a + along_b * b) / (1 + 2 * c * ab + c * c * aa * bb)
