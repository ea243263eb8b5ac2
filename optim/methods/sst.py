"""SST, Sparse Spectral Training: weights trained as W = U diag(sigma) V^T, a few of the vectors at a time.

    every T2 iterations   U, sigma, V <- SVD(U diag(sigma) V^T)                                     a round
    every T3 steps        draw r triplets A by sigma (``optim.spectral.sampling``); forget the moments       an
    iteration every step            sigma_i <- max(sigma_i - lr_t Adam(dL/dsigma_i), 0)      for all i        Eq. 4
                          u_i <- normalize(u_i - lr_t Adam(G v_i))                 for i in A       Eq. 7, 14
                          v_i <- normalize(v_i - lr_t Adam(G^T u_i))               for i in A       Eq. 7, 15
    lr_t = lr min(1, (s + 1) / warmup_steps),  s steps after the iteration began

G = dL/dW, W (m, n), U (m, k), V (n, k), k = min(m, n). Gradients come from the layer
(``lowrank_train.layers.spectral``), already without the factor sigma_i ("enhanced"). In memory a vector is a row,
active and frozen ones in two tensors.

Sharded over rows, a step communicates nothing. A round sums W onto one rank per matrix, which decomposes it and tells
the others; an iteration moves the rows that change places. What is drawn follows from seed, layer and iteration alone:
nothing but ``step`` need be saved to resume in the middle of one.

Source: Zhao, Zhao, Zhang et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks"
(arXiv 2405.15481v3), Algorithm 2.

We differ:
  * the draw of the first iteration is made by whoever makes the layers (``to_spectral``): the gradients of the first
    step belong to it;
  * biases are corrected by the age of each row, so that a moment that was reset does not make a first step too long;
  * weight decay, where asked for, acts on sigma only: that is what decay of W is, and unit vectors would ignore it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.adam import adam_direction
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer, Slot, Traffic, dense_gradient, is_number
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.linalg import decompose
from lowrank_train.optim.shards.collectives import (
    decide_on_one_rank,
    max_over_ranks,
    put_rows,
    sum_over_shards,
    take_rows,
)
from lowrank_train.optim.shards.layout import StateTensor, local, row_range
from lowrank_train.optim.spectral.factors import SpectralFactors, factors_of
from lowrank_train.optim.spectral.sampling import SAMPLERS, draw_seed, sample

__all__ = ["SST"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "age")

_SHARED = (
    *("resample_every", "resvd_every", "warmup_steps", "sampling", "seed"),
    *("keep_sigma_moments", "keep_vector_moments"),
)
"""Settings that all factors of a layer have in common."""


class SST(MatrixOptimizer):
    """Sparse Spectral Training of the spectral layers of a model, AdamW on everything else.

    Args:
        params: a model with spectral layers (``lowrank_train.layers.spectral.to_spectral``), or groups that
            ``optim.param_groups`` made of it; before or after ``fully_shard``.
        lr: learning rate of all groups; float or tensor. The factors usually want 3 to 10 times the rate of the rest:
            give those groups their own.
        resample_every: T3, steps between two draws of active triplets.
        resvd_every: T2, iterations between two re-SVDs; None: ceil(k / r) of the layer that needs most, by when each
            triplet could have had its turn; 0: never.
        warmup_steps: steps over which the rate of the factors rises after each draw.
        vector_scale: the rate of vectors is ``lr`` times this. A step turns a vector of d entries by about
            rate sqrt(d), so short vectors (small models) bear and need more.
        sampling: ``multinomial`` (Eq. 16), ``uniform``, ``sequential`` or ``top``. With ``sequential`` a round must be
            of ceil(k / r) iterations or more, or some triplets never have their turn.
        seed: of all draws.
        keep_sigma_moments: for comparison: carry the moments of sigma from one iteration to the next (not over a
            re-SVD), where the paper resets them.
        keep_vector_moments: for comparison: carry the moments of vectors that are drawn again.
        weight_decay: decoupled, per unit of ``lr``; of the factors, it acts on sigma.

    Raises:
        ValueError: at construction, for a model without spectral layers, incomplete ones, and values out of range.

    State: of each active vector two moments and an age; of each sigma, frozen ones too, likewise; a step count.
    Communication when sharded: nothing in a step; every ``resample_every`` steps the rows that change places and, to
    say how orthogonal they are, the active ones; at a re-SVD a sum of each matrix and a broadcast of its factors.

    Factors in bfloat16 or float16 are rounded to nearest after each step, which then changes little or nothing: train
    float32 factors, with autocast or FSDP2's mixed precision for the arithmetic.
    """

    published = Published(
        paper="Zhao et al., arXiv 2405.15481", when="weights, gradients and state together must need least memory"
    )
    offloads_state = False
    layers = "spectral"
    method_roles = frozenset({"singular_vectors", "singular_values"})
    refresh_setting = "resample_every"
    structural_settings = ("resample_every", "resvd_every", "sampling", "seed")
    retired_settings: ClassVar = {"tangent": False, "negative_sigma": "clamp", "staggered": False}

    # Of the class, because torch's copies and pickles drop attributes
    resvd_failures = 0
    """Decompositions that failed since this object was made; the old factors were kept."""
    _resvd_seconds = 0.0
    _began: float | None = None
    _drawn: tuple[float, float] = (math.nan, math.nan)

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        resample_every: int = 200,
        resvd_every: int | None = None,
        warmup_steps: int = 20,
        vector_scale: float = 1.0,
        sampling: Literal["multinomial", "uniform", "sequential", "top"] = "multinomial",
        seed: int = 0,
        keep_sigma_moments: bool = False,
        keep_vector_moments: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = arguments(locals())
        super().__init__(param_groups(params) if isinstance(params, nn.Module) else params, settings)
        layers = self._layers()
        if not layers:
            raise ValueError(
                "the model has no spectral layers, so SST has nothing to train; convert it first: "
                "model = lowrank_train.layers.spectral.to_spectral(model, rank=...)"
            )
        for layer in layers:
            _check_together(layer)

    def state_allocated(self, slots: list[Slot]) -> None:
        """Check layers that were sharded after the optimizer was built."""
        for layer in self._layers():
            _check_together(layer)

    def matrix_state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Adam's moments in float32 or wider, the age of each row, the clock of the schedule.

        Raises ValueError for settings out of range.
        """
        _check(name, group)
        dtype = torch.promote_types(param.dtype, torch.float32)
        return {
            "step": StateTensor((), torch.float32, "host"),
            "age": StateTensor((param.shape[0],), torch.float32, "leading"),
            "exp_avg": StateTensor(tuple(param.shape), dtype, "parameter"),
            "exp_avg_sq": StateTensor(tuple(param.shape), dtype, "parameter"),
        }

    def traffic(
        self, shape: Sequence[int], dtype: torch.dtype, group: dict[str, Any], world_size: int, dim: int | None = None
    ) -> Traffic:
        """Nothing in a step; at a draw, at most: all active rows out and in, and once more to measure them.

        Re-SVDs, which are rarer, are not in it: they sum each W onto one rank and broadcast U, sigma and V.
        """
        size = torch.promote_types(dtype, torch.float32).itemsize
        if group["role"] == "singular_vectors":
            return Traffic(refresh_bytes=3 * math.prod(shape) * size)
        moved = 1 + len(_MOMENTS) * group["keep_sigma_moments"]
        return Traffic(refresh_bytes=(1 + 2 * moved) * shape[0] * size)

    # ---------------------------------------------------------------------------------------------------------- step

    def step_matrices(self, slots: list[Slot]) -> None:
        """Adam on sigma and on active vectors, each parameter on its own."""
        if self._began is None:
            self._began = time.perf_counter()
        for slot in slots:
            if slot.grad is not None:
                update = _update_vectors if slot.group["role"] == "singular_vectors" else _update_values
                update(slot)

    def end_step(self) -> None:
        """Advance the clock; where an iteration ends, re-SVD what is due, draw again, forget moments."""
        layers = self._layers()
        for layer in layers:
            for slot in layer.slots.values():
                if slot.state:
                    slot.state["step"] += 1
        turns = [turn for turn in self._turns(layers) if turn.steps == 0]
        if not turns:
            return
        error = max(_orthogonality_error(turn.layer) for turn in turns)
        decomposed = self._decompose([turn.layer for turn in turns if turn.is_due])
        shares = [_draw(turn, everything=turn.layer.name in decomposed) for turn in turns]
        self._drawn = error, sum(shares) / len(shares)

    def _turns(self, layers: list[SpectralFactors]) -> list[_Turn]:
        """Where every layer stands. Rounds are as long as the longest that a layer needs, for all to end together."""
        longest = max(math.ceil(layer.count / layer.rank) for layer in layers)
        turns = []
        for index, layer in enumerate(layers):
            settings = _settings(layer)
            t2 = longest if settings["resvd_every"] is None else int(settings["resvd_every"])
            iteration, steps = divmod(_clock(layer), int(settings["resample_every"]))
            turns.append(_Turn(layer, index, iteration, steps, t2))
        return turns

    def _decompose(self, layers: list[SpectralFactors]) -> set[str]:
        """New factors of the same weights, for the layers returned; one whose decomposition fails keeps what it has."""
        decomposed: set[str] = set()
        if not layers:
            return decomposed
        began = time.perf_counter()
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
                self.resvd_failures += 1
                warnings.warn(
                    f"the re-SVD of {layers[i].name!r} failed: its weight is not finite, or the iteration did not "
                    "converge; the layer keeps the factors it has",
                    stacklevel=2,
                )
        self._resvd_seconds += time.perf_counter() - began
        return decomposed

    def _layers(self) -> list[SpectralFactors]:
        return list(factors_of(self.slots()))

    def figures(self) -> dict[str, float]:
        """Where the schedule stands, and how the last iteration ended.

        ``orthogonality_error``: largest |<u_i, u_j>| of an active vector and another of its layer, or of v, before the
        last draw;
        ``sampled_share``: of the sum of sigma, on average over the layers; ``resvd_time_share``: of the time since the
        first step.
        """
        first = self._turns(self._layers())[0]
        elapsed = time.perf_counter() - self._began if self._began is not None else math.inf
        return {
            "iteration": first.iteration,
            "round": first.iteration // first.round_iterations if first.round_iterations else 0,
            "orthogonality_error": self._drawn[0],
            "sampled_share": self._drawn[1],
            "resvd_time_share": self._resvd_seconds / elapsed,
            "resvd_failures": self.resvd_failures,
        }


class _Turn(NamedTuple):
    """Where a layer stands in the schedule."""

    layer: SpectralFactors
    number: int
    """Of the layer, in the order of the parameters."""
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


def _update_vectors(slot: Slot) -> None:
    """Rows u_i, or v_i: Adam, then back to unit length (Eq. 7)."""
    row_range(slot.param)  # raises if they are cut, and so their length is not known here
    param, gradient = local(slot.param), local(dense_gradient(slot))
    vectors = param.to(torch.promote_types(param.dtype, torch.float32))
    gradient = gradient.to(vectors.dtype)
    vectors = vectors.sub_(_adam(slot, gradient) * (slot.group["vector_scale"] * _rate(slot)))
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    vectors.div_(length.clamp_min(torch.finfo(vectors.dtype).tiny))
    if vectors.dtype != param.dtype:
        param.copy_(vectors)


def _update_values(slot: Slot) -> None:
    """sigma: Adam, decay, no negative ones (Eq. 4)."""
    param, group = local(slot.param), slot.group
    values = param.to(torch.promote_types(param.dtype, torch.float32))
    rate = _rate(slot)
    step = _adam(slot, local(dense_gradient(slot)).to(values.dtype))
    values.mul_(1 - rate * group["weight_decay"]).sub_(step * rate).clamp_(min=0)
    if values.dtype != param.dtype:
        param.copy_(values)


def _adam(slot: Slot, gradient: Tensor) -> Tensor:
    """Adam's direction; the bias of a row's moments is corrected by its own age."""
    state, betas = slot.state, slot.group["betas"]
    age = local(state["age"])
    age += 1
    column = age.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
    return adam_direction(
        gradient,
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        _bias_correction(betas[0], column),
        _bias_correction(betas[1], column).sqrt(),
        betas=betas,
        eps=slot.group["eps"],
    )


def _bias_correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age, without the cancellation that costs float32 half its digits."""
    return -torch.expm1(age * math.log(beta)) if beta > 0 else torch.ones_like(age)


def _rate(slot: Slot) -> float | Tensor:
    group = slot.group
    since = int(slot.state["step"]) % group["resample_every"]
    return group["lr"] * min(1.0, (since + 1) / max(1, group["warmup_steps"]))


def _settings(layer: SpectralFactors) -> dict[str, Any]:
    return layer.slots["sigma_active"].group


def _clock(layer: SpectralFactors) -> int:
    """Steps since the start; in CPU memory, so that reading it waits for nothing."""
    return int(layer.slots["sigma_active"].state["step"])


def _draw(turn: _Turn, *, everything: bool) -> float:
    """Begin an iteration: exchange active triplets for those drawn; returns their share of all sigma.

    ``everything``: forget all moments, whatever is to be kept.
    """
    layer, settings = turn.layer, _settings(turn.layer)
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
    carried = _MOMENTS if _settings(layer)["keep_sigma_moments"] else ()
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
    settings = _settings(layer)
    for factor, slot in layer.slots.items():
        kept = settings["keep_sigma_moments" if factor.startswith("sigma") else "keep_vector_moments"]
        for key in _MOMENTS if slot.state else ():
            block = local(slot.state[key])
            if everything or not kept:
                block.zero_()
            elif not factor.startswith("sigma"):
                put_rows(slot.param, block, replaced, block.new_zeros(len(replaced), *block.shape[1:]))


def _orthogonality_error(layer: SpectralFactors) -> float:
    """Largest |<u_i, u_j>| or |<v_i, v_j>|, i != j, of an active vector and any other of the layer."""
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


def _check_together(layer: SpectralFactors) -> None:
    """Raise ValueError if factors have other settings of the schedule than their layer, or if their rows are cut."""
    settings = _settings(layer)
    for slot in layer.slots.values():
        row_range(slot.param)  # raises if rows are cut
        for key in _SHARED:
            if slot.state and slot.group[key] != settings[key]:
                raise ValueError(
                    f"{slot.name!r} has {key}={slot.group[key]!r} and its sigma {settings[key]!r}; the factors of a "
                    "layer need the same: write rules for optim.param_groups that match all of them, or none"
                )


def _check(name: str, group: dict[str, Any]) -> None:
    for key, low in (("resample_every", 1), ("resvd_every", 0), ("warmup_steps", 0), ("seed", 0)):
        value = group[key]
        if value is None and key == "resvd_every":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            allowed = ", or None" if key == "resvd_every" else ""
            raise ValueError(f"{key}={value!r} for {name!r}; expected a whole number >= {low}{allowed}")
    scale = group["vector_scale"]
    if not is_number(scale) or not 0 < scale < math.inf:
        raise ValueError(f"vector_scale={scale!r} for {name!r}; expected a number > 0")
    if group["sampling"] not in SAMPLERS:
        raise ValueError(f"sampling={group['sampling']!r} for {name!r}; expected one of {', '.join(SAMPLERS)}")
    for key in ("keep_sigma_moments", "keep_vector_moments"):
        if not isinstance(group[key], bool):
            raise ValueError(f"{key}={group[key]!r} for {name!r}; expected True or False")
