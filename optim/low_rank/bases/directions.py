"""The two plain kinds of directions: any vectors, and unit vectors."""

from __future__ import annotations

from torch import Tensor

from lowrank_train.optim.low_rank.bases.base import Directions

__all__ = ["Columns", "Vectors"]


class Vectors(Directions):
    """Any vectors, one per row."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors  # (r, d)

    def project(self, rows: Tensor) -> Tensor:
        """Return G V^T."""
        return rows @ self.vectors.mT

    def lift(self, coordinates: Tensor) -> Tensor:
        """Return C V."""
        return coordinates @ self.vectors

    def add_lift_(self, rows: Tensor, coordinates: Tensor) -> None:
        """Add by one GEMM that accumulates into the rows, if they have its type."""
        if rows.dtype == coordinates.dtype:
            rows.addmm_(coordinates, self.vectors)
        else:
            rows.add_(coordinates @ self.vectors)


class Columns(Directions):
    """Unit vectors: a selection of columns, no arithmetic at all."""

    def __init__(self, index: Tensor, d: int) -> None:
        self.index = index.long()  # (r,) ascending
        self.d = d

    def project(self, rows: Tensor) -> Tensor:
        """Return the selected columns."""
        return rows.index_select(1, self.index)

    def lift(self, coordinates: Tensor) -> Tensor:
        """Return the coordinates in their columns, zeros elsewhere."""
        rows = coordinates.new_zeros(coordinates.shape[0], self.d)
        return rows.index_copy_(1, self.index, coordinates)

    def add_lift_(self, rows: Tensor, coordinates: Tensor) -> None:
        """Add to the selected columns only."""
        if rows.dtype == coordinates.dtype:
            rows.index_add_(1, self.index, coordinates)
        else:
            rows.index_copy_(1, self.index, (rows.index_select(1, self.index) + coordinates).to(rows.dtype))
