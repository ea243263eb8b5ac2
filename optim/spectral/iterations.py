"""Iterations of SST: which triplets of a layer train now, and the exchange with those that trained before.

The schedule of a layer follows from its clock alone. Where an iteration begins, what is due is decomposed anew, the
drawn triplets change places with active ones that were not drawn, and moments are forgotten (``optim.methods.sst``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_train.optim.linalg import decompose
from lowrank_train.optim.shards.collectives import (
    decide_on_one_rank,
    max_over_ranks,
    put_rows,
    sum_over_shards,
    take_rows,
)
from lowrank_train.optim.shards.layout import local, row_range
from lowrank_train.optim.spectral.factors import SpectralFactors
from lowrank_train.optim.spectral.sampling import draw_seed, sample

__all__ = ["MOMENTS", "Turn", "draw", "orthogonality_error", "re_svd", "settings_of", "turns"]

MOMENTS = ("exp_avg", "exp_avg_sq", "age")


class Turn(NamedTuple):
    """The place of a layer in the schedule."""

    layer: SpectralFactors
    number: int
    """The number of the layer, in the order of the parameters."""
    iteration: int
    steps: int
    """Since the iteration began."""
    round_iterations: int
    """T2; 0 for no rounds."""

    @property
    def is_due(self) -> bool:
        """Whether the layer is decomposed where this iteration begins."""
        return self.round_iterations > 0 and self.since_svd == 0

    @property
    def since_svd(self) -> int:
        """Iterations since the last re-SVD, or since the start."""
        return self.iteration % self.round_iterations if self.round_iterations else self.iteration


def turns(layers: Sequence[SpectralFactors]) -> list[Turn]:
    """Return where every layer stands. Rounds are as long as the longest that a layer needs, so all end together."""
    longest = max(math.ceil(layer.count / layer.rank) for layer in layers)
    found = []
    for index, layer in enumerate(layers):
        settings = settings_of(layer)
        t2 = longest if settings["resvd_every"] is None else int(settings["resvd_every"])
        iteration, steps = divmod(_clock(layer), int(settings["resample_every"]))
        found.append(Turn(layer, index, iteration, steps, t2))
    return found


def re_svd(layers: Sequence[SpectralFactors]) -> tuple[set[str], list[str]]:
    """Give layers new factors of the same weights; a collective.

    Returns:
        The names of the layers that have them, and of those whose decomposition failed, which keep what they have.
    """
    decomposed, failed = set[str](), list[str]()
    params = [layer.param("u_active") for layer in layers]
    dtypes = [torch.promote_types(param.dtype, torch.float32) for param in params]
    like = []
    for layer, dtype in zip(layers, dtypes, strict=True):
        (out, width), k = layer.shape, layer.count
        shapes = {"u": (k, out), "sigma": (k,), "v": (k, width)}
        like.append({key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()})

    def decide(i: int, weight: Tensor) -> dict[str, Tensor]:
        try:
            return decompose(weight)
        except (ValueError, RuntimeError):  # of a solver, or out of memory: the other ranks are waiting
            return {key: torch.full(v.shape, torch.nan, device=weight.device) for key, v in like[i].items()}

    for i, factors in decide_on_one_rank(params, lambda i: layers[i].weight_part(dtypes[i]), decide, like):
        if torch.isfinite(factors["sigma"]).all():
            layers[i].replace(factors)
            decomposed.add(layers[i].name)
        else:
            failed.append(layers[i].name)
    return decomposed, failed


def settings_of(layer: SpectralFactors) -> dict[str, Any]:
    """Return the settings of the schedule, which all factors of a layer have in common."""
    return layer.slots["sigma_active"].group


def _clock(layer: SpectralFactors) -> int:
    """Steps since the start; in CPU memory, so that reading it waits for nothing."""
    return int(layer.slots["sigma_active"].state["step"])


def draw(turn: Turn, *, everything: bool) -> float:
    """Begin an iteration: exchange active triplets for those drawn, and return their share of all sigma.

    ``everything``: forget all moments, whatever is to be kept.
    """
    layer, settings = turn.layer, settings_of(turn.layer)
    r, sigma = layer.rank, _whole_sigma(layer)
    chosen = sample(
        settings["sampling"],
        sigma,
        r,
        iteration=turn.since_svd,
        seed=draw_seed(settings["seed"], turn.number, iteration=turn.iteration),
    )
    arriving = chosen[chosen >= r] - r
    leaving = torch.tensor(sorted(set(range(r)) - set(chosen.tolist())), dtype=torch.long)
    if len(arriving):
        _exchange(layer, leaving, arriving)
    _forget(layer, leaving, everything=everything)
    return float(sigma[chosen].sum() / sigma.sum()) if sigma.sum() > 0 else math.nan


def _whole_sigma(layer: SpectralFactors) -> Tensor:
    """All singular values, active first, on the CPU."""
    parts = []
    for segment in layer.segments:
        param = layer.param(f"sigma_{segment}")
        rows = take_rows(param, local(param), torch.arange(param.shape[0]))
        parts += sum_over_shards([param], [rows])
    return torch.cat(parts).cpu().clamp_min(0)


def _exchange(layer: SpectralFactors, leaving: Tensor, arriving: Tensor) -> None:
    """Active rows ``leaving`` and frozen rows ``arriving`` change places, each sigma with its moments if they count."""
    param = layer.param("u_active")
    dtype = torch.promote_types(param.dtype, torch.float32)
    carried = MOMENTS if settings_of(layer)["keep_sigma_moments"] else ()
    rows = [layer.take("active", leaving, dtype), layer.take("frozen", arriving, dtype)]
    for index, segment, own in ((leaving, "active", rows[0]), (arriving, "frozen", rows[1])):
        slot = layer.slots[f"sigma_{segment}"]
        own += [take_rows(slot.param, local(slot.state[key]), index).to(dtype) for key in carried]
    flat = [torch.cat([values.reshape(-1) for values in own]) for own in rows]
    out, back = (
        [part.view_as(old) for part, old in zip(whole.split([v.numel() for v in own]), own, strict=True)]
        for whole, own in zip(sum_over_shards([param, param], flat), rows, strict=True)
    )
    if layer.param("u_frozen").dtype != dtype:
        _lengths_into_sigma(back)
    for parts, index, segment in ((out, arriving, "frozen"), (back, leaving, "active")):
        layer.put(segment, index, parts[:3])
        slot = layer.slots[f"sigma_{segment}"]
        for key, values in zip(carried, parts[3:], strict=True):
            put_rows(slot.param, local(slot.state[key]), index, values)


def _lengths_into_sigma(triplets: list[Tensor]) -> None:
    """Unit vectors again, of what was stored in fewer bits: the next step will normalise, and must not change W."""
    u, sigma, v = triplets[:3]
    for vectors in (u, v):
        length = torch.linalg.vector_norm(vectors, dim=1)
        vectors.div_(length.clamp_min(torch.finfo(vectors.dtype).tiny).unsqueeze(1))
        sigma.mul_(length)


def _forget(layer: SpectralFactors, replaced: Tensor, *, everything: bool) -> None:
    """Set moments and ages to 0, of all rows or of what is not kept."""
    settings = settings_of(layer)
    for factor, slot in layer.slots.items():
        kept = settings["keep_sigma_moments" if factor.startswith("sigma") else "keep_vector_moments"]
        for key in MOMENTS if slot.state else ():
            block = local(slot.state[key])
            if everything or not kept:
                block.zero_()
            elif not factor.startswith("sigma"):
                put_rows(slot.param, block, replaced, block.new_zeros(len(replaced), *block.shape[1:]))


def orthogonality_error(layer: SpectralFactors) -> float:
    """Return the largest |<u_i, u_j>| or |<v_i, v_j>|, i != j, of an active vector and any other of the layer."""
    errors = []
    for kind in ("u", "v"):
        param = layer.param(f"{kind}_active")
        dtype = torch.promote_types(param.dtype, torch.float32)
        rows = take_rows(param, layer.vectors(f"{kind}_active", dtype), torch.arange(layer.rank))
        active = sum_over_shards([param], [rows])[0]
        here = row_range(param)
        for segment in layer.segments:
            overlaps = layer.vectors(f"{kind}_{segment}", dtype) @ active.mT
            if segment == "active":
                own = torch.arange(len(here), device=overlaps.device)
                overlaps[own, own + here.start] = 0
            errors.append(overlaps.abs().amax() if overlaps.numel() else overlaps.new_zeros(()))
    return float(max_over_ranks(param, torch.stack(errors).amax()))
