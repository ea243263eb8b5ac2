"""Bytes an optimizer's step communicates: predicted from shapes, and beside formulas of how others do it.

    payload   what a rank hands to collectives: the numbers that have to be summed or told
    sent      what then leaves a rank, for a payload of N bytes on P ranks, by the ring algorithms:
                  all-reduce                            2 N (P - 1) / P
                  reduce-scatter, all-gather,             N (P - 1) / P      N: the whole tensor, as for all-reduce
                  broadcast, reduce (mean over ranks)     N (P - 1) / P
                  all-to-all                              N (P - 1) / P      N: what this rank holds

Ours counts every payload as an all-reduce: exact for sums, at most twice too much where one rank decides (GaLore,
Fira, LDAdam) or a matrix is turned over. FSDP2's own gathering of weights and scattering of gradients is not included,
nor is what the very first step needs more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.optim.core.coverage import unwarned
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.update import Traffic
from lowrank_train.optim.methods import create
from lowrank_train.optim.parameters.stacks import is_taken_apart, leading, matrix_like
from lowrank_train.optim.shards.layout import matrix_shape

__all__ = [
    "FORMULAS",
    "Communication",
    "ModelShapes",
    "all_reduce_bytes",
    "communicated_bytes",
    "model_shapes",
    "weight_traffic",
]

_REFRESH = 200  # GaLore, arXiv 2403.03507: steps between two SVDs


@dataclass(frozen=True)
class Communication:
    """The bytes that one rank sends, over all parameters."""

    world_size: int
    step_payload: float
    """Bytes at every step."""
    refresh_payload: float
    """More bytes at a step that chooses a new basis."""
    mean_payload: float
    """Mean bytes of a step, over the refresh interval of every group."""
    interval: int | None
    """The shortest of these; None for a method without one."""

    @property
    def step_sent(self) -> float:
        """Bytes of a step that keeps its basis."""
        return all_reduce_bytes(self.step_payload, self.world_size)

    @property
    def refresh_sent(self) -> float:
        """Bytes of a step that chooses a new basis, in all."""
        return all_reduce_bytes(self.step_payload + self.refresh_payload, self.world_size)

    @property
    def mean_sent(self) -> float:
        """Per step, over the refresh interval."""
        return all_reduce_bytes(self.mean_payload, self.world_size)


def all_reduce_bytes(payload: float, world_size: int) -> float:
    """Return what a rank sends to sum a payload over the ranks by a ring."""
    return 2 * payload * (world_size - 1) / world_size


def communicated_bytes(
    name: str, model: nn.Module | list[dict[str, Any]], *, world_size: int, **arguments: Any
) -> Communication:
    """Return what ``create(name, model, **arguments)`` communicates, sharded over ``world_size`` ranks as it advises.

    Args:
        name: one of ``optim.names()``.
        model: or groups that ``optim.param_groups`` made of it; only shapes and dtypes are read.
        world_size: ranks a parameter is sharded over.
        arguments: the optimizer's own.

    Raises:
        ValueError: as ``create`` does, and for fewer than one rank.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}; expected a number of ranks >= 1")
    groups = [
        {**group, "params": [(key, torch.empty(p.shape, dtype=p.dtype, device="meta")) for key, p in group["params"]]}
        for group in (param_groups(model) if isinstance(model, nn.Module) else model)
    ]
    with unwarned():
        optimizer = create(name, groups, **arguments)
    step, refresh, mean = 0.0, 0.0, 0.0
    intervals = []
    for group in optimizer.param_groups:
        interval = optimizer.update_of(group).interval(group)
        if interval is not None:
            intervals.append(interval)
        for param in group["params"]:
            traffic = weight_traffic(optimizer, param, group, world_size)
            step += traffic.step_bytes
            refresh += traffic.refresh_bytes
            mean += traffic.step_bytes + traffic.refresh_bytes / (interval or 1)
    return Communication(world_size, step, refresh, mean, min(intervals, default=None))


def weight_traffic(optimizer: MatrixOptimizer, param: Tensor, group: dict[str, Any], world_size: int) -> Traffic:
    """Return the traffic of all matrices of a weight; none if each rank holds whole matrices of a stack."""
    if world_size == 1:
        return Traffic()
    update = optimizer.update_of(group)
    dim = update.shard_dim(param.shape, world_size)
    if not update.takes_apart(param, group):
        return update.sent(param.shape, param.dtype, group, world_size, dim)
    count = leading(param.shape, group)
    if dim < count:
        return Traffic()
    one = matrix_like(param, group)
    dim = 1 - (dim - count) if group["weight_layout"] == "in,out" else dim - count
    traffic = update.sent(one.shape, one.dtype, group, world_size, dim)
    matrices = param.numel() // one.numel()
    return Traffic(*(matrices * size for size in traffic))


@dataclass(frozen=True)
class ModelShapes:
    """What the formulas need to know of a model: its matrices (out, in), and how many parameters it has in all."""

    matrices: tuple[tuple[int, int], ...]
    parameters: int


def model_shapes(model: nn.Module) -> ModelShapes:
    """Return the shapes of any model, on any device."""
    groups = param_groups(model)
    matrices: list[tuple[int, int]] = []
    for group in groups:
        settings = {"weight_layout": "out,in", **group}
        for _, param in group["params"] if group["role"] == "matrix" else ():
            if is_taken_apart(param.shape, settings):
                one = matrix_like(param, settings)
                matrices += [matrix_shape(one.shape)] * (param.numel() // one.numel())
            else:
                matrices.append(matrix_shape(param.shape))
    return ModelShapes(tuple(matrices), sum(p.numel() for group in groups for _, p in group["params"]))


# Bytes a rank sends per step, of 2-byte (bfloat16) numbers unless said otherwise; R x C a matrix, P ranks.


def fsdp2(model: ModelShapes, rank: int, world_size: int) -> float:
    """For scale: FSDP2 itself gathers all weights twice and scatters all gradients once."""
    return 3 * 2 * model.parameters * (world_size - 1) / world_size


def muon_all_to_all(model: ModelShapes, rank: int, world_size: int) -> float:
    """Muon, one owner per matrix: all-to-all of momentum there and of updates back (microsoft/dion, NorMuon)."""
    return 2 * 2 * _sum(model, lambda R, C: R * C / world_size) * (world_size - 1) / world_size


def muon_gather(model: ModelShapes, rank: int, world_size: int) -> float:
    """Muon, every rank orthogonalizes everything: all-gather of momentum."""
    return 2 * _sum(model, lambda R, C: R * C) * (world_size - 1) / world_size


def dion(model: ModelShapes, rank: int, world_size: int) -> float:
    """Dion (arXiv 2504.05295): reduce-scatter and all-gather of the right factor, C x r."""
    return 2 * 2 * _sum(model, lambda R, C: C * rank) * (world_size - 1) / world_size


def trion_gather(model: ModelShapes, rank: int, world_size: int) -> float:
    """Trion, released code (arXiv 2505.17967): all-gather of the orthogonalized low-rank momentum, max(R, C) x r."""
    return 2 * _sum(model, lambda R, C: max(R, C) * rank) * (world_size - 1) / world_size


def dct_adamw_broadcast(model: ModelShapes, rank: int, world_size: int) -> float:
    """DCT-AdamW, released code (ISTA-DASLab-Optimizers): every owner broadcasts the weights it has updated."""
    return 2 * model.parameters * (world_size - 1) / world_size


def galore_gather_at_refresh(model: ModelShapes, rank: int, world_size: int) -> float:
    """GaLore on gathered gradients, at a refresh: all-gather of every gradient for its SVD (arXiv 2403.03507)."""
    return 2 * _sum(model, lambda R, C: R * C) * (world_size - 1) / world_size


def galore_gather(model: ModelShapes, rank: int, world_size: int) -> float:
    """GaLore on gathered gradients, mean over the paper's 200 steps."""
    return galore_gather_at_refresh(model, rank, world_size) / _REFRESH


FORMULAS: dict[str, Callable[[ModelShapes, int, int], float]] = {
    "FSDP2 itself": fsdp2,
    "ISTA DCT-AdamW, broadcast": dct_adamw_broadcast,
    "Muon, gather": muon_gather,
    "Muon, all-to-all": muon_all_to_all,
    "Dion": dion,
    "Trion, released": trion_gather,
    "GaLore, gather at a refresh": galore_gather_at_refresh,
    "GaLore, gather, mean": galore_gather,
}
"""How others do it: label -> bytes a rank sends per step."""


def _sum(model: ModelShapes, size: Callable[[int, int], float]) -> float:
    return sum(size(rows, columns) for rows, columns in model.matrices)
