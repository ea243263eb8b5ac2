"""Random directions, remembered by a seed alone.

    P (r, d) with entries N(0, 1/r)                     (APOLLO, arXiv 2412.05270; not orthonormal)
    P (r, d) with orthonormal rows: QR of a Gaussian    (FRUGAL's random projection, arXiv 2411.07837)

Drawn in CPU memory by torch's Mersenne Twister, so that CPU and GPU runs, and all ranks, see the same directions; the
released APOLLO code draws on the device of the gradient, and from the position of a parameter in its list.

Matrices with the same d and r that are refreshed at the same step share their directions, and the one copy made of them
(r d numbers per pair of sizes, kept between steps, not counted as state).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_train.optim.arguments.surroundings import tensors_hold_numbers
from lowrank_train.optim.low_rank.bases.base import Basis, BasisWorkspace, Directions, Moments
from lowrank_train.optim.low_rank.bases.dense import rotate, rotate_bytes
from lowrank_train.optim.low_rank.bases.directions import Vectors
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["RandomVectors"]


class RandomVectors(Basis):
    """Gaussian or orthonormal directions from a seed."""

    def __init__(self, *, orthonormal: bool) -> None:
        self.is_orthonormal = orthonormal

    def state_tensors(self, d: int, r: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return ``basis_seed``, in CPU memory."""
        return {"basis_seed": StateTensor((), torch.int64, "host")}

    def statistics_shape(self, d: int, r: int) -> tuple[int, ...]:
        """Return the shape of one number, which only tells whether there is a gradient."""
        return (1,)

    def statistics(self, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of squares."""
        return rows.square().sum().view(1)

    def choose(self, statistics: Tensor, d: int, r: int, seed: int) -> dict[str, Tensor]:
        """Return the next seed."""
        return {"basis_seed": torch.tensor(seed)}

    def directions(self, state: Mapping[str, Tensor], d: int, r: int, like: Tensor) -> Directions:
        """Return the vectors, drawn anew when the seed has changed."""
        key = (d, r, self.is_orthonormal, like.device, like.dtype)
        if not tensors_hold_numbers():
            return Vectors(_draw(0, *key))
        seed = int(state["basis_seed"])
        if _drawn.get(key, (None,))[0] != seed:
            _drawn[key] = seed, _draw(seed, *key)
        return Vectors(_drawn[key][1])

    def workspace(self, shape: MatrixShape, r: int) -> BasisWorkspace:
        """Return the squares of the gradient, the rotated moments, and the draw that is kept."""
        return BasisWorkspace(
            choice=shape.whole,
            transfer=rotate_bytes(shape, r),
            kept={("drawn", shape.d, r, self.is_orthonormal, shape.itemsize): shape.itemsize * shape.d * r},
        )

    def carry(
        self,
        moments: Moments,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        d: int,
        betas: tuple[float, float],
    ) -> Moments:
        """Rotate moments by the overlap of the two draws."""
        r = moments.age.numel()
        vectors = [self.directions(state, d, r, moments.exp_avg) for state in (old, new)]
        assert isinstance(vectors[0], Vectors)
        assert isinstance(vectors[1], Vectors)
        return rotate(moments, vectors[0].vectors @ vectors[1].vectors.mT, betas)


def _draw(seed: int, d: int, r: int, orthonormal: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(d, r, generator=generator, dtype=torch.float64 if orthonormal else torch.float32)
    vectors = torch.linalg.qr(normal).Q if orthonormal else normal / r**0.5
    return vectors.mT.contiguous().to(device=device, dtype=dtype)


_drawn: dict[tuple[int, int, bool, torch.device, torch.dtype], tuple[int, Tensor]] = {}
"""The last draw of each kind, with its seed."""
