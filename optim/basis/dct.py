"""Columns of the discrete cosine transform: a basis that costs r integers.

    q_k[i] = c_k cos(pi k (2 i + 1) / (2 d)),  c_0 = sqrt(1/d), c_k = sqrt(2/d),   k, i = 0 .. d-1   (DCT-II)
    S = G Q          e_k = sum over rows of S[:, k]^2          keep the r columns with the largest e_k

    m rows, d columns of the gradient G (m, d); Q (d, d) orthonormal with columns q_k; r = rank.

Source: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models"
(arXiv 2505.17967), dynamic column selection.

We differ:
  * columns are ranked by squared l2 norm, which minimises ||G - G Q_r Q_r^T||_F; the released code
    defaults to l1;
  * the vectors are those of DCT-II, the transform that the paper's FFT path computes; the released matrix path
    projects on DCT-III instead, so its two paths are two different optimizers;
  * moments follow their column by comparing indices, exactly, where the released code multiplies by Q_old^T Q_new
    (the same 0/1 matrix up to rounding), off by default;
  * Q is built from integer angles reduced modulo 4d in float64: in float32 the angles themselves are off by 1e-3 at
    d = 4096.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from optim.basis.base import Basis
from optim.sharding import StateTensor

__all__ = ["DCTBasis", "dct_matrix"]


def dct_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal DCT-II vectors as rows, (d, d): row k is q_k, so a selection of columns of Q is contiguous.

    Kept for the next call, except under ``FakeTensorMode``: fake and real tensors must not meet.
    """
    build = _build_dct_matrix if detect_fake_mode() is not None else _cached_dct_matrix
    return build(d, device, dtype)


def _build_dct_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    k = torch.arange(d, device=device).unsqueeze(1)
    i = torch.arange(d, device=device).unsqueeze(0)
    angle = (k * (2 * i + 1)) % (4 * d)
    rows = torch.cos(angle.double() * (math.pi / (2 * d))) * math.sqrt(2 / d)
    rows[0] *= math.sqrt(0.5)
    return rows.to(dtype)


_cached_dct_matrix = lru_cache(maxsize=16)(_build_dct_matrix)


class DCTBasis(Basis):
    """r columns of the DCT-II matrix, stored as sorted indices."""

    is_orthonormal = True

    def state_tensors(self, d: int, r: int) -> dict[str, StateTensor]:
        """``basis_index`` (r,) int32, ascending."""
        return {"basis_index": StateTensor((r,), torch.int32, "replicated")}

    def statistics(self, gradient: Tensor) -> Tensor:
        """Energy of every column of G Q, (d,)."""
        return (gradient @ dct_matrix(gradient.shape[-1], gradient.device, gradient.dtype).mT).square_().sum(dim=-2)

    def choose(self, statistics: Tensor, r: int) -> dict[str, Tensor]:
        """Indices of the r largest energies; among equals the lower frequency, so that every rank agrees."""
        order = torch.sort(statistics, descending=True, stable=True).indices
        return {"basis_index": order[:r].sort().values.to(torch.int32)}

    def project(self, gradient: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """G Q_r."""
        return gradient @ self._vectors(gradient, gradient.shape[-1], state).mT

    def lift(self, coordinates: Tensor, state: Mapping[str, Tensor], d: int) -> Tensor:
        """C Q_r^T."""
        return coordinates @ self._vectors(coordinates, d, state)

    def transport(self, moments: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
        """Column j of the result is the old column with the same index, or 0: Q_old^T Q_new without the matmul."""
        old_index, new_index = old["basis_index"], new["basis_index"]
        position = torch.searchsorted(old_index, new_index).clamp_(max=old_index.numel() - 1)
        kept = old_index[position] == new_index
        return torch.where(kept, moments[..., position], torch.zeros((), dtype=moments.dtype, device=moments.device))

    @staticmethod
    def _vectors(like: Tensor, d: int, state: Mapping[str, Tensor]) -> Tensor:
        """The chosen vectors as rows, (r, d)."""
        return dct_matrix(d, like.device, like.dtype)[state["basis_index"]]
