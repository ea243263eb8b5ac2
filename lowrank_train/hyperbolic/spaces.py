"""The space a network computes in: the Lorentz model, or the Euclidean twin it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lowrank_train.hyperbolic import lorentz

__all__ = ["SPACES", "Euclidean", "Lorentz", "Space"]


class Space(ABC):
    """Abstract: where points are, and what is measured of them.

    Args:
        curvature: k; Euclidean space has no use for it.
    """

    extra = 0
    """Coordinates a point has beside those of space."""

    def __init__(self, curvature: float) -> None:
        self.curvature = lorentz.check_curvature(curvature)

    @abstractmethod
    def enter(self, features: Tensor) -> Tensor:
        """Turn features (n, f) into points (n, f + extra)."""

    @abstractmethod
    def closeness(self, x: Tensor, y: Tensor) -> Tensor:
        """Return minus the squared distance that pairs are scored by; (..., width) twice -> (...)."""

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the length of the shortest path; (..., width) twice -> (...)."""

    @abstractmethod
    def error(self, x: Tensor) -> float:
        """Return how far the farthest point is from where points are, see ``lorentz.manifold_error``."""

    @abstractmethod
    def time_error(self, x: Tensor) -> float:
        """Return the same relative to the times, see ``lorentz.time_error``."""

    @abstractmethod
    def picture(self, x: Tensor) -> Tensor:
        """Return places (n, 2) that show the two directions in which the points (n, width) spread most."""


class Lorentz(Space):
    """Hyperbolic space of curvature -1/k; a point has a time beside its space."""

    extra = 1

    def enter(self, features: Tensor) -> Tensor:
        """Turn features into points by ``lorentz.lift``."""
        return lorentz.lift(features, self.curvature)

    def closeness(self, x: Tensor, y: Tensor) -> Tensor:
        """Return 2 k + 2 <x, y>."""
        return -lorentz.squared_distance(x, y, self.curvature)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the length of the geodesic."""
        return lorentz.distance(x, y, self.curvature)

    def error(self, x: Tensor) -> float:
        """Return the largest |<x, x> / k + 1|."""
        return lorentz.manifold_error(x, self.curvature)

    def time_error(self, x: Tensor) -> float:
        """Return the largest relative error of a time."""
        return lorentz.time_error(x, self.curvature)

    def picture(self, x: Tensor) -> Tensor:
        """Place the points in the Poincare disk, with the centroid of all points in the middle.

        The points are moved by the isometry that takes their centroid to the origin, and described by the velocities
        of the geodesics that lead to them; two principal components of these are velocities in the disk. Distances
        and directions from the middle are true but for what the other components hold.
        """
        k = self.curvature
        root = k**0.5
        points = x.detach().double()
        centre = lorentz.centroid(points.mean(0), k)
        # the boost along c that takes (t_c, s_c) to (sqrt(k), 0)
        along = centre[1:] / root
        product = -lorentz.inner(points, centre) / root  # time of the moved point
        moved = points[:, 1:] - along * ((points[:, :1] + product.unsqueeze(1)) / (1 + centre[0] / root))
        length = torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp_min(1e-12)
        velocity = moved / length * torch.asinh(length / root) * root
        flat = _principal(velocity)
        return lorentz.poincare(lorentz.lift(flat, k), k)


class Euclidean(Space):
    """Ordinary space."""

    def enter(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features

    def closeness(self, x: Tensor, y: Tensor) -> Tensor:
        """Return -|x - y|^2."""
        return -(x - y).square().sum(-1)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return |x - y|."""
        return torch.linalg.vector_norm(x - y, dim=-1)

    def error(self, x: Tensor) -> float:
        """Return 0, because every vector is a point; infinite if one is not finite."""
        return 0.0 if bool(torch.isfinite(x).all()) else float("inf")

    def time_error(self, x: Tensor) -> float:
        """Return 0, because there is no time."""
        return 0.0

    def picture(self, x: Tensor) -> Tensor:
        """Return the two principal components."""
        points = x.detach().double()
        return _principal(points - points.mean(0))


def _principal(vectors: Tensor) -> Tensor:
    """(n, d) -> (n, 2), coordinates along the two directions in which they are longest."""
    _, directions = torch.linalg.eigh(vectors.mT @ vectors)
    return vectors @ directions[:, -2:].flip(1)


SPACES: dict[str, type[Space]] = {"lorentz": Lorentz, "euclidean": Euclidean}
"""Value of ``model.geometry`` -> the space."""
