"""The low-rank engine: Adam on r directions of every matrix, put together from parts that are chosen by name.

For a weight W (R, C), oriented so that its smaller dimension is the last one: G (m, d), m = max(R, C), d = min(R, C).

    A   = recall(G)                                  G, or G + error feedback
    every ``refresh_interval`` steps:
        Q_r <- basis, from statistics of (1 - rho) A + rho lift(M_hat)        rho = 0 but in LDAdam
        M, V, age <- kept, reset or rotated to the new directions
    g   = project(A) = A Q_r                                          (m, r)
    M  <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2;   age <- age + 1
    u   = (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps)         (m, r), age per column
    W  <- (1 - lr wd) W - lr (scale lift(u) + residual(A - lift(g)))

basis: ``optim.low_rank.bases``; residual: ``optim.low_rank.residuals``; moments at a refresh: ``keep``, ``reset``,
``rotate``. A published method is a choice of these parts, a file each in ``optim.methods.low_rank``.

Sharded, with m split over the ranks, each line is local but the choice of directions, which costs one sum of the
basis's statistics over the ranks for all matrices due, and what few numbers the residual has to sum. Every matrix
takes part in that, with zeros if it has no gradient here.

Bias correction is per column (``age``): a direction that enters at step t starts from M = V = 0, and with the global
step count its first update would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long.

A zero gradient (of a parameter not used yet, or made by checkpoint code) never chooses directions, nor does one that is
not finite: the old ones stay, which is counted in the state (``skipped_refreshes``) and warned of. Until the first
directions have been chosen the matrix is left alone and its clock stands at 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.low_rank.bases import find_basis
from lowrank_train.optim.low_rank.residuals import find_residual
from lowrank_train.optim.low_rank.settings import check_settings, low_rank_state, resolved_rank
from lowrank_train.optim.low_rank.step import ZERO, MatrixStep
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.blocks import chunks
from lowrank_train.optim.shards.collectives import decide_on_one_rank, sum_over_shards
from lowrank_train.optim.shards.layout import StateTensor, matrix_shape
from lowrank_train.optim.shards.tall import turned_numbers
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace

__all__ = ["LowRankOptimizer", "LowRankUpdate", "Parts"]

_CHUNK_NUMBERS = 2**24
"""Coordinates, in all, of the matrices whose residual sums share one all-reduce: bounds what waits for it."""


class Parts(NamedTuple):
    """What a low-rank method is made of; an argument of the constructor with the same name may choose another part."""

    basis: str
    """A name of ``optim.low_rank.bases.BASES``."""
    residual: str
    """A name of ``optim.low_rank.residuals.RESIDUALS``."""
    moments: str
    """What becomes of the moments when the basis changes: keep, reset or rotate."""


class LowRankUpdate(Update):
    """The engine: all matrices in their directions.

    State of a matrix: ``exp_avg``, ``exp_avg_sq`` (m, r), sharded with its rows; ``column_age`` (r,) int32; what the
    basis and the residual store; ``step``, the updates since the first directions were chosen, in CPU memory because
    Python must compare it with ``refresh_interval`` without waiting for the device; ``skipped_refreshes``.
    """

    structural_settings = ("basis", "residual")
    interval_setting = "refresh_interval"
    takes = "moments as stored"
    prefers_long_side = True

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return moments, ages and what basis and residual store; raises ValueError for settings that do not fit."""
        d, _ = sorted(matrix_shape(param.shape))
        check_settings(name, group)
        r = resolved_rank(name, tuple(param.shape), group["rank"])
        objection = find_basis(group["basis"]).objection(d, r)
        if objection is not None:
            raise ValueError(f"basis={group['basis']!r} for {name!r} of shape {tuple(param.shape)}: {objection}")
        return low_rank_state(param.shape, param.dtype, r, basis=group["basis"], residual=group["residual"])

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of the basis's statistics, of its decision if one rank makes it, and of the residual's sums.

        To these come the gradient and the update of a matrix that is sharded along its projected dimension.
        """
        d, _ = sorted(matrix_shape(shape))
        r = resolved_rank("", tuple(shape), group["rank"])
        basis, size = find_basis(group["basis"]), torch.promote_types(dtype, torch.float32)
        statistics = (
            math.prod(basis.statistics_shape(d, r)) * torch.promote_types(size, basis.statistics_dtype).itemsize
        )
        decision = basis.state_tensors(d, r, size).values() if basis.owner_computed else ()
        decision_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in decision)
        there, back = turned_numbers(shape, dim, world_size)
        sums = find_residual(group["residual"]).sums
        return Traffic(
            step_bytes=there * dtype.itemsize + (back + sums) * size.itemsize,
            refresh_bytes=basis.rounds(1) * (statistics + decision_bytes),
        )

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return what matrices need together, and the most that one of them needs.

        Together: gradients and updates of matrices that are resharded, until the step ends; projected gradients and
        updates that wait for sums; with LDAdam moments and bases as they were. One: a block of rows.
        """
        parts = [_Part(x, resolved_rank(x.name, (x.m, x.d), x.group["rank"])) for x in matrices]
        turned = sum(2 * x.whole for x in matrices if x.is_turned)
        turned += max((x.whole for x in matrices if x.is_turned), default=0)  # as sent
        summed = [part for part in parts if part.residual.sums]
        waiting = [
            sum(2 * part.coordinates for part in chunk)
            for chunk in chunks(summed, [part.x.m * part.r for part in summed], _CHUNK_NUMBERS)
        ]
        together = sum(x.negated for x in matrices) + sum(part.previous for part in parts)
        blocks = max((part.block for part in parts), default=0) + max((x.converted for x in matrices), default=0)
        choice = sum(part.of_basis.proposal for part in parts) + max((p.of_basis.choice for p in parts), default=0)
        target = max((part.target for part in parts), default=0)
        transfer = max((part.transfer for part in parts), default=0)
        return Workspace(
            step=turned + blocks + max(waiting, default=0) + together,
            refresh=turned // 2 + max(choice + target, transfer) + together,
            kept={key: size for part in parts for key, size in part.of_basis.kept.items()},
        )

    # ---------------------------------------------------------------------------------------------------------- step

    def step(self, slots: list[Slot]) -> None:
        """Choose new directions where that is due, then update every matrix once."""
        matrices = [MatrixStep(slot) for slot in slots]
        self._refresh([matrix for matrix in matrices if matrix.is_due])
        ready = [matrix for matrix in matrices if matrix.has_directions]
        sizes = [max(matrix_shape(matrix.slot.param.shape)) * matrix.r for matrix in ready]
        for chunk in chunks(ready, sizes, _CHUNK_NUMBERS):
            self._update(chunk)

    def coordinates_suffice(self, slot: Slot) -> bool:
        """Return whether the rest of the gradient is dropped."""
        return not find_residual(slot.group["residual"]).whole_gradient

    def summed_gradient(self, slot: Slot) -> StateTensor:
        """Return coordinates (m, r), where they suffice."""
        if not self.coordinates_suffice(slot):
            return super().summed_gradient(slot)
        exact = torch.promote_types(slot.param.dtype, torch.float32)
        return StateTensor((max(matrix_shape(slot.param.shape)), slot.state["column_age"].numel()), exact, "rows")

    def project_gradient(self, slot: Slot, *, refresh: bool) -> Tensor | None:
        """Return (m_local, r): the coordinates of the rows of this rank."""
        matrix = MatrixStep(slot)
        if refresh and matrix.is_due:
            self._refresh([matrix])
        return matrix.project() if matrix.has_directions or not refresh else None

    def step_coordinates(self, slot: Slot, coordinates: Tensor) -> None:
        """Update one matrix, with g given."""
        matrix = MatrixStep(slot, coordinates)
        matrix.advance()
        matrix.single_pass()

    def _refresh(self, matrices: list[MatrixStep]) -> None:
        """Choose new directions for every matrix, unless its gradient is zero or not finite."""
        if not matrices:
            return
        proposals: list[Mapping[str, Tensor]] = [matrix.starting_directions() for matrix in matrices]
        signs = torch.ones(len(matrices), device=matrices[0].like.device)
        rounds = [matrix.basis.rounds(matrix.steps) for matrix in matrices]
        for round_ in range(max(rounds)):
            active = [i for i in range(len(matrices)) if round_ < rounds[i]]
            for owner_computed in (False, True):
                members = [i for i in active if matrices[i].basis.owner_computed == owner_computed]
                if not members:
                    continue
                decide = _decide_on_one_rank if owner_computed else _decide_on_every_rank
                decisions, found = decide([matrices[i] for i in members], [proposals[i] for i in members])
                for i, decision, sign in zip(members, decisions, found, strict=True):
                    proposals[i] = decision
                    signs[i] *= sign
        for matrix, proposal, sign in zip(matrices, proposals, signs.tolist(), strict=True):  # the one host sync
            if sign > 0:
                matrix.change_directions(proposal)
            else:
                matrix.keep_directions(ZERO if sign == 0 else "not finite")

    def _update(self, matrices: list[MatrixStep]) -> None:
        """One step in the present directions."""
        for matrix in matrices:
            matrix.advance()
        summed = [matrix for matrix in matrices if matrix.residual.sums]
        if summed:
            totals = sum_over_shards([m.slot.param for m in summed], [m.first_pass() for m in summed])
            for matrix, total in zip(summed, totals, strict=True):
                matrix.second_pass(total)
        for matrix in matrices:
            if not matrix.residual.sums:
                matrix.single_pass()


class LowRankOptimizer(MatrixOptimizer):
    """Abstract: a concrete class names the published method, its parts and its defaults."""

    parts: ClassVar[Parts]
    updates: ClassVar = {"matrix": LowRankUpdate()}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        common = {"scale": 1.0, "residual_scale": 1.0, "rho": 0.0, "seed": 0, "state_dtype": None}
        super().__init__(params, {**common, **self.parts._asdict(), **defaults})

    @property
    def skipped_refreshes(self) -> int:
        """Refreshes that did not happen because a gradient was zero or not finite, over all matrices."""
        return sum(int(state["skipped_refreshes"]) for state in self.state.values() if "skipped_refreshes" in state)


def _decide_on_every_rank(
    matrices: list[MatrixStep], proposals: list[Mapping[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """New directions, from statistics summed for all matrices at once, and their ``_magnitude``."""
    statistics = [m.basis.statistics(m.target(), p) for m, p in zip(matrices, proposals, strict=True)]
    totals = sum_over_shards([matrix.slot.param for matrix in matrices], statistics)
    decisions = [m.basis.choose(total, m.d, m.r, m.seed) for m, total in zip(matrices, totals, strict=True)]
    return decisions, [_magnitude(total) for total in totals]


def _decide_on_one_rank(
    matrices: list[MatrixStep], proposals: list[Mapping[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """As ``_decide_on_every_rank``, where the choice is costly or not unique.

    The others learn from the directions themselves that there were none to choose (0) or that it failed (nan).
    """
    like = [
        {
            key: torch.empty(spec.shape, dtype=matrix.dtype, device="meta")
            for key, spec in matrix.basis.state_tensors(matrix.d, matrix.r, matrix.dtype).items()
        }
        for matrix in matrices
    ]

    def decide(i: int, total: Tensor) -> dict[str, Tensor]:
        matrix, magnitude = matrices[i], float(_magnitude(total))
        if magnitude > 0:
            with contextlib.suppress(LinAlgError):
                return matrix.basis.choose(total, matrix.d, matrix.r, matrix.seed)
        failed = 0.0 if magnitude == 0 else torch.nan
        return {key: torch.full(value.shape, failed, device=matrix.like.device) for key, value in like[i].items()}

    def statistics(i: int) -> Tensor:
        return matrices[i].basis.statistics(matrices[i].target(), proposals[i])

    params = [matrix.slot.param for matrix in matrices]
    decisions = [decision for _, decision in decide_on_one_rank(params, statistics, decide, like)]
    return decisions, [_magnitude(torch.cat([v.flatten() for v in decision.values()])) for decision in decisions]


def _magnitude(values: Tensor) -> Tensor:
    """1, or 0 if all are zero, or nan if one is not finite."""
    total = values.abs().sum()
    return torch.where(total.isfinite(), total.sign(), torch.nan)


class _Part:
    """One matrix at rank r, and the bytes that its parts need."""

    def __init__(self, x: MatrixShape, r: int) -> None:
        basis, self.residual, group = find_basis(x.group["basis"]), find_residual(x.group["residual"]), x.group
        self.x, self.r = x, r
        self.of_basis, of_residual = basis.workspace(x, r), self.residual.workspace(x)
        self.coordinates = x.itemsize * x.rows * r
        narrow = x.block // x.d * r
        # projected gradient, roots, update, its scaled copy; moments converted, and stored again
        block = (10 if group["state_dtype"] else 4) * narrow + x.block * x.is_narrow
        self.block = block + self.of_basis.vectors + self.of_basis.block + of_residual.block
        # mixed with the mean, projected back; the converted gradient
        self.target = max(x.whole * ((2 if group["rho"] else 0) + x.is_narrow), of_residual.whole)
        self.transfer = 0 if group["moments"] == "keep" else self.of_basis.transfer
        self.previous = (self.coordinates + x.itemsize * r * x.d) * self.residual.tracks_momentum
