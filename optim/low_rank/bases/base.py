"""The contract of a basis: which r directions of the projected dimension a low-rank method keeps.

A basis object holds no tensors; its state lives in the optimizer's state, under the names of ``state_tensors``.
It always acts on the *last* dimension (the optimizer transposes) and never communicates: statistics are sums over
rows, so the optimizer can add those of several shards before ``choose`` sees them.

Shapes: m rows (unprojected, perhaps one rank's share or a block of them), d columns (projected, whole), r = rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import Kept, MatrixShape

__all__ = ["Basis", "BasisWorkspace", "Directions", "Moments"]


class Directions(ABC):
    """r vectors of R^d made ready for one step of one matrix."""

    @abstractmethod
    def project(self, rows: Tensor) -> Tensor:
        """Return the projected gradient (m, r) of rows (m, d)."""

    @abstractmethod
    def lift(self, coordinates: Tensor) -> Tensor:
        """Project (m, r) back to rows (m, d)."""

    @abstractmethod
    def add_lift_(self, rows: Tensor, coordinates: Tensor) -> None:
        """Add ``lift(coordinates)`` to rows in the cheapest way; rows may be any strided view, of any dtype."""


class Moments(NamedTuple):
    """Adam's state of the coordinates."""

    exp_avg: Tensor  # (m, r)
    exp_avg_sq: Tensor  # (m, r)
    age: Tensor  # (r,) int32, updates each column has seen


class BasisWorkspace(NamedTuple):
    """Bytes that a basis needs for one matrix, beyond its state."""

    vectors: int = 0
    """Basis vectors, ready for a step."""
    block: int = 0
    """Temporaries of projecting a block of rows and of projecting back."""
    choice: int = 0
    """Temporaries of choosing the basis of this matrix."""
    proposal: int = 0
    """What was chosen, until all matrices have theirs."""
    transfer: int = 0
    """Moments on their way to the new basis."""
    kept: Kept = MappingProxyType({})
    """Between steps, and not in the state."""


class Basis(ABC):
    """r directions in R^d, chosen from statistics of the gradient."""

    is_orthonormal: bool
    """Whether project(lift(c)) = c, so that lift(project(G)) is the nearest matrix with rows in the span."""

    owner_computed = False
    """Whether ``choose`` is costly, or not unique to the last bit, so that one rank must decide for all."""

    statistics_dtype = torch.float32
    """At least; statistics of wider gradients are as wide."""

    def objection(self, d: int, r: int) -> str | None:
        """Return why this basis does not exist in these sizes; None if it does."""
        return None

    def rounds(self, step: int) -> int:
        """Return how many times statistics and choice alternate when a basis is chosen after ``step`` updates."""
        return 1

    def start(self, d: int, r: int, like: Tensor, seed: int) -> dict[str, Tensor]:
        """Return what the very first statistics are given for ``state``, if they need something."""
        return {}

    @abstractmethod
    def state_tensors(self, d: int, r: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return the tensors stored for one matrix; their bytes are what memory prediction counts."""

    @abstractmethod
    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of ``statistics``: what has to be summed over the ranks."""

    @abstractmethod
    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return what ``choose`` needs of rows (m, d): a tensor that is a sum over rows, zero for zero rows.

        ``state`` holds the directions so far, or what ``start`` returned before the first choice.
        """

    @abstractmethod
    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Return a new basis from summed statistics: values for every name of ``state_tensors``.

        ``seed`` differs from one refresh to the next and is equal on all ranks. May raise ``torch.linalg.LinAlgError``.
        """

    @abstractmethod
    def directions(self, state: Mapping[str, Tensor], d: int, r: int, like: Tensor) -> Directions:
        """Return the stored basis vectors, on the device and in the floating-point type of ``like``."""

    @abstractmethod
    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return what this basis needs at rank r for one matrix."""

    @abstractmethod
    def carry(
        self,
        moments: Moments,  # in floating point, at least float32
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        d: int,
        betas: tuple[float, float],
    ) -> Moments:
        """Return moments of the old basis expressed in the new one (``moments="rotate"``)."""
