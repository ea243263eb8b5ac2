"""Singular vectors of the gradient, exact or by subspace iteration.

    exact       A = G^T G (d, d) in float64;   Q_r = the r leading eigenvectors of A
    iterated    Y = G^T (G Q);   Q = QR(Y), a few times, from the old directions (warm) or a random start (cold)

A and Y are sums over rows, so a sharded gradient is never gathered. Eigenvectors are unique up to sign only, and in
float32 those of a Gram matrix are not accurate enough: one rank decides, in float64, and the others are told.

Sources: Zhao et al., GaLore (arXiv 2403.03507), Algorithm 2; Halko et al. (arXiv 0909.4061), Algorithm 4.4 and
Vogels et al., PowerSGD (arXiv 1905.13727), for the iteration from the last result.

We differ from GaLore's code: no SVD of the gradient itself (1.1 s for 2048 x 2048 on two cores, where a warm round
costs 0.06 s); signs are fixed (largest entry, or QR diagonal, positive), so moments that are kept meet the same sign.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_train.optim.linalg import SOLVER, gram, leading_eigenvectors, orthonormal_columns
from lowrank_train.optim.low_rank.bases.base import Basis, BasisWorkspace, Directions, Moments
from lowrank_train.optim.low_rank.bases.dense import rotate, rotate_bytes
from lowrank_train.optim.low_rank.bases.directions import Vectors
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["ExactSVD", "SubspaceIteration"]


class _StoredVectors(Basis):
    """Orthonormal vectors that one rank decides and every rank stores."""

    is_orthonormal = True
    owner_computed = True

    def state_tensors(self, d: int, r: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return ``basis`` (r, d), in the parameter's dtype."""
        return {"basis": StateTensor((r, d), dtype, "replicated")}

    def directions(self, state: Mapping[str, Tensor], d: int, r: int, like: Tensor) -> Directions:
        """Return the stored vectors."""
        return Vectors(state["basis"].to(like.dtype))

    def carry(
        self,
        moments: Moments,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        d: int,
        betas: tuple[float, float],
    ) -> Moments:
        """Rotate the moments by the overlap of the two bases."""
        dtype = moments.exp_avg.dtype
        return rotate(moments, old["basis"].to(dtype) @ new["basis"].to(dtype).mT, betas)


class ExactSVD(_StoredVectors):
    """The r leading right singular vectors."""

    statistics_dtype = torch.float64

    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of the Gram matrix."""
        return (d, d)

    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return G^T G in float64."""
        return gram(rows)

    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Return the leading eigenvectors."""
        return {"basis": leading_eigenvectors(statistics, r)}

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return, in float64, the Gram matrix, eigenvectors twice, the solver's own and r signed vectors."""
        choice = 8 * ((3 + SOLVER) * shape.d**2 + r * shape.d)
        return BasisWorkspace(choice=choice, proposal=shape.itemsize * r * shape.d, transfer=rotate_bytes(shape, r))


class SubspaceIteration(_StoredVectors):
    """Nearly the leading singular vectors, for the price of a few products."""

    def __init__(self, warm_rounds: int, cold_rounds: int = 6) -> None:
        self.warm_rounds = warm_rounds
        self.cold_rounds = cold_rounds

    def rounds(self, step: int) -> int:
        """Return more rounds from a random start than from the last basis."""
        return self.warm_rounds if step else self.cold_rounds

    def start(self, d: int, r: int, like: Tensor, seed: int) -> dict[str, Tensor]:
        """Return a Gaussian matrix, the same on all ranks and devices."""
        normal = torch.randn(r, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return {"basis": normal.to(device=like.device, dtype=like.dtype)}

    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of Y^T."""
        return (r, d)

    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return Y^T = (G Q)^T G."""
        return (rows @ state["basis"].to(rows.dtype).mT).mT @ rows

    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Return Y, orthonormalised."""
        return {"basis": orthonormal_columns(statistics.mT).mT.contiguous()}

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return G Q; Y, Q and R, signs and their product, contiguous; the solver's own.

        The vectors of this round and of the last wait until all matrices have theirs.
        """
        vectors = r * shape.d
        return BasisWorkspace(
            choice=shape.itemsize * (shape.rows * r + (4 + SOLVER) * vectors + r * r),
            proposal=2 * shape.itemsize * vectors,
            transfer=rotate_bytes(shape, r),
        )
