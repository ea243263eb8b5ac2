"""The contract of a basis: which r directions of the projected dimension a low-rank method keeps.

A basis object holds no tensors; its state lives in the optimizer's state, under the names of ``state_tensors``.
It always acts on the *last* dimension (the optimizer transposes) and never communicates: statistics are sums over
rows, so the optimizer can add those of several shards before ``choose`` sees them.

Shapes: m rows (unprojected, perhaps one rank's share of them), d columns (projected, whole), r = rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from optim.sharding import StateTensor

__all__ = ["Basis"]


class Basis(ABC):
    """r directions in R^d, chosen from statistics of the gradient."""

    is_orthonormal: bool
    """Whether project(lift(c)) = c, so that lift(project(G)) is the nearest matrix with rows in the span."""

    @abstractmethod
    def state_tensors(self, d: int, r: int) -> dict[str, StateTensor]:
        """The tensors stored for one matrix; their bytes are what memory prediction counts."""

    @abstractmethod
    def statistics(self, gradient: Tensor) -> Tensor:
        """What ``choose`` needs of a gradient (m, d): a tensor that is a sum over rows, zero for a zero gradient."""

    @abstractmethod
    def choose(self, statistics: Tensor, r: int) -> dict[str, Tensor]:
        """New directions from summed statistics: values for every name of ``state_tensors``."""

    @abstractmethod
    def project(self, gradient: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Coordinates (m, r) of the rows of a gradient (m, d)."""

    @abstractmethod
    def lift(self, coordinates: Tensor, state: Mapping[str, Tensor], d: int) -> Tensor:
        """Rows (m, d) with the given coordinates (m, r)."""

    @abstractmethod
    def transport(self, moments: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
        """Moments (..., r) of the old directions carried to the new ones; columns without a past become 0."""
