"""Choosing columns of a fixed orthonormal matrix: directions that cost r integers.

    S = G Q          e_k = sum over rows of S[:, k]^2   (l2)   or of |S[:, k]|   (l1)
    keep the r columns with the largest e_k;  g = G Q_r = S[:, kept]

    m rows, d columns of the gradient G (m, d); Q (d, d) orthonormal; r = rank.

Source: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models"
(arXiv 2505.17967), dynamic column selection. They use Q = DCT; any fixed orthonormal matrix will do.

The squared l2 norm minimises ||G - G Q_r Q_r^T||_F, and is our default; the released code defaults to l1.
Carrying moments to new columns is comparing indices: Q_old^T Q_new is a matrix of zeros and ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.low_rank.bases.base import Basis, BasisWorkspace, Directions, Moments
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["ColumnBasis", "FixedMatrix", "energy_", "index_layout", "match_bytes", "match_columns"]


_UNIT = 2.0**-16
"""Coordinates are multiplied by it before they are squared, which is exact: in float32 squares of 1e20 would be
infinite, and choose nothing. Gradients below 1e-18 count as 0 instead."""


def energy_(coordinates: Tensor, ranking: Literal["l1", "l2"]) -> Tensor:
    """Return the energy (d,) of columns from coordinates (b, d), which are overwritten; squares in units of 2^32."""
    return (coordinates.mul_(_UNIT).square_() if ranking == "l2" else coordinates.abs_()).sum(0)


class FixedMatrix(ABC):
    """A fixed orthonormal (d, d) matrix Q, whose columns are the candidates."""

    def objection(self, d: int) -> str | None:
        """Return why the matrix does not exist in this size; None if it does."""
        return None

    @abstractmethod
    def energies(self, rows: Tensor, ranking: Literal["l1", "l2"]) -> Tensor:
        """Sum over rows (m, d) of the squares (l2) or absolute values (l1) of every column of G Q, (d,).

        They are those of ``energy_``, in its unit.
        """

    @abstractmethod
    def columns(self, index: Tensor, d: int, like: Tensor) -> Directions:
        """Return the columns with these ascending indices, in the type and on the device of ``like``."""

    @abstractmethod
    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return what r columns need for one matrix, but for moments on their way to other columns."""


class ColumnBasis(Basis):
    """The r columns of a fixed matrix with the most energy, stored as sorted indices."""

    is_orthonormal = True

    def __init__(self, matrix: FixedMatrix, ranking: Literal["l1", "l2"] = "l2") -> None:
        self.matrix = matrix
        self.ranking: Literal["l1", "l2"] = ranking

    def objection(self, d: int, r: int) -> str | None:
        """Return the objection of the matrix."""
        return self.matrix.objection(d)

    def state_tensors(self, d: int, r: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return ``basis_index`` (r,) int32, ascending."""
        return index_layout(r)

    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of one energy per column."""
        return (d,)

    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the energy of every column of G Q, (d,)."""
        return self.matrix.energies(rows, self.ranking)

    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Choose the indices of the r largest energies; among equals the lower index, so that every rank agrees."""
        order = torch.sort(statistics, descending=True, stable=True).indices
        return {"basis_index": order[:r].sort().values.to(torch.int32)}

    def directions(self, state: Mapping[str, Tensor], d: int, r: int, like: Tensor) -> Directions:
        """Return the chosen columns."""
        return self.matrix.columns(state["basis_index"], d, like)

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return what the matrix needs, and the rearranged moments."""
        return self.matrix.workspace(shape, r)._replace(transfer=match_bytes(shape, r))

    def carry(
        self,
        moments: Moments,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        d: int,
        betas: tuple[float, float],
    ) -> Moments:
        """Keep moments and age of a column that stays, and start a new column from nothing: exact."""
        return match_columns(moments, old["basis_index"], new["basis_index"])


def index_layout(r: int) -> dict[str, StateTensor]:
    """Return the state of a basis that is a selection of columns."""
    return {"basis_index": StateTensor((r,), torch.int32, "replicated")}


def match_columns(moments: Moments, old: Tensor, new: Tensor) -> Moments:
    """Rearrange columns of ``moments`` from indices ``old`` to indices ``new``, both ascending; 0 where not in old."""
    position = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    kept = old[position] == new

    def rearranged(value: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        return torch.where(kept, value.index_select(-1, position), zero)

    return Moments(*map(rearranged, moments))


def match_bytes(shape: MatrixShape, r: int) -> int:
    """Return the temporaries of ``match_columns``: both moments rearranged, and one of them before zeros come in."""
    return 3 * shape.itemsize * shape.rows * r
