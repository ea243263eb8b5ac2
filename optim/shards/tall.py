"""A matrix as (m, d) with its unprojected dimension m sharded and its projected dimension d whole, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_train.optim.shards.blocks import row_blocks, widened
from lowrank_train.optim.shards.collectives import all_to_all
from lowrank_train.optim.shards.layout import _shard_info, _ShardInfo, chunk_sizes, local, matrix_shape, projected_dim

__all__ = ["accumulator", "add_tall", "tall", "tall_weight", "turned_numbers"]


def turned_numbers(shape: Sequence[int], shard_dim: int, world_size: int) -> tuple[int, int]:
    """Return how many numbers a rank sends to reshard a matrix, and to reshard its update back; the largest share.

    None if it is sharded along the dimension that is not projected.
    """
    if world_size == 1 or shard_dim != projected_dim(shape):
        return 0, 0
    d, m = sorted(matrix_shape(shape))
    return m * math.ceil(d / world_size), math.ceil(m / world_size) * d


def tall(param: Tensor, tensor: Tensor) -> Tensor:
    """Return the local tall block (m_local, d) of a tensor shaped and sharded as ``param``; m is the unprojected
    dimension.

    Where ``param`` is sharded along its projected dimension this is a collective, to be entered by every rank.
    """
    block = _tall_view(param, _flat(local(tensor)))
    info = _shard_info(param)
    if info is None or not _is_turned(param, info):
        return block
    rows, columns = _turned_sizes(param, info)
    arriving = [(rows[info.index], width) for width in columns]
    return torch.cat(all_to_all(block.split(rows), arriving, info.group), dim=1)


def tall_weight(param: Tensor) -> Tensor | None:
    """Return the weight in memory seen as its tall block (m_local, d); None where it cannot be seen so."""
    info = _shard_info(param)
    if (info is not None and _is_turned(param, info)) or not (param.ndim == 2 or local(param).is_contiguous()):
        return None
    weight = local(param)
    return _tall_view(param, weight.view(weight.shape[0], math.prod(weight.shape[1:])))


def accumulator(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros (m_local, d) to sum an update that ``add_tall`` then adds, where there is no ``tall_weight``."""
    info = _shard_info(param)
    rows = local(param).shape[0] if projected_dim(param.shape) == 1 else matrix_shape(param.shape)[1]
    if info is not None and _is_turned(param, info):
        rows = _turned_sizes(param, info)[0][info.index]
    return torch.zeros(rows, min(matrix_shape(param.shape)), dtype=dtype, device=local(param).device)


def add_tall(param: Tensor, update: Tensor, decay: float | Tensor | None = None) -> None:
    """Add a tall update (m_local, d), laid out as ``tall`` returns it, to the parameter in place; collective alike.

    The parameter is multiplied by ``decay`` first. A parameter of fewer bits than the update is rounded once.
    """
    info = _shard_info(param)
    if info is not None and _is_turned(param, info):
        rows, columns = _turned_sizes(param, info)
        arriving = [(height, columns[info.index]) for height in rows]
        update = torch.cat(all_to_all(update.split(columns, dim=1), arriving, info.group), dim=0)
    weight = local(param)
    update = _tall_view(param, update).reshape(weight.shape)
    dtype = torch.promote_types(weight.dtype, update.dtype)
    for part in row_blocks(weight.shape[0], math.prod(weight.shape[1:]), weight.device):
        with widened(weight[part], dtype, decay) as block:
            block.add_(update[part])


def _flat(block: Tensor) -> Tensor:
    """Two dimensions; a view unless the memory format forbids it."""
    return block if block.ndim == 2 else block.reshape(block.shape[0], math.prod(block.shape[1:]))


def _tall_view(param: Tensor, block: Tensor) -> Tensor:
    return block if projected_dim(param.shape) == 1 else block.mT


def _is_turned(param: Tensor, info: _ShardInfo) -> bool:
    """Whether a parameter is really split, and along the dimension that is projected."""
    if param.ndim > 2 and info.dim > 0:
        raise ValueError(
            f"cannot project a parameter of shape {tuple(param.shape)} sharded along dimension {info.dim}: with more "
            "than two dimensions it must be sharded along the first, as FSDP2 does by default"
        )
    return info.count > 1 and info.dim == projected_dim(param.shape)


def _turned_sizes(param: Tensor, info: _ShardInfo) -> tuple[list[int], list[int]]:
    """Shares of the ranks in the unprojected (m) and in the projected dimension (d)."""
    d, m = sorted(matrix_shape(param.shape))
    return chunk_sizes(m, info.count), chunk_sizes(d, info.count)
