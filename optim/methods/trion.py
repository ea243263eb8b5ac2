"""Trion: Muon on the strongest columns of a fixed transform of the momentum.

    B  = M + G
    e_k = ||B q_k||^2;   Q_r = the r columns q_k of Q with the largest, chosen at every step         (d, r)
    b  = B Q_r                                                                                       (m, r)
    M <- B - (1 - mu) b Q_r^T         what is stepped along decays, the rest stays whole: error feedback
    o  = NewtonSchulz(b)              see ``optim.orthogonalize``
    W <- (1 - lr wd) W - lr s o Q_r^T,   s = max(1, sqrt(R / C))

    W, G, M, B (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C); Q (d, d) orthonormal.

At r = d it is Muon without Nesterov momentum, whatever Q. With Q = I it orthogonalizes a selection of columns of B.

Sharded, with m split over the ranks, all is local but two sums per step: of the energies, d numbers per matrix, and of
b^T b, r x r numbers. A matrix sharded along d instead is turned over and back, twice. A rank on which a gradient is
missing adds zeros to the sums.

It saves time and communication of Muon, not memory: M is as large as the weight.

Source: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models"
(arXiv 2505.17967), Trion.

We differ:
  * columns are ranked by the squared l2 norm, which leaves the least behind; the released code defaults to l1
    (``basis="dct_l1"``);
  * Newton-Schulz in float32 on the r x r Gram matrix, so that one sum over the ranks is enough;
  * wide and tall matrices use the same basis; the released code multiplies by Q on one side and Q^T on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_fraction
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.core.weight_update import WeightUpdate, decay_of
from lowrank_train.optim.low_rank.bases import BASES, Directions, find_basis
from lowrank_train.optim.low_rank.bases.columns import ColumnBasis
from lowrank_train.optim.low_rank.settings import resolved_rank
from lowrank_train.optim.orthogonalize import CHUNK_NUMBERS, orthogonalized
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.blocks import chunks, row_blocks
from lowrank_train.optim.shards.collectives import sum_over_shards
from lowrank_train.optim.shards.layout import StateTensor, local, matrix_shape
from lowrank_train.optim.shards.tall import tall, turned_numbers
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace

__all__ = ["Trion"]


_UNIT = 2.0**-16
"""b is multiplied by it, which is exact, so that the squares in b^T b stay in the range of float32 up to 1e23."""


class TrionUpdate(Update):
    """Trion on all matrices at once."""

    prefers_long_side = True

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return momentum and the last columns; raises ValueError for settings that do not fit."""
        shape = tuple(param.shape)
        check_fraction(group, "momentum", name)
        basis, d = _column_basis(group), min(matrix_shape(shape))
        r = resolved_rank(name, shape, group["rank"])
        objection = basis.objection(d, r)
        if objection is not None:
            raise ValueError(f"basis={group['basis']!r} for {name!r} of shape {shape}: {objection}")
        return {
            "step": StateTensor((), torch.float32, "host"),
            "momentum": StateTensor(shape, param.dtype, "parameter"),
            **basis.state_tensors(d, r, param.dtype),
        }

    def step(self, slots: list[Slot]) -> None:
        """Update matrices; every rank goes through the same ones, with or without a gradient."""
        for slot in slots:
            slot.state["step"] += 1
            if slot.grad is not None:
                _add_gradient(local(slot.state["momentum"]), local(dense_gradient(slot)))
        self._choose_columns(slots)
        coordinates = [max(matrix_shape(slot.param.shape)) * slot.state["basis_index"].numel() for slot in slots]
        for chunk in chunks(slots, coordinates, CHUNK_NUMBERS):
            directions = [_directions(slot) for slot in chunk]
            b = [_projected(slot, columns) for slot, columns in zip(chunk, directions, strict=True)]
            o = orthogonalized([slot.param for slot in chunk], b, unit=_UNIT)
            for slot, columns, decaying, update in zip(chunk, directions, b, o, strict=True):
                decay = decay_of(slot.group) if slot.grad is not None else None
                rows, width = matrix_shape(slot.param.shape)
                scale = max(1.0, math.sqrt(rows / width))
                _add_lifted(slot.param, columns, update * (-slot.group["lr"] * scale), decay)
                _add_lifted(slot.state["momentum"], columns, decaying * ((slot.group["momentum"] - 1) / _UNIT))

    def _choose_columns(self, slots: list[Slot]) -> None:
        """Choose the r strongest columns of every matrix; keep the old ones while there is no momentum at all."""
        energies = [
            _column_basis(slot.group).statistics(_momentum(slot).to(_arithmetic(slot)), slot.state) for slot in slots
        ]
        totals = sum_over_shards([slot.param for slot in slots], energies)
        for slot, total in zip(slots, totals, strict=True):
            index = slot.state["basis_index"]
            chosen = _column_basis(slot.group).choose(total, total.numel(), index.numel(), 0)["basis_index"]
            index.copy_(torch.where(total.sum() > 0, chosen, index))

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of energies and b^T b; of B and an update too, twice, if sharded along the shorter side."""
        d = min(matrix_shape(shape))
        size = torch.promote_types(dtype, torch.float32).itemsize
        there, back = turned_numbers(shape, dim, world_size)
        sums = d + resolved_rank("", tuple(shape), group["rank"]) ** 2
        return Traffic(step_bytes=2 * there * dtype.itemsize + (2 * back + sums) * size)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return b and o, and the Gram matrices, of matrices that are orthogonalized together; or a choice of columns.

        Of each Gram matrix there are A, A^2, P, p and products of them; of one matrix the scaled update.
        """
        ranks = [resolved_rank(x.name, (x.m, x.d), x.group["rank"]) for x in matrices]
        parts = [(x, r, _column_basis(x.group).workspace(x, r)) for x, r in zip(matrices, ranks, strict=True)]
        together = max((part.choice for *_, part in parts), default=0)
        for chunk in chunks(parts, [x.m * r for x, r, _ in parts], CHUNK_NUMBERS):
            b = [x.itemsize * x.rows * r for x, r, _ in chunk]
            grams = sum(6 * x.itemsize * r * r for x, r, _ in chunk)
            together = max(together, sum(part.vectors for *_, part in chunk) + 2 * sum(b) + grams + max(b))
        step = together + max((x.converted for x in matrices), default=0)
        return Workspace(
            step=max(step, *(x.negated for x in matrices)),
            kept={key: size for *_, part in parts for key, size in part.kept.items()},
        )


class Trion(MatrixOptimizer):
    """Low-rank Muon on matrices, in columns of the discrete cosine transform; AdamW on all else.

    Args:
        lr: learning rate of all groups; float or tensor. Matrices usually want more than the rest: give their group
            its own.
        rank: columns stepped along per matrix, 1 .. min(m, n); None takes a quarter of them.
        momentum: what is left, after a step, of the momentum in the columns stepped along.
        basis: dct, hadamard or identity; dct_l1, for comparison, ranks the columns by absolute values.
        betas: decay of AdamW's moments, for what is not a matrix.
        eps: added to the root of AdamW's second moment.

    State of a matrix: ``momentum``, like the parameter; the r columns of the last step; a step count.
    Communication when sharded: two sums per step, of min(m, n) and of r^2 float32 numbers per matrix.
    """

    published = Published(
        paper="Modoranu et al., arXiv 2505.17967", when="Muon, sharded over many ranks with slow links"
    )
    updates: ClassVar = {"matrix": TrionUpdate()}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        momentum: float = 0.95,
        basis: str = "dct",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, arguments(locals()))


def _add_gradient(momentum: Tensor, gradient: Tensor) -> None:
    """B, in the place of M. It may be as long as 1 / (1 - mu) gradients: in float16 it stops at the largest number."""
    momentum.add_(gradient)
    if momentum.dtype == torch.float16:
        largest = torch.finfo(momentum.dtype).max
        momentum.copy_(torch.where(gradient.isfinite(), momentum.clamp(-largest, largest), momentum))


def _column_basis(group: Mapping[str, Any]) -> ColumnBasis:
    basis = find_basis(group["basis"])
    if not isinstance(basis, ColumnBasis):
        valid = ", ".join(name for name, known in BASES.items() if isinstance(known, ColumnBasis))
        raise ValueError(f"basis={group['basis']!r} has no columns to choose from at every step; expected {valid}")
    return basis


def _directions(slot: Slot) -> Directions:
    d, r = min(matrix_shape(slot.param.shape)), slot.state["basis_index"].numel()
    like = torch.empty((), dtype=_arithmetic(slot), device=slot.param.device)
    return _column_basis(slot.group).directions(slot.state, d, r, like)


def _momentum(slot: Slot) -> Tensor:
    """B (m_local, d) as it is stored; zeros where a gradient is missing."""
    momentum = local(slot.state["momentum"])
    return tall(slot.param, momentum if slot.grad is not None else torch.zeros_like(momentum))


def _projected(slot: Slot, directions: Directions) -> Tensor:
    """b (m_local, r), multiplied by the unit."""
    momentum, r = _momentum(slot), slot.state["basis_index"].numel()
    coordinates = torch.empty(momentum.shape[0], r, dtype=_arithmetic(slot), device=momentum.device)
    for rows in row_blocks(momentum.shape[0], momentum.shape[1], momentum.device):
        coordinates[rows] = directions.project(momentum[rows].to(coordinates.dtype)).mul_(_UNIT)
    return coordinates


def _add_lifted(
    tensor: Tensor, directions: Directions, coordinates: Tensor, decay: float | Tensor | None = None
) -> None:
    """Add rows with these coordinates to a weight or to its momentum, after the decay of it."""
    update = WeightUpdate(tensor, coordinates.dtype, decay)
    for rows in row_blocks(update.shape[0], update.shape[1], tensor.device):
        with update.rows(rows) as block:
            directions.add_lift_(block, coordinates[rows])
    update.finish()


def _arithmetic(slot: Slot) -> torch.dtype:
    return torch.promote_types(slot.param.dtype, torch.float32)
