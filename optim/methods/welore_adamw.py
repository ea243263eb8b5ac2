"""WeLore as an optimizer: low-rank Adam with a rank for every matrix, chosen from singular spectra under one budget.

Every matrix is updated by the low-rank engine (``optim.low_rank.engine``) in r_l directions, or by AdamW where that
takes no more memory. Now and then all ranks are chosen together (``optim.spectral.ranks``):

    Gamma_l = sum of G_l^T G_l over ``average_steps`` updates          (d, d), d the smaller side
    sigma_l = sqrt(eigenvalues of Gamma_l)                             source "gradient"
            = sqrt(eigenvalues of W_l^T W_l)                           source "weight"
    s_l,i   = score(sigma_l);  "mixed": sqrt(s_l,i of the weight * s_l,i of the gradient)
    r_l     = #{i : s_l,i >= t},   t the smallest with sum_l cost_l(r_l) <= budget

cost_l(r) is the bytes of state at rank r, at most those of AdamW; where they reach these (r about 2 m d / (2 m + d))
the matrix is *dense*. Where a higher rank costs less, because 8-bit storage begins at a size, it stands for the lower.

A matrix whose rank changes takes its moments along (``optim.spectral.rank_changes``).

All of it happens after an update, without a gradient, so that updates fused into backward are as any other. The
sums G^T G exist only in the updates before an allocation, and are no part of the budget.

The clock of allocations, ``model_step``, counts the steps since any matrix was first updated. A gradient that is not
finite adds nothing to its sum; a spectrum that is not finite leaves all ranks as they are.

Sharded, the sums are one all-reduce per step (in pieces, to bound what waits), of d^2 numbers a matrix and only while
they are needed; a spectrum and new directions are computed by one rank and told to the others. Which ranks follow is
then the same arithmetic everywhere. No rank, cost or budget depends on the number of ranks.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.adamw_update import step_adamw
from lowrank_train.optim.core.optimizer import Slot, Traffic, dense_gradient, is_number
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, resolved_rank
from lowrank_train.optim.low_rank.step import MatrixStep
from lowrank_train.optim.shards.blocks import chunks
from lowrank_train.optim.shards.collectives import sum_over_shards
from lowrank_train.optim.shards.layout import StateTensor, allocate, local
from lowrank_train.optim.shards.tall import tall
from lowrank_train.optim.spectral.rank_changes import change_ranks
from lowrank_train.optim.spectral.ranks import SCORES, allocate_ranks, scores
from lowrank_train.optim.spectral.singular_values import gram, singular_spectra
from lowrank_train.optim.spectral.welore_state import (
    RankCosts,
    gram_layout,
    is_dense,
    rank_layout,
    rank_of,
    reallocate,
    shown_rank,
    stored_layout,
)

__all__ = ["WeLoreAdamW"]

_SOURCES = ("weight", "gradient", "mixed")
_BASES = ("subspace", "power", "svd")
_OF_ALL = (
    "budget_bytes",
    "source",
    "score",
    "multiple",
    "floor",
    "reallocate_every",
    "average_steps",
    "hysteresis",
    "allocates",
)
"""Settings of the allocation, which is one of all matrices."""

_CHUNK_NUMBERS = 2**26
"""Numbers of G^T G that are summed over the ranks at a time."""


class WeLoreAdamW(LowRankOptimizer):
    """Low-rank AdamW with a rank per matrix, from singular spectra under one budget of bytes; AdamW where that is best.

    Source: the choice of ranks, Jaiswal et al. (arXiv 2407.11239), WeLore, who factorise weights by it; the engine is
    GaLore's (arXiv 2403.03507), moments between ranks as LDAdam's (arXiv 2410.16103).

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything; matrices that are not dense move by ``lr * scale``.
        rank: ranks start from it, and the budget is the bytes that this rank of every matrix would take here: other
            methods' rank, at equal bytes. None: a quarter of each matrix's smaller side.
        budget_bytes: of the state of all matrices together, over all ranks; instead of what ``rank`` takes.
        source: of the spectra: gradient, weight, or mixed, the geometric mean of the scores of both.
        score: what a singular value is worth, a name of ``optim.spectral.ranks.SCORES``. The control, uniform, needs
            no spectra: the ranks from the start, never changed.
        multiple: ranks are multiples of it.
        floor: the least rank.
        reallocate_every: steps between two allocations; None: only the first, after step ``average_steps`` (source
            weight: after step 1).
        average_steps: gradients that a spectrum is taken of.
        hysteresis: a later allocation is taken only if it moves more than this share of the budget.
        ranks: of each matrix by name; nothing is allocated then (until a checkpoint is loaded, whose settings are
            taken over). What ``optimizer.ranks`` of another run says.
        refresh_interval: steps between two choices of directions.
        scale: factor of the update inside the directions.
        basis: subspace (two rounds of subspace iteration from the old directions), power (one) or svd (exact).
        residual: what becomes of the rest of the gradient, a name of ``optim.low_rank.residuals.RESIDUALS``.
        moments: what becomes of Adam's moments when directions change: rotate, keep or reset.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles, settings out of range or that differ between groups, a
            rank that does not fit a matrix (named), ``ranks`` of other matrices, and a budget below the least ranks.

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype, 4 r bytes of ages, 12 bytes of
    counters; of a dense one AdamW's and 12 bytes. Never more than the budget in all, but for ``gradient_gram``: n^2
    numbers a matrix, float32 or wider, in the ``average_steps`` steps before an allocation (unless source is weight).
    Communication when sharded: as GaLore; of a dense matrix a number before its first update; ``gradient_gram`` in each
    of those steps; at an allocation n numbers a matrix, n^2 (weight, mixed), and new directions.

    Checkpoints: ``load_state_dict`` and the trainer of this project take over the ranks of what they load. With
    ``set_optimizer_state_dict`` and torch.distributed.checkpoint alone, state must have the saved sizes beforehand:
    call ``prepare_to_load`` with the shapes in the checkpoint's metadata, before ``get_optimizer_state_dict``; or, if
    no allocation was being prepared when it was written, build the optimizer with ``ranks=`` what ``optimizer.ranks``
    was. ``predicted_state_bytes`` is of construction, the first ``gradient_gram`` included, or of given ``ranks``.

    Weights of more than two dimensions (stacks of experts) get AdamW, with a warning: the ranks of their matrices would
    differ, and one tensor of state cannot hold them.

    We differ from WeLore: it is the optimizer that is low-rank and not the weight; a budget in bytes where it has
    thresholds by name of the model; every matrix is trained, those of high rank with AdamW.
    """

    source = "Jaiswal et al., arXiv 2407.11239"
    offloads_state = False
    takes_stacks = False
    resizes_state = True
    skipped_allocations = 0
    """Since the optimizer was made, for spectra that were not finite."""

    _given: Mapping[str, int] | None = None
    _is_being_made = False  # of the class, because torch's copies and pickles drop attributes

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        budget_bytes: int | None = None,
        source: str = "gradient",
        score: str = "energy",
        multiple: int = 1,
        floor: int = 1,
        reallocate_every: int | None = None,
        average_steps: int = 10,
        hysteresis: float = 0.1,
        ranks: Mapping[str, int] | None = None,
        refresh_interval: int = 200,
        scale: float = 1.0,
        basis: str = "subspace",
        residual: str = "drop",
        moments: str = "rotate",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        allocation = {
            "budget_bytes": budget_bytes,
            "source": source,
            "score": score,
            "multiple": multiple,
            "floor": floor,
            "reallocate_every": reallocate_every,
            "average_steps": average_steps,
            "hysteresis": hysteresis,
            "allocates": ranks is None,
        }
        parts = {"basis": basis, "residual": residual, "moments": moments, "refresh_interval": refresh_interval}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        self._given = None if ranks is None else dict(ranks)
        self._is_being_made = True
        super().__init__(params, {"lr": lr, "rank": rank, "scale": scale, **allocation, **parts, **adam})
        self._is_being_made = False
        _check_names(self._given, self._matrices())
        self._set_initial_ranks(self._matrices())

    # --------------------------------------------------------------------------------------------------------- state

    def matrix_state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """As it is now; of a new matrix at the uniform rank. Raises ValueError for settings that do not fit."""
        super().matrix_state(name, param, group)  # raises
        _check(name, group)
        state = self.state.get(param)
        if state:
            return rank_layout(param, group, rank_of(state), with_gram="gradient_gram" in state)
        uniform = RankCosts.of(param.shape, param.dtype, group).low_rank(
            resolved_rank(name, tuple(param.shape), group["rank"])
        )
        return rank_layout(param, group, uniform, with_gram=_is_watched(group, self._clock()))

    def takes_apart(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Return False: the matrices of a stack would have state of different shapes, and sides are alike here."""
        return False

    def update_of(self, slot: Slot) -> str:
        """AdamW for dense matrices, where that takes no more memory."""
        dense = slot.group["role"] in self.method_roles and bool(slot.state) and is_dense(slot)
        return "AdamW (dense: low rank would take no less state)" if dense else super().update_of(slot)

    def traffic(
        self, shape: Sequence[int], dtype: torch.dtype, group: dict[str, Any], world_size: int, dim: int | None = None
    ) -> Traffic:
        """At the uniform rank, while no allocation is being prepared."""
        rank = resolved_rank("", tuple(shape), group["rank"])
        if RankCosts.of(shape, dtype, group).low_rank(rank) is None:
            return Traffic()
        return super().traffic(shape, dtype, group, world_size, dim)

    @property
    def ranks(self) -> dict[str, int]:
        """Of each matrix, by name; min(m, n) of a dense one."""
        return {slot.name: shown_rank(slot) for slot in self._matrices()}

    def figures(self) -> dict[str, float]:
        """Mean, least and largest rank, and how many matrices are dense."""
        ranks = list(self.ranks.values())
        if not ranks:
            return {}
        dense = sum(is_dense(slot) for slot in self._matrices())
        return {
            "rank_mean": sum(ranks) / len(ranks),
            "rank_min": min(ranks),
            "rank_max": max(ranks),
            "dense_matrices": dense,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the engine's; matrices that come after updates have been made get what is left of the budget."""
        super().add_param_group(param_group)
        if self._is_being_made:
            return
        group, slots = self.param_groups[-1], self._matrices()
        new = [slot for slot in slots if slot.group is group]
        try:
            self.state_allocated(new)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    def prepare_to_load(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        """Give the state of every matrix the rank it was saved with; its values are lost.

        Args:
            shapes: parameter -> state key -> global shape, as saved. Unless all of it is what this optimizer could
                have saved, nothing is changed.
        """
        resized = []
        for slot in self.slots():
            saved = {key: tuple(shape) for key, shape in shapes.get(slot.name, {}).items()}
            rank = saved["column_age"][0] if saved.get("column_age") else None
            layout = {key: tuple(value.shape) for key, value in slot.state.items()}
            if slot.group["role"] in self.method_roles and saved:
                specs = stored_layout(slot, rank, with_gram="gradient_gram" in saved)
                layout = {key: spec.shape for key, spec in specs.items()}
                resized.append((slot, rank, "gradient_gram" in saved))
            if saved and saved != layout:
                return
        for slot, rank, with_gram in resized:
            if rank != rank_of(slot.state) or with_gram != ("gradient_gram" in slot.state):
                reallocate(slot, rank, with_gram=with_gram)

    def _matrices(self) -> list[Slot]:
        return [slot for slot in self.slots() if slot.group["role"] in self.method_roles]

    def _clock(self) -> int:
        """Steps since any matrix was first updated."""
        return max((int(state["model_step"]) for state in self.state.values() if "model_step" in state), default=0)

    def state_allocated(self, slots: list[Slot]) -> None:
        """Ranks under the budget again; once updates have been made, of the new matrices alone."""
        new, clock = [slot for slot in slots if slot.group["role"] in self.method_roles], self._clock()
        if new:
            self._set_initial_ranks(new if clock else self._matrices())
        for slot in new:
            slot.state["model_step"].fill_(clock)

    def _set_initial_ranks(self, slots: list[Slot]) -> None:
        """The given ones, or the uniform one; less if the budget does not allow it.

        Others than ``slots`` keep what they have.
        """
        matrices = self._matrices()
        if not matrices:
            return
        settings = _common_settings(matrices)
        _check_unique(matrices, self.slots())
        costs = [RankCosts.of_slot(slot) for slot in slots]
        if self._given is None:
            chosen = {id(slot.param) for slot in slots}
            others = [slot for slot in matrices if id(slot.param) not in chosen]
            spent = sum(int(RankCosts.of_slot(slot).table[shown_rank(slot)]) for slot in others)
            # a share of its uniform rank is worth the same in every matrix: all of it, if the budget allows
            shares = [
                -torch.arange(1, cost.largest + 1, dtype=torch.float64) / _uniform_rank(slot)
                for slot, cost in zip(slots, costs, strict=True)
            ]
            ranks = _allocated(shares, costs, _budget(matrices) - spent, settings)
        else:
            ranks = [self._given.get(slot.name, _uniform_rank(slot)) for slot in slots]
        for slot, cost, rank in zip(slots, costs, ranks, strict=True):
            if cost.low_rank(rank) != rank_of(slot.state):
                reallocate(slot, cost.low_rank(rank), with_gram="gradient_gram" in slot.state)

    # ---------------------------------------------------------------------------------------------------------- step

    def step_matrices(self, slots: list[Slot]) -> None:
        """The engine's update, or AdamW's; and the sums of gradients, where an allocation is being prepared."""
        matrices = {id(slot.param): MatrixStep(slot) for slot in slots if not is_dense(slot)}
        watched = [slot for slot in slots if "gradient_gram" in slot.state]
        sizes = [slot.state["gradient_gram"].numel() for slot in watched]
        for chunk in chunks(watched, sizes, _CHUNK_NUMBERS):
            grams = []
            for slot in chunk:
                matrix = matrices.get(id(slot.param))
                grams.append(gram(slot, _tall_gradient(slot) if matrix is None else matrix.gradient))
            for slot, total in zip(chunk, sum_over_shards([slot.param for slot in chunk], grams), strict=True):
                slot.state["gradient_gram"].add_(torch.where(total.isfinite().all(), total, 0))
        self.step_together(list(matrices.values()))
        self._step_dense([slot for slot in slots if is_dense(slot)])

    def coordinates_suffice(self, slot: Slot) -> bool:
        """Not of a dense matrix, nor while an allocation is being prepared."""
        return "column_age" in slot.state and "gradient_gram" not in slot.state and super().coordinates_suffice(slot)

    def _step_dense(self, slots: list[Slot]) -> None:
        """AdamW, from the first gradient that is not zero: as the engine begins."""
        waiting = [slot for slot in slots if not slot.state["step"]]
        sums = sum_over_shards([slot.param for slot in waiting], [_magnitude(slot) for slot in waiting])
        idle = {id(slot.param) for slot, total in zip(waiting, sums, strict=True) if float(total) == 0}
        groups: dict[int, list[Slot]] = {}
        for slot in slots:
            if id(slot.param) not in idle:
                slot.state["step"] += 1
                groups.setdefault(id(slot.group), []).append(slot)
        for members in groups.values():
            step_adamw([slot._replace(state={**slot.state, "step": slot.state["age"]}) for slot in members])

    def end_step(self) -> None:
        """Advance the clock; choose ranks if that is due; begin to sum gradients before it is."""
        slots = self._matrices()
        if not any(slot.state["step"] for slot in slots):
            return
        clock = self._clock() + 1
        for slot in slots:
            slot.state["model_step"].fill_(clock)
        settings = slots[0].group
        if _next_allocation(settings, clock - 1) == clock:
            self._choose_ranks(slots, clock)
        for slot in slots:
            if not _is_watched(slot.group, clock):
                slot.state.pop("gradient_gram", None)
            elif "gradient_gram" not in slot.state:
                slot.state["gradient_gram"] = allocate(gram_layout(slot.param), slot.param)

    # ---------------------------------------------------------------------------------------------------- allocation

    def _choose_ranks(self, slots: list[Slot], clock: int) -> None:
        """An allocation, unless a spectrum is not finite. The sums of gradients are used up."""
        settings = _common_settings(slots)
        spectra = singular_spectra(slots, settings["source"])
        for slot in slots:
            slot.state.pop("gradient_gram", None)
        broken = next((slot.name for slot, own in zip(slots, spectra, strict=True) if not _is_finite(own)), None)
        if broken is not None:
            self.skipped_allocations += 1
            warnings.warn(
                f"the spectrum of {broken!r} is not known (not finite, or its gradients were not summed): ranks were "
                f"not chosen anew ({self.skipped_allocations} times now)",
                stacklevel=2,
            )
            return
        costs = [RankCosts.of_slot(slot) for slot in slots]
        tables = [_score_table(own, settings["score"], cost.table) for own, cost in zip(spectra, costs, strict=True)]
        budget = _budget(slots)
        ranks = _allocated(tables, costs, budget, settings)
        new = [cost.low_rank(rank) for cost, rank in zip(costs, ranks, strict=True)]
        old = [shown_rank(slot) for slot in slots]
        moved = sum(
            abs(int(cost.table[rank]) - int(cost.table[before]))
            for cost, rank, before in zip(costs, ranks, old, strict=True)
        )
        if clock == _next_allocation(settings, 0) or moved > settings["hysteresis"] * budget:
            change_ranks([(s, r) for s, r in zip(slots, new, strict=True) if r != rank_of(s.state)], clock)


# ---------------------------------------------------------------------------------------------------------- allocation


def _budget(slots: Iterable[Slot]) -> int:
    """Of all matrices."""
    slots = list(slots)
    if slots[0].group["budget_bytes"] is not None:
        return int(slots[0].group["budget_bytes"])
    return sum(int(RankCosts.of_slot(slot).table[_uniform_rank(slot)]) for slot in slots)


def _uniform_rank(slot: Slot) -> int:
    return resolved_rank(slot.name, tuple(slot.param.shape), slot.group["rank"])


def _allocated(
    tables: Sequence[Tensor], costs: Sequence[RankCosts], budget: int, settings: Mapping[str, Any]
) -> list[int]:
    """Ranks; a higher one where that costs no more, the whole of a matrix above all."""
    multiple, floor = settings["multiple"], settings["floor"]
    try:
        ranks = allocate_ranks(tables, [cost.table for cost in costs], budget, multiple=multiple, floor=floor)
    except ValueError as error:
        raise ValueError(f"{error}; raise budget_bytes (or rank), or lower floor and multiple") from None
    best = [cost.best[rank] for cost, rank in zip(costs, ranks, strict=True)]
    return [cost.largest if cost.low_rank(rank) is None else rank for cost, rank in zip(costs, best, strict=True)]


def _is_finite(spectra: Mapping[str, Tensor]) -> bool:
    return all(bool(sigma.isfinite().all()) for sigma in spectra.values())


def _score_table(spectra: Mapping[str, Tensor], score: str, costs: Tensor) -> Tensor:
    """(k,)."""
    tables = [scores(score, sigma, costs) for sigma in spectra.values()]
    return tables[0] if len(tables) == 1 else (tables[0] * tables[1]).sqrt()


# ------------------------------------------------------------------------------------------------------------ schedule


def _next_allocation(group: Mapping[str, Any], clock: int) -> int | None:
    """The first one after ``clock``; None if there is none to come."""
    if not group["allocates"] or group["score"] == "uniform":
        return None
    first: int = 1 if group["source"] == "weight" else group["average_steps"]
    if clock < first:
        return first
    every: int | None = group["reallocate_every"]
    return None if every is None else first + ((clock - first) // every + 1) * every


def _is_watched(group: Mapping[str, Any], clock: int) -> bool:
    """Whether the gradient of the step after ``clock`` counts."""
    coming = _next_allocation(group, clock)
    return group["source"] != "weight" and coming is not None and coming - clock <= group["average_steps"]


# ------------------------------------------------------------------------------------------------------------ gradients


def _tall_gradient(slot: Slot) -> Tensor:
    return tall(slot.param, torch.zeros_like(slot.param) if slot.grad is None else dense_gradient(slot))


def _magnitude(slot: Slot) -> Tensor:
    """Of this rank's gradient: 0 if there is none."""
    dtype = torch.promote_types(slot.param.dtype, torch.float32)
    if slot.grad is None:
        return torch.zeros((), dtype=dtype, device=slot.param.device)
    return local(dense_gradient(slot)).to(dtype).abs().sum()


# -------------------------------------------------------------------------------------------------------------- checks


def _common_settings(slots: Sequence[Slot]) -> Mapping[str, Any]:
    """Of the allocation. Raises ValueError if groups differ."""
    first = slots[0]
    for slot in slots:
        for key in _OF_ALL:
            if slot.group[key] != first.group[key]:
                raise ValueError(
                    f"{slot.name!r} has {key}={slot.group[key]!r} and {first.name!r} has {first.group[key]!r}; "
                    "expected the same for all matrices, whose ranks are chosen together"
                )
    return first.group


def _check(name: str, group: Mapping[str, Any]) -> None:
    for key, options in (("source", _SOURCES), ("score", tuple(SCORES)), ("basis", _BASES)):
        if group[key] not in options:
            raise ValueError(f"{key}={group[key]!r} for {name!r}; expected one of {', '.join(options)}")
    for key, optional in (
        ("budget_bytes", True),
        ("reallocate_every", True),
        ("multiple", False),
        ("floor", False),
        ("average_steps", False),
    ):
        value = group[key]
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value!r} for {name!r}; expected a whole number >= 1{' or None' * optional}")
    if not is_number(group["hysteresis"]) or not 0 <= group["hysteresis"] < math.inf:
        raise ValueError(f"hysteresis={group['hysteresis']!r} for {name!r}; expected a number >= 0")
    every, steps = group["reallocate_every"], group["average_steps"]
    if every is not None and every < steps and group["source"] != "weight":
        raise ValueError(
            f"reallocate_every={every} for {name!r} is less than the average_steps={steps} that gradients are summed "
            "before each allocation; expected at least as many"
        )


def _check_unique(matrices: Iterable[Slot], slots: Iterable[Slot]) -> None:
    """A name stands for a rank, in ``ranks`` and in what is loaded."""
    count = Counter(slot.name for slot in slots)
    for slot in matrices:
        if count[slot.name] > 1:
            raise ValueError(
                f"{count[slot.name]} parameters are called {slot.name!r}; expected a name of its own for each matrix: "
                "pass optim.param_groups(model), or groups of pairs (name, parameter)"
            )


def _check_names(given: Mapping[str, int] | None, slots: Sequence[Slot]) -> None:
    """``ranks`` must name every matrix, and nothing else."""
    if given is None:
        return
    shapes = {slot.name: tuple(slot.param.shape) for slot in slots}
    for name, rank in given.items():
        if name not in shapes:
            raise ValueError(f"ranks has an entry for {name!r}, which is no matrix; they are like {list(shapes)[:3]}")
        if rank is None:
            raise ValueError(f"rank=None for {name!r}; expected a whole number")
        resolved_rank(name, shapes[name], rank)  # raises
    missing = next((name for name in shapes if name not in given), None)
    if missing is not None:
        raise ValueError(f"ranks has no entry for {missing!r}; expected one for every matrix, as optimizer.ranks has")
