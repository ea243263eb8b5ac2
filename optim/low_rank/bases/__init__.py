"""Bases by name: how the directions of a low-rank method are chosen. A literal table, like that of the optimizers."""

from __future__ import annotations

from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.low_rank.bases.base import Basis, Directions, Moments
from lowrank_train.optim.low_rank.bases.columns import ColumnBasis
from lowrank_train.optim.low_rank.bases.dct import DCT, dct_matrix
from lowrank_train.optim.low_rank.bases.hadamard import Hadamard, hadamard_matrix
from lowrank_train.optim.low_rank.bases.identity import Identity, RandomColumns
from lowrank_train.optim.low_rank.bases.random import RandomVectors
from lowrank_train.optim.low_rank.bases.svd import ExactSVD, SubspaceIteration

__all__ = ["BASES", "Basis", "Directions", "Moments", "dct_matrix", "find_basis", "hadamard_matrix"]

BASES: dict[str, Basis] = {
    "dct": ColumnBasis(DCT()),
    "dct_l1": ColumnBasis(DCT(), ranking="l1"),
    "gaussian": RandomVectors(orthonormal=False),
    "hadamard": ColumnBasis(Hadamard()),
    "identity": ColumnBasis(Identity()),
    "power": SubspaceIteration(warm_rounds=1),
    "random": RandomVectors(orthonormal=True),
    "random_columns": RandomColumns(),
    "subspace": SubspaceIteration(warm_rounds=2),
    "svd": ExactSVD(),
}


def find_basis(name: str) -> Basis:
    """Return the basis of a name. Raises ValueError with the nearest names for an unknown one."""
    if name not in BASES:
        raise ValueError(f"basis={name!r}; {suggestion(str(name), BASES)}")
    return BASES[name]
