"""The identity: directions are columns of the gradient itself, and project is a selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.low_rank.bases.base import Basis, BasisWorkspace, Directions, Moments
from lowrank_train.optim.low_rank.bases.columns import FixedMatrix, energy_, index_layout, match_bytes, match_columns
from lowrank_train.optim.low_rank.bases.directions import Columns
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["Identity", "RandomColumns"]


class Identity(FixedMatrix):
    """Q = I: no transform; on small models it captured as much gradient energy as the DCT (docs)."""

    def energies(self, rows: Tensor, ranking: Literal["l1", "l2"]) -> Tensor:
        """Return the energies of the columns as they are."""
        return energy_(rows.clone(), ranking)

    def columns(self, index: Tensor, d: int, like: Tensor) -> Directions:
        """Return a selection of columns."""
        return Columns(index, d)

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return a copy of the gradient, to choose from."""
        return BasisWorkspace(choice=shape.whole)


class RandomColumns(Basis):
    """r columns drawn without replacement from a seed: what FRUGAL calls column-wise splitting (arXiv 2411.07837)."""

    is_orthonormal = True

    def state_tensors(self, d: int, r: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return ``basis_index`` (r,) int32, ascending."""
        return index_layout(r)

    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of one number, which only tells whether there is a gradient."""
        return (1,)

    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of squares."""
        return rows.square().sum().view(1)

    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Draw columns in CPU memory, so that every device and rank gets the same columns."""
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(d, generator=generator)[:r].sort().values
        return {"basis_index": index.to(device=statistics.device, dtype=torch.int32)}

    def directions(self, state: Mapping[str, Tensor], d: int, r: int, like: Tensor) -> Directions:
        """Return a selection of columns."""
        return Columns(state["basis_index"], d)

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return the squares of the gradient, and the rearranged moments."""
        return BasisWorkspace(choice=shape.whole, transfer=match_bytes(shape, r))

    def carry(
        self,
        moments: Moments,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        d: int,
        betas: tuple[float, float],
    ) -> Moments:
        """Match moments by index."""
        return match_columns(moments, old["basis_index"], new["basis_index"])
