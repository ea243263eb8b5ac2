"""Bases a low-rank optimizer can project on."""

from optim.basis.base import Basis
from optim.basis.dct import DCTBasis, dct_matrix

__all__ = ["Basis", "DCTBasis", "dct_matrix"]
