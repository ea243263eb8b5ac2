"""The Hadamard matrix: entries +-1/sqrt(d), the cheapest matrix that mixes all columns.

Sylvester: H_2n = [[H_n, H_n], [H_n, -H_n]].
Paley I, for a prime p = 3 mod 4: H_{p+1} = I + S with S = [[0, 1^T], [-1, J]], J_ij = (i - j | p), Legendre's symbol.

So d = 2^k and d = 2^k (p + 1) exist here: 768 = 64 x 12, 1280 = 64 x 20, 5120 = 256 x 20 among model widths.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.arguments.surroundings import kept
from lowrank_train.optim.low_rank.bases.base import BasisWorkspace, Directions
from lowrank_train.optim.low_rank.bases.columns import FixedMatrix, energy_
from lowrank_train.optim.low_rank.bases.directions import Vectors
from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["Hadamard", "hadamard_matrix"]


class Hadamard(FixedMatrix):
    """Q = H / sqrt(d)."""

    def objection(self, d: int) -> str | None:
        """Return an objection where neither construction applies."""
        if _paley_prime(d) is not None:
            return None
        return (
            f"a Hadamard matrix of size {d} is not known here; expected a power of two, or that times p + 1 for a "
            "prime p = 3 mod 4 (768, 1280, 2048, 5120, ...): use basis='dct', which exists in every size"
        )

    def energies(self, rows: Tensor, ranking: Literal["l1", "l2"]) -> Tensor:
        """Return the energies, computed block by block, so that G Q never exists whole."""
        d = rows.shape[-1]
        matrix = hadamard_matrix(d, rows.device, rows.dtype)
        total = rows.new_zeros(d)
        for block in row_blocks(rows.shape[0], d, rows.device):
            coordinates = rows[block] @ matrix.mT
            total += energy_(coordinates, ranking)
        return total

    def columns(self, index: Tensor, d: int, like: Tensor) -> Directions:
        """Return the columns as vectors."""
        return Vectors(hadamard_matrix(d, like.device, like.dtype)[index])

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return a matrix that is kept and r rows of it; to choose, a projected block, or the matrix in the making."""
        d = shape.d
        made = 18 * d * d  # float64: a quarter of the matrix, its two halves, and the matrix
        return BasisWorkspace(
            vectors=shape.itemsize * r * d,
            choice=max(made, shape.block),
            kept={("hadamard_matrix", d, shape.itemsize): shape.itemsize * d * d},
        )


@kept
def hadamard_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the orthonormal matrix, candidates as rows (d, d); it is kept for the next call."""
    prime = _paley_prime(d)
    assert prime is not None
    matrix = _paley(prime) if prime else torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / d**0.5).to(device=device, dtype=dtype)


def _paley_prime(d: int) -> int | None:
    """The smallest prime p with d = 2^k (p + 1), 0 for a power of two, None if there is none."""
    odd = d
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 0
    size = 4 * odd
    while d % size == 0:
        if all((size - 1) % divisor for divisor in range(2, int(size**0.5) + 1)):
            return size - 1
        size *= 2
    return None


def _paley(p: int) -> Tensor:
    residues = {i * i % p for i in range(1, p)}
    legendre = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, p)], dtype=torch.float64)
    i = torch.arange(p)
    skew = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = legendre[(i.unsqueeze(1) - i) % p]
    return skew + torch.eye(p + 1, dtype=torch.float64)
