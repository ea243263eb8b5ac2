"""The factors of a spectral layer, W = sum_i sigma_i u_i v_i^T, as an optimizer sees them.

A row of every factor belongs to one triplet: ``u`` (k, out), ``sigma`` (k,), ``v`` (k, in), k = min(out, in). The first
r triplets are *active* (trained), the others *frozen* (only sigma is trained):

    u_active (r, out)   sigma_active (r,)   v_active (r, in)        u_frozen (k - r, out)   sigma_frozen   v_frozen

Sharded over rows, as FSDP2 does, a vector is whole on one rank and its sigma is on the same: normalising needs no
communication, and W is a sum over the ranks. Frozen vectors may be stored in 16 bits, or in 8 with a scale each
(``u_frozen_scale``, ``v_frozen_scale``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.collectives import put_rows, take_rows
from lowrank_train.optim.shards.layout import local, row_range
from lowrank_train.optim.storage.quantization import encode_rows

__all__ = ["FACTORS", "SCALES", "SpectralFactors", "decode", "encode", "factors_of"]

FACTORS = ("u_active", "v_active", "sigma_active", "u_frozen", "v_frozen", "sigma_frozen")
SCALES = ("u_frozen_scale", "v_frozen_scale")


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return vectors (n, d) in ``dtype``; the stored tensor itself if it has that type."""
    return stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype)


def encode(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes (n, d) and scales (n, 1) with which the decoded vectors are as long as these."""
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
        """Return a factor, sharded or not."""
        return self.slots[factor].param

    def vectors(self, factor: str, dtype: torch.dtype) -> Tensor:
        """Return this rank's rows of ``u_active`` ... ``v_frozen``."""
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
        """Return this rank's share (out, in) of W, which is the sum over the ranks."""
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
        """Return rows ``index`` of u, sigma, v of a segment; they are to be summed over the shards."""
        rows = []
        for kind in ("u", "sigma", "v"):
            factor = f"{kind}_{segment}"
            rows.append(take_rows(self.param(factor), self.vectors(factor, dtype), index))
        return rows

    def put(self, segment: str, index: Tensor, rows: list[Tensor]) -> None:
        """Write rows back: the reverse of ``take``."""
        for kind, values in zip(("u", "sigma", "v"), rows, strict=True):
            self.write(f"{kind}_{segment}", index, values)


def factors_of(slots: Iterable[Slot]) -> Iterator[SpectralFactors]:
    """Return the spectral layers among parameters, by their names. Raises ValueError if one lacks a factor."""
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
