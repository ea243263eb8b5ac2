"""The discrete cosine transform, as a matrix product and as a fast Fourier transform.

    q_k[i] = c_k cos(pi k (2 i + 1) / (2 d)),  c_0 = sqrt(1/d), c_k = sqrt(2/d),   k, i = 0 .. d-1   (DCT-II)

Makhoul's N-point algorithm, for a row x (d,):
    v = (x_0, x_2, x_4, ..., x_5, x_3, x_1);   F = FFT(v);   <x, q_k> = c_k Re(exp(-i pi k / 2d) F_k)
F_{d-k} = conj(F_k), so half of the spectrum suffices. Lifting is the adjoint: the same steps, transposed, backwards.

Sources: Modoranu et al. (arXiv 2505.17967); Makhoul, "A fast cosine transform in one and two dimensions", 1980.

Both ways give the same numbers up to rounding. The Fourier way costs O(d log d) a row whatever the rank, the matrix way
O(d r): on CPUs the former is several times faster from about r = 100; a GPU's matrix units make it pointless.

We differ:
  * both paths project on DCT-II; the released matrix path projects on DCT-III, so its two paths are two optimizers;
  * 16-bit gradients are transformed in float32, where the released FFT path stops with an error;
  * Q is built from integer angles reduced modulo 4d in float64: in float32 the angles themselves are off by 1e-3 at
    d = 4096.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.arguments.surroundings import kept
from lowrank_train.optim.low_rank.bases.base import BasisWorkspace, Directions
from lowrank_train.optim.low_rank.bases.columns import FixedMatrix, energy_
from lowrank_train.optim.low_rank.bases.directions import Vectors
from lowrank_train.optim.shards.blocks import add_rows_, contiguous_rows, row_blocks
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["DCT", "FourierColumns", "dct_matrix"]

_FFT_MIN_RANK = 96
"""Where the two paths cross on a CPU: measured 10 ms (FFT) against 52 r/512 ms (GEMM) for 5504 x 2048, two cores."""


@kept
def dct_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the orthonormal DCT-II vectors as rows, (d, d): row k is q_k, so a selection of columns of Q is
    contiguous.

    The result is kept for the next call.
    """
    k = torch.arange(d, device=device).unsqueeze(1)
    i = torch.arange(d, device=device).unsqueeze(0)
    angle = (k * (2 * i + 1)) % (4 * d)
    rows = torch.cos(angle.double() * (math.pi / (2 * d))) * math.sqrt(2 / d)
    rows[0] *= math.sqrt(0.5)
    return rows.to(dtype)


class DCT(FixedMatrix):
    """DCT-II; ``path`` is for tests and measurements, None picks the faster one."""

    def __init__(self, path: Literal["matmul", "fft"] | None = None) -> None:
        self.path = path

    def energies(self, rows: Tensor, ranking: Literal["l1", "l2"]) -> Tensor:
        """Return the energies, computed block by block, so that G Q never exists whole."""
        d = rows.shape[-1]
        columns = self.columns(torch.arange(d, device=rows.device), d, rows)
        total = rows.new_zeros(d)
        for block in row_blocks(rows.shape[0], d, rows.device):
            coordinates = columns.project(rows[block])
            total += energy_(coordinates, ranking)
        return total

    def columns(self, index: Tensor, d: int, like: Tensor) -> Directions:
        """Return the columns: by FFT on a CPU unless there are few of them."""
        if self._by_fft(index.numel(), on_cpu=like.device.type == "cpu"):
            return FourierColumns(index, d, like)
        return Vectors(dct_matrix(d, like.device, like.dtype)[index])

    def _by_fft(self, count: int, *, on_cpu: bool) -> bool:
        return self.path == "fft" or (self.path is None and on_cpu and count >= _FFT_MIN_RANK)

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return the needs of the path: a matrix that is kept and r rows of it, or copies of a block of rows.

        To choose, the energies of all columns need the same once more; the matrix is made in float64.
        """
        d, matrix = shape.d, shape.itemsize * shape.d**2
        choice = 4 * shape.block  # permuted, spectrum, its two parts
        if not self._by_fft(d, on_cpu=shape.on_cpu):
            angles = 3 * 8 * d * d  # and the next two of the chain of operations
            choice = max(angles, matrix + shape.block)
        if self._by_fft(r, on_cpu=shape.on_cpu):
            return BasisWorkspace(block=3 * shape.block, choice=choice)  # permuted, spectrum; projected back, permuted
        return BasisWorkspace(
            vectors=shape.itemsize * r * d, choice=choice, kept={("dct_matrix", d, shape.itemsize): matrix}
        )


class FourierColumns(Directions):
    """Columns of the DCT by Makhoul's algorithm: no matrix, time independent of their number."""

    def __init__(self, index: Tensor, d: int, like: Tensor) -> None:
        self.d = d
        self.order, self.inverse_order = _permutations(d, like.device)
        self.low = int((index <= d // 2).sum())  # a host read, harmless on CPU
        index = index.long()
        scale = torch.full_like(index, math.sqrt(2 / d), dtype=torch.float64).masked_fill_(index == 0, math.sqrt(1 / d))
        angle = index.double() * (math.pi / (2 * d))
        # <x, q_k> = cosine Re F_j + sine Im F_j with j = k, or j = d - k where F_k = conj(F_j)
        j = torch.minimum(index, d - index)
        cosine = scale * angle.cos()
        sine = torch.where(index <= d // 2, 1.0, -1.0) * scale * angle.sin()
        self.real, self.imaginary = 2 * j, 2 * j + 1  # in the flattened (real, imaginary) pairs of the half spectrum
        # irfft(norm="forward") counts every frequency but 0 and d/2 twice
        counted_once = (j == 0) | (2 * j == d)
        fold = torch.where(counted_once, 1.0, 0.5).double()
        self.cosine, self.sine = cosine.to(like.dtype), sine.to(like.dtype)
        self.folded_cosine, self.folded_sine = (fold * cosine).to(like.dtype), (fold * sine).to(like.dtype)

    def project(self, rows: Tensor) -> Tensor:
        """Permute, transform, and combine the two parts of the frequencies that are needed."""
        spectrum = torch.view_as_real(torch.fft.rfft(contiguous_rows(rows).index_select(1, self.order))).flatten(1)
        return (
            spectrum.index_select(1, self.real)
            .mul_(self.cosine)
            .addcmul_(spectrum.index_select(1, self.imaginary), self.sine)
        )

    def lift(self, coordinates: Tensor) -> Tensor:
        """Apply the adjoint of ``project``, its steps in reverse."""
        count, low = coordinates.shape[0], self.low
        spectrum = coordinates.new_zeros(count, 2 * (self.d // 2 + 1))
        for place, weight in ((self.real, self.folded_cosine), (self.imaginary, self.folded_sine)):
            part = coordinates * weight
            # frequency j serves the columns k = j and k = d - j: no two of the low ones share it, nor of the high ones
            spectrum.index_copy_(1, place[:low], part[:, :low])
            spectrum.index_add_(1, place[low:], part[:, low:])
        halves = torch.view_as_complex(spectrum.view(count, -1, 2))
        return torch.fft.irfft(halves, n=self.d, norm="forward").index_select(1, self.inverse_order)

    def add_lift_(self, rows: Tensor, coordinates: Tensor) -> None:
        """Project back, then add."""
        add_rows_(rows, self.lift(coordinates))


def _permutations(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Evens ascending then odds descending, and the inverse."""
    order = torch.cat([torch.arange(0, d, 2, device=device), torch.arange(1, d, 2, device=device).flip(0)])
    return order, torch.argsort(order)
