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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_flag, check_whole
from lowrank_train.optim.arguments.torch_arguments import is_number
from lowrank_train.optim.core.adam import adam_direction
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.linalg import decompose_bytes
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.layout import StateTensor, local, row_range
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace
from lowrank_train.optim.spectral.factors import SpectralFactors, factors_of
from lowrank_train.optim.spectral.iterations import MOMENTS, draw, orthogonality_error, re_svd, settings_of, turns
from lowrank_train.optim.spectral.sampling import SAMPLERS

__all__ = ["SST"]

_SHARED = (
    *("resample_every", "resvd_every", "warmup_steps", "sampling", "seed"),
    *("keep_sigma_moments", "keep_vector_moments"),
)
"""Settings that all factors of a layer have in common."""


class FactorUpdate(Update):
    """Adam on sigma and on active vectors, each parameter alone."""

    works_between_steps = True
    structural_settings = ("resample_every", "resvd_every", "sampling", "seed")
    retired_settings: ClassVar = {"tangent": False, "negative_sigma": "clamp", "staggered": False}
    interval_setting = "resample_every"

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return Adam's moments in float32 or wider, the age of each row, the clock of the schedule.

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

    def step(self, slots: list[Slot]) -> None:
        """Update factors that have a gradient."""
        for slot in slots:
            if slot.grad is not None:
                (_update_vectors if slot.group["role"] == "singular_vectors" else _update_values)(slot)

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the most that a draw takes: all active rows out and in, and once more to measure them.

        Re-SVDs, which are rarer, are not in it: they sum each W onto one rank and broadcast U, sigma and V.
        """
        size = torch.promote_types(dtype, torch.float32).itemsize
        if group["role"] == "singular_vectors":
            return Traffic(refresh_bytes=3 * math.prod(shape) * size)
        moved = 1 + len(MOMENTS) * group["keep_sigma_moments"]
        return Traffic(refresh_bytes=(1 + 2 * moved) * shape[0] * size)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return Adam's direction of the largest vectors, its denominator, and the direction scaled."""
        vectors = [x for x in matrices if x.group["role"] == "singular_vectors"]
        return Workspace(step=max((3 * x.whole + x.converted + x.negated for x in vectors), default=0))


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

    State: of each active vector two moments and an age; the same of each sigma, frozen ones too; a step count.
    Communication when sharded: nothing in a step; every ``resample_every`` steps the rows that change places and, to
    say how orthogonal they are, the active ones; at a re-SVD a sum of each matrix and a broadcast of its factors.

    Factors in bfloat16 or float16 are rounded to nearest after each step, which then changes little or nothing: train
    float32 factors, with autocast or FSDP2's mixed precision for the arithmetic.
    """

    published = Published(
        paper="Zhao et al., arXiv 2405.15481", when="weights, gradients and state together must need least memory"
    )
    updates: ClassVar = dict.fromkeys(("singular_vectors", "singular_values"), FactorUpdate())

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

    # ---------------------------------------------------------------------------------------------------------- step

    def end_step(self) -> None:
        """Advance the clock; where an iteration ends, re-SVD what is due, draw again, forget moments."""
        if self._began is None:
            self._began = time.perf_counter()
        layers = self._layers()
        for layer in layers:
            for slot in layer.slots.values():
                if slot.state:
                    slot.state["step"] += 1
        beginning = [turn for turn in turns(layers) if turn.steps == 0]
        if not beginning:
            return
        error = max(orthogonality_error(turn.layer) for turn in beginning)
        due = [turn.layer for turn in beginning if turn.is_due]
        decomposed = self._decompose(due) if due else set()
        shares = [draw(turn, everything=turn.layer.name in decomposed) for turn in beginning]
        self._drawn = error, sum(shares) / len(shares)

    def _decompose(self, layers: list[SpectralFactors]) -> set[str]:
        """Decompose layers anew, and return the names of those that could be."""
        began = time.perf_counter()
        decomposed, failed = re_svd(layers)
        for name in failed:
            self.resvd_failures += 1
            warnings.warn(
                f"the re-SVD of {name!r} failed: its weight is not finite, or the iteration did not converge; the "
                "layer keeps the factors it has",
                stacklevel=2,
            )
        self._resvd_seconds += time.perf_counter() - began
        return decomposed

    def _layers(self) -> list[SpectralFactors]:
        return list(factors_of(self.slots()))

    def end_bytes(self, world_size: int) -> int:
        """Return the decomposition of the largest layer, on the rank that owns it; nothing without re-SVDs."""
        layers = [layer for layer in self._layers() if layer.slots["u_active"].group["resvd_every"] != 0]
        return max((decompose_bytes(*layer.shape) for layer in layers), default=0)

    def figures(self) -> dict[str, float]:
        """Return where the schedule stands, and how the last iteration ended.

        ``orthogonality_error``: largest |<u_i, u_j>| of an active vector and another of its layer, or of v, before the
        last draw;
        ``sampled_share``: of the sum of sigma, on average over the layers; ``resvd_time_share``: of the time since the
        first step.
        """
        first = turns(self._layers())[0]
        elapsed = time.perf_counter() - self._began if self._began is not None else math.inf
        return {
            "iteration": first.iteration,
            "round": first.iteration // first.round_iterations if first.round_iterations else 0,
            "orthogonality_error": self._drawn[0],
            "sampled_share": self._drawn[1],
            "resvd_time_share": self._resvd_seconds / elapsed,
            "resvd_failures": self.resvd_failures,
        }


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


def _check_together(layer: SpectralFactors) -> None:
    """Raise ValueError if factors have other settings of the schedule than their layer, or if their rows are cut."""
    settings = settings_of(layer)
    for slot in layer.slots.values():
        row_range(slot.param)  # raises if rows are cut
        for key in _SHARED:
            if slot.state and slot.group[key] != settings[key]:
                raise ValueError(
                    f"{slot.name!r} has {key}={slot.group[key]!r} and its sigma {settings[key]!r}; the factors of a "
                    "layer need the same: write rules for optim.param_groups that match all of them, or none"
                )


def _check(name: str, group: dict[str, Any]) -> None:
    for key, least in (("resample_every", 1), ("resvd_every", 0), ("warmup_steps", 0), ("seed", 0)):
        check_whole(group, key, least, name=name, optional=key == "resvd_every")
    scale = group["vector_scale"]
    if not is_number(scale) or not 0 < scale < math.inf:
        raise ValueError(f"vector_scale={scale!r} for {name!r}; expected a number > 0")
    if group["sampling"] not in SAMPLERS:
        raise ValueError(f"sampling={group['sampling']!r} for {name!r}; expected one of {', '.join(SAMPLERS)}")
    for key in ("keep_sigma_moments", "keep_vector_moments"):
        check_flag(group, key, name)
