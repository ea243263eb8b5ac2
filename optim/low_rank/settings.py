"""Settings and state of one matrix of the low-rank engine, by its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowrank_train.optim.arguments.hyperparameters import check_fraction, check_whole, is_whole
from lowrank_train.optim.arguments.torch_arguments import is_number
from lowrank_train.optim.low_rank.bases import find_basis
from lowrank_train.optim.low_rank.residuals import find_residual
from lowrank_train.optim.shards.layout import StateTensor, matrix_shape

__all__ = ["MOMENTS", "check_settings", "low_rank_state", "resolved_rank"]

MOMENTS = ("keep", "reset", "rotate")
"""What may become of the moments when the basis changes."""


def check_settings(name: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of the matrix ``name`` that are out of range or do not go together."""
    check_whole(group, "refresh_interval", 1, name=name, unit=" of steps")
    if group["moments"] not in MOMENTS:
        raise ValueError(f"moments={group['moments']!r} for {name!r}; expected one of {', '.join(MOMENTS)}")
    for key in ("scale", "residual_scale"):
        if not (is_number(group[key]) and group[key] >= 0):
            raise ValueError(f"{key}={group[key]!r} for {name!r}; expected a number >= 0")
    check_fraction(group, "rho", name)
    check_whole(group, "seed", 0, name=name)
    basis, residual = find_basis(group["basis"]), find_residual(group["residual"])
    if not basis.is_orthonormal:
        for key, conflict in (("residual", residual.needs_orthonormal), ("moments", group["moments"] == "rotate")):
            if conflict:
                raise ValueError(
                    f"{key}={group[key]!r} for {name!r} needs orthonormal directions, and those of "
                    f"basis={group['basis']!r} are not; use basis='random', or another {key}"
                )


def low_rank_state(
    shape: Sequence[int], dtype: torch.dtype, r: int, *, basis: str, residual: str
) -> dict[str, StateTensor]:
    """Return the state tensors of one matrix of this shape and type at rank r."""
    d, m = sorted(matrix_shape(shape))
    return {
        "step": StateTensor((), torch.float32, "host"),
        "skipped_refreshes": StateTensor((), torch.int32, "host"),
        "exp_avg": StateTensor((m, r), dtype, "rows"),
        "exp_avg_sq": StateTensor((m, r), dtype, "rows"),
        "column_age": StateTensor((r,), torch.int32, "replicated"),
        **find_basis(basis).state_tensors(d, r, dtype),
        **find_residual(residual).state_tensors(m, d, dtype),
    }


def resolved_rank(name: str, shape: tuple[int, ...], rank: int | None) -> int:
    """Return the rank of one matrix; None stands for a quarter of its smaller side.

    Raises ValueError for a rank that does not fit.
    """
    largest = min(matrix_shape(shape))
    if rank is None:
        return max(1, largest // 4)
    if not is_whole(rank) or rank < 1:
        raise ValueError(f"rank={rank!r} for {name!r} of shape {shape}; expected a whole number from 1 to {largest}")
    if rank > largest:
        raise ValueError(
            f"rank={rank} exceeds min(m, n)={largest} for {name!r} of shape {shape}; lower the rank, or give this "
            "matrix its own with rules={...} in optim.param_groups"
        )
    return rank
