"""Adam in a low-rank basis: moments of r directions instead of all of them.

For a weight W (R, C), oriented so that its smaller dimension is the last one: G (m, d), m = max(R, C), d = min(R, C).

    every ``refresh_interval`` steps, from the gradient G of that step:
        new directions Q_r from statistics(G);  M, V, age <- transported from the old directions to the new
    g   = project(G) = G Q_r                                          (m, r)
    M  <- b1 M + (1 - b1) g;   V <- b2 V + (1 - b2) g^2;   age <- age + 1
    u   = (M / (1 - b1^age)) / (sqrt(V / (1 - b2^age)) + eps)         (m, r), age per column
    W  <- (1 - lr wd) W - lr lift(u),   lift(u) = u Q_r^T             (m, d)

Sharded, with m split over the ranks, each line is local but the choice of directions, which costs one all-reduce of
sum(d) numbers over all matrices due. Every matrix due takes part in it, with zeros if it has no gradient here.

Bias correction is per column (``age``): a direction that enters at step t starts from M = V = 0, and with the global
step count its first update would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long.

A zero gradient (of a parameter not used yet, or made by checkpoint code) never chooses directions: until one that is
finite and not zero arrives, the matrix is left alone and its clock stands at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim import rules
from optim.base import MatrixOptimizer, Slot, dense_gradient
from optim.basis import Basis, DCTBasis
from optim.sharding import StateTensor, add_tall, local, preferred_shard_dim, sum_over_shards, tall

__all__ = ["DCTAdamW", "LowRankAdamW"]


class LowRankAdamW(MatrixOptimizer):
    """Abstract: a concrete class names the basis and the paper's defaults.

    State of a matrix: ``exp_avg``, ``exp_avg_sq`` (m, r) in the parameter's dtype, sharded with its rows;
    ``column_age`` (r,) int32; what the basis stores; ``step``, the updates since the first directions were chosen,
    in CPU memory because Python must compare it with ``refresh_interval`` without waiting for the device.
    """

    basis: Basis

    @classmethod
    def shard_dim(cls, role: str, shape: Sequence[int], world_size: int) -> int:
        """A matrix: its unprojected dimension, so that project and lift are local."""
        return preferred_shard_dim(shape, world_size) if role == "matrix" else 0

    def matrix_state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Moments, ages, the basis's own tensors; raises ValueError for a rank or interval that does not fit."""
        m, d = max(param.shape), min(param.shape)
        r = _rank(name, tuple(param.shape), group["rank"])
        interval = group["refresh_interval"]
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"refresh_interval={interval!r} for {name!r}; expected a whole number of steps >= 1")
        return {
            "step": StateTensor((), torch.float32, "host"),
            "exp_avg": StateTensor((m, r), param.dtype, "rows"),
            "exp_avg_sq": StateTensor((m, r), param.dtype, "rows"),
            "column_age": StateTensor((r,), torch.int32, "replicated"),
            **self.basis.state_tensors(d, r),
        }

    def step_matrices(self, slots: list[Slot]) -> None:
        """The update of the module's docstring, matrix by matrix."""
        due = [slot for slot in slots if int(slot.state["step"]) % slot.group["refresh_interval"] == 0]
        chosen = dict(zip([slot.param for slot in due], self._refresh(due), strict=True))
        for slot in slots:
            if not slot.state["step"] and not chosen[slot.param]:
                continue  # no directions yet
            slot.state["step"] += 1
            if slot.param.grad is not None:
                self._update(slot)

    def _refresh(self, slots: list[Slot]) -> list[bool]:
        """Choose new directions for every matrix; False where the gradient is zero or not finite and all stays."""
        if not slots:
            return []
        local_statistics = [self.basis.statistics(_tall_gradient(slot)) for slot in slots]
        statistics = sum_over_shards([slot.param for slot in slots], local_statistics)
        totals = torch.stack([s.abs().sum().double() for s in statistics])
        usable: list[bool] = (totals.isfinite() & (totals > 0)).tolist()  # the one host sync, once per refresh
        for slot, statistic, use in zip(slots, statistics, usable, strict=True):
            if use:
                self._change_directions(slot.state, self.basis.choose(statistic, slot.state["column_age"].numel()))
        return usable

    def _change_directions(self, state: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        old = {key: state[key] for key in new}
        for key in ("exp_avg", "exp_avg_sq", "column_age"):
            carried = local(state[key])
            carried.copy_(self.basis.transport(carried, old, new))
        for key, value in new.items():
            state[key].copy_(value)

    def _update(self, slot: Slot) -> None:
        state, group = slot.state, slot.group
        state["column_age"] += 1
        update = rules.adam_update(
            self.basis.project(_tall_gradient(slot), state),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            state["column_age"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
        )
        if group["weight_decay"]:
            local(slot.param).mul_(1 - group["lr"] * group["weight_decay"])
        add_tall(slot.param, self.basis.lift(update, state, min(slot.param.shape)))


class DCTAdamW(LowRankAdamW):
    """AdamW whose moments live on r columns of the discrete cosine transform; the projector costs r integers.

    Source: Modoranu et al. (arXiv 2505.17967), DCT-AdamW. See ``optim.basis.dct`` for the basis and how it differs.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate, a step of about ``lr`` per coordinate; float or tensor.
        rank: directions kept per matrix, 1 .. min(m, n); None keeps a quarter of them (at least 1).
        refresh_interval: steps between two choices of columns.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, 8 r bytes of integers, a step count.
    Communication when sharded: one all-reduce of sum(min(m, n)) numbers per refresh; nothing at other steps.

    We differ from the paper's code: ``refresh_interval`` defaults to 100, not 1, because a column that enters starts
    from nothing and the product G Q costs d / r times the projection (measured on a small LLaMA: docs/quickstart.md);
    moments follow their columns exactly; bias correction is per column; no error feedback.
    """

    source = "Modoranu et al., arXiv 2505.17967"
    basis = DCTBasis()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_interval: int = 100,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "rank": rank, "refresh_interval": refresh_interval}
        super().__init__(params, {**defaults, "betas": betas, "eps": eps, "weight_decay": weight_decay})


def _tall_gradient(slot: Slot) -> Tensor:
    """Gradient (m_local, d) in the dtype of the arithmetic, at least float32; zeros if there is none."""
    gradient = torch.zeros_like(slot.param) if slot.param.grad is None else dense_gradient(slot)
    block = tall(slot.param, gradient)
    return block.float() if block.element_size() < 4 else block


def _rank(name: str, shape: tuple[int, ...], rank: int | None) -> int:
    largest = min(shape)
    if rank is None:
        return max(1, largest // 4)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank={rank!r} for {name!r} of shape {shape}; expected a whole number from 1 to {largest}")
    if rank > largest:
        raise ValueError(
            f"rank={rank} exceeds min(m, n)={largest} for {name!r} of shape {shape}; lower the rank, or give this "
            "matrix its own with rules={...} in optim.param_groups"
        )
    return rank
