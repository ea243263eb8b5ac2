"""The factors of a spectral layer, W = sum_i sigma_i u_i v_i^T, as an optimizer sees them.

A row of every factor belongs to one triplet: ``u`` (k, out), ``sigma`` (k,), ``v`` (k, in), k = min(out, in). The first
r triplets are *active* (trained), the others *frozen* (only sigma is trained):

    u_active (r, out)   sigma_active (r,)   v_active (r, in)        u_frozen (k - r, out)   sigma_frozen   v_frozen

Sharded over rows, as FSDP2 does, a vector is whole on one rank and its sigma is on the same: normalising needs no
communication, and W is a sum over the ranks. Frozen vectors may be stored in 16 bits, or in 8 with a scale each
(``u_frozen_scale``, ``v_frozen_scale``).

    decompose:  A = W W^T (on the smaller side) = P L P^T in float64;  B = W^T P;  sigma_i = |b_i|;  v_i = b_i / sigma_i

eigh of the Gram matrix is 40 times faster than an SVD of a wide matrix. v loses orthogonality as eps (sigma_1 /
sigma_i)^2, so where that matters B = Q R, and the SVD of the small R, which is nearly diagonal, turns Q and P.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.optim.core.optimizer import Slot
from lowrank_train.optim.shards.collectives import put_rows, take_rows
from lowrank_train.optim.shards.layout import local, row_range
from lowrank_train.optim.storage.quantization import encode_rows

__all__ = ["FACTORS", "SCALES", "SpectralFactors", "decode", "decompose", "encode", "factors_of", "singular_values"]

FACTORS = ("u_active", "v_active", "sigma_active", "u_frozen", "v_frozen", "sigma_frozen")
SCALES = ("u_frozen_scale", "v_frozen_scale")

_WORST_RATIO = 1e-4
"""Smallest sigma_i / sigma_1 for which v_i = b_i / sigma_i are orthogonal to 1e-7: many such errors add up."""


def decompose(weight: Tensor) -> dict[str, Tensor]:
    """Singular value decomposition of (out, in): ``u`` (k, out), ``sigma`` (k,) falling, ``v`` (k, in), in float64.

    The largest entry of each u_i is positive. Raises ValueError for numbers that are not finite, or if neither this way
    nor LAPACK's own SVD on the CPU converges.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite")
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    try:
        vectors, sigma, other = _by_gram_matrix(wide)
    except LinAlgError:
        try:
            left, sigma, right = (part.to(weight.device) for part in torch.linalg.svd(wide.cpu(), full_matrices=False))
        except LinAlgError as error:
            raise ValueError(f"its singular value decomposition does not converge: {error}") from None
        vectors, other = left, right.mT
    order = sigma.argsort(descending=True, stable=True)
    narrow, long = vectors.mT[order], other.mT[order]
    u, v = (narrow, long) if weight.shape[0] <= weight.shape[1] else (long, narrow)
    sigma = sigma[order]
    signs = _signs(u)
    # Where sigma is 0, nothing ties the sign of v to that of u, and rounding must not choose it.
    nothing = (sigma <= 16 * torch.finfo(sigma.dtype).eps * sigma[0]).unsqueeze(1)
    return {"u": u * signs, "sigma": sigma, "v": v * torch.where(nothing, _signs(v), signs)}


def singular_values(weight: Tensor) -> Tensor:
    """(k,) float64, falling: roots of the eigenvalues of the Gram matrix, exact to 1e-8 of the largest.

    Raises ValueError as ``decompose`` does.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite")
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    try:
        return torch.linalg.eigvalsh(wide @ wide.mT).clamp_(min=0).sqrt_().flip(0)
    except LinAlgError:
        return decompose(weight)["sigma"]


def _by_gram_matrix(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P (s, s), sigma (s,) and V (l, s) of a matrix (s, l), s <= l, with a vector per column, in any order."""
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)
    image = wide.mT @ vectors
    sigma = torch.linalg.vector_norm(image, dim=0)
    if sigma.min() > _WORST_RATIO * sigma.max():
        return vectors, sigma, image / sigma
    orthonormal, upper = torch.linalg.qr(image)
    left, sigma, right = torch.linalg.svd(upper)
    return vectors @ right.mT, sigma, orthonormal @ left


def _signs(vectors: Tensor) -> Tensor:
    """(n, 1), to make the largest entry of each vector positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Vectors (n, d) in ``dtype``; the stored tensor itself if it has that type."""
    return stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype)


def encode(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes (n, d) and scales (n, 1) with which the decoded vectors are as long as these."""
    codes, scale = encode_rows(vectors)
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    coded = torch.linalg.vector_norm(codes.to(vectors.dtype), dim=1, keepdim=True)
    return codes, torch.where(coded > 0, length / coded.clamp_min(1), scale)


@dataclass(frozen=True)
class SpectralFactors:
    """One layer: the slots of its factors by name, on this rank the rows of its shard."""

    name: str
    slots: dict[str, Slot]

    @property
    def rank(self) -> int:
        """r, the number of active triplets."""
        return self.slots["u_active"].param.shape[0]

    @property
    def count(self) -> int:
        """k, the number of triplets."""
        return self.rank + (self.slots["sigma_frozen"].param.shape[0] if "sigma_frozen" in self.slots else 0)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.slots["u_active"].param.shape[1], self.slots["v_active"].param.shape[1]

    @property
    def segments(self) -> tuple[str, ...]:
        """``active``, and ``frozen`` if there is anything to wait."""
        return ("active", "frozen") if "sigma_frozen" in self.slots else ("active",)

    def param(self, factor: str) -> Tensor:
        """A factor, sharded or not."""
        return self.slots[factor].param

    def vectors(self, factor: str, dtype: torch.dtype) -> Tensor:
        """This rank's rows of ``u_active`` ... ``v_frozen``."""
        scale = self.slots.get(f"{factor}_scale")
        return decode(local(self.param(factor)), None if scale is None else local(scale.param), dtype)

    def write(self, factor: str, index: Tensor, rows: Tensor) -> None:
        """Put whole rows in the places ``index`` (global) of a factor, where they are this rank's."""
        param = self.param(factor)
        if f"{factor}_scale" in self.slots:
            rows, scale = encode(rows)
            scale_param = self.param(f"{factor}_scale")
            put_rows(scale_param, local(scale_param), index, scale)
        put_rows(param, local(param), index, rows)

    def weight_part(self, dtype: torch.dtype) -> Tensor:
        """This rank's share (out, in) of W, which is the sum over the ranks."""
        out, width = self.shape
        total = torch.zeros(out, width, dtype=dtype, device=local(self.param("u_active")).device)
        for segment in self.segments:
            row_range(self.param(f"u_{segment}"))  # raises if vectors are cut
            sigma = local(self.param(f"sigma_{segment}")).to(dtype)
            u, v = self.vectors(f"u_{segment}", dtype), self.vectors(f"v_{segment}", dtype)
            total.addmm_(u.mT, v * sigma.unsqueeze(1))
        return total

    def replace(self, factors: dict[str, Tensor]) -> None:
        """Take whole new factors ``u``, ``sigma``, ``v`` (k rows): the first r become active."""
        start = 0
        for segment in self.segments:
            size = self.param(f"sigma_{segment}").shape[0]
            for kind in ("u", "sigma", "v"):
                self.write(f"{kind}_{segment}", torch.arange(size), factors[kind][start : start + size])
            start += size

    def take(self, segment: str, index: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Rows ``index`` of u, sigma, v of a segment; to be summed over the shards."""
        rows = []
        for kind in ("u", "sigma", "v"):
            factor = f"{kind}_{segment}"
            rows.append(take_rows(self.param(factor), self.vectors(factor, dtype), index))
        return rows

    def put(self, segment: str, index: Tensor, rows: list[Tensor]) -> None:
        """The reverse of ``take``."""
        for kind, values in zip(("u", "sigma", "v"), rows, strict=True):
            self.write(f"{kind}_{segment}", index, values)


def factors_of(slots: Iterable[Slot]) -> Iterator[SpectralFactors]:
    """The spectral layers among parameters, by their names. Raises ValueError if one lacks a factor."""
    layers: dict[str, dict[str, Slot]] = {}
    for slot in slots:
        layer, _, factor = slot.name.rpartition(".")
        if factor in FACTORS or factor in SCALES:
            layers.setdefault(layer, {})[factor] = slot
    for layer, found in layers.items():
        if not any(slot.group["role"] != "frozen" for slot in found.values()):
            continue  # the user has frozen all of it
        needed: tuple[str, ...] = FACTORS if any("frozen" in factor for factor in found) else FACTORS[:3]
        if "u_frozen" in found and not found["u_frozen"].param.is_floating_point():
            needed = (*FACTORS, *SCALES)
        missing = [factor for factor in needed if factor not in found]
        if missing:
            raise ValueError(
                f"the spectral layer {layer!r} came without its {missing[0]!r}; expected all of {', '.join(needed)}: "
                "pass optim.param_groups(model), or the model itself, whose frozen vectors take turns with the active"
            )
        yield SpectralFactors(layer, found)
