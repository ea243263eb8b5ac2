"""What ranks tell each other: sums over shards, decisions of one rank, rows that move, whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_train.optim.shards.layout import (
    _shard_info,
    _sharded_axes,
    _ShardInfo,
    chunk_sizes,
    first_column,
    local,
    matrix_shape,
    row_range,
)

__all__ = [
    "all_to_all",
    "decide_on_one_rank",
    "max_over_ranks",
    "max_over_shards",
    "on_whole_matrices",
    "put_rows",
    "sum_over_shards",
    "take_rows",
]


def sum_over_shards(params: Sequence[Tensor], statistics: Sequence[Tensor]) -> list[Tensor]:
    """Sum each statistic over the ranks that share its parameter: one all-reduce per process group and dtype.

    Every rank must call this with the same parameters in the same order.
    """
    totals = list(statistics)
    axes = [_sharded_axes(param) for param in params]
    for turn in range(max(map(len, axes), default=0)):  # more than one only for what several mesh axes shard
        buckets: dict[tuple[dist.ProcessGroup, torch.dtype], list[int]] = {}
        for i, own in enumerate(axes):
            if turn < len(own):
                buckets.setdefault((own[turn].group, statistics[i].dtype), []).append(i)
        for (group, _), members in buckets.items():
            flat = torch.cat([totals[i].reshape(-1) for i in members])
            dist.all_reduce(flat, group=group)
            for i, total in zip(members, flat.split([statistics[i].numel() for i in members]), strict=True):
                totals[i] = total.view_as(statistics[i])
    return totals


def take_rows(param: Tensor, block: Tensor, index: Tensor) -> Tensor:
    """Return rows ``index`` (global, CPU) of ``block``, a local tensor with a row for each local row of ``param``.

    Rows of other ranks are 0: ``sum_over_shards`` completes them.
    """
    here = row_range(param)
    mine = (index >= here.start) & (index < here.stop)
    rows = block.new_zeros(len(index), *block.shape[1:])
    rows[mine.to(block.device)] = block[(index[mine] - here.start).to(block.device)]
    return rows


def put_rows(param: Tensor, block: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write those of the (whole) rows that are this rank's into ``block``: the reverse of ``take_rows``."""
    here = row_range(param)
    mine = (index >= here.start) & (index < here.stop)
    block[(index[mine] - here.start).to(block.device)] = rows[mine.to(rows.device)].to(block.dtype)


def max_over_shards(param: Tensor, value: Tensor) -> Tensor:
    """Return the largest of each number over the ranks that share rows of a parameter; no communication if none do."""
    info = _shard_info(param)
    if info is not None and first_column(param) is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=info.group)
    return value


def max_over_ranks(param: Tensor, value: Tensor) -> Tensor:
    """Return the largest of each number over the ranks that share a parameter."""
    info = _shard_info(param)
    if info is not None and info.count > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=info.group)
    return value


def decide_on_one_rank(
    params: Sequence[Tensor],
    statistics: Callable[[int], Tensor],  # of this rank's shard of params[i]; they are large, so made when needed
    decide: Callable[[int, Tensor], dict[str, Tensor]],  # what only one rank may do, for params[i] and its sum
    like: Sequence[dict[str, Tensor]],  # shape and dtype of the decisions; on meta is enough
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield decisions equal on all ranks, each made by one of them: matrices are assigned to ranks in turn.

    Every rank must call this with the same parameters in the same order, and take every decision. Over replicas too
    (HSDP) one rank decides.

    Yields:
        (i, decision for params[i]), in order; those of other ranks arrive one by one, so only one need be held.
    """
    infos = [_shard_info(param) for param in params]
    width = max((info.count for info in infos if info is not None), default=1)
    for start in range(0, len(params), width):
        dealt = range(start, min(start + width, len(params)))
        mine: dict[int, Tensor] = {}
        for i in dealt:  # every sum first, or the owners would work one after the other
            info, total = infos[i], statistics(i)
            if info is not None and info.count > 1:
                dist.reduce(total, group=info.group, group_dst=i % info.count)
            if info is None or info.index == i % info.count:
                mine[i] = total
        decided = {i: decide(i, mine.pop(i)) for i in list(mine)}
        for i in dealt:
            device = local(params[i]).device
            decision = decided.pop(i, None) or {
                key: torch.empty(value.shape, dtype=value.dtype, device=device) for key, value in like[i].items()
            }
            for key, value in decision.items():
                decision[key] = value.to(like[i][key].dtype).contiguous()
                _broadcast(params[i], infos[i], decision[key], i)
            yield i, decision


def _broadcast(param: Tensor, info: _ShardInfo | None, value: Tensor, i: int) -> None:
    """From the owner to its shard group, then from the first replica to the others."""
    if not isinstance(param, DTensor):
        return
    if info is not None and info.count > 1:
        dist.broadcast(value, group=info.group, group_src=i % info.count)
    for axis in range(param.device_mesh.ndim):
        if (info is None or axis != info.axis) and param.device_mesh.size(axis) > 1:
            dist.broadcast(value, group=param.device_mesh.get_group(axis), group_src=0)


def on_whole_matrices(
    params: Sequence[Tensor],
    blocks: Sequence[Tensor],  # (m_local, d) each, as ``tall`` returns them, of one dtype
    compute: Callable[[Tensor], Tensor],  # (m, d) -> (m, d)
) -> list[Tensor]:
    """Return rows (m_local, d) of ``compute`` of every whole matrix, each made by one rank; they are assigned in turn.

    As many matrices as there are ranks travel at a time, in one all-to-all to their owners and one back. Every rank
    must call this with the same parameters in the same order.
    """
    results: list[Tensor] = list(blocks)
    groups: dict[dist.ProcessGroup, tuple[_ShardInfo, list[int]]] = {}
    for i, param in enumerate(params):
        info = _shard_info(param)
        if info is None or info.count == 1:
            results[i] = compute(blocks[i])
        else:
            groups.setdefault(info.group, (info, []))[1].append(i)
    for group, (info, members) in groups.items():
        for start in range(0, len(members), info.count):
            dealt = members[start : start + info.count]
            mine = dealt[info.index] if info.index < len(dealt) else None
            arriving: list[tuple[int, int]] = [(0, 0)] * info.count
            if mine is not None:
                d, m = sorted(matrix_shape(params[mine].shape))
                arriving = [(height, d) for height in chunk_sizes(m, info.count)]
            spare = [blocks[dealt[0]][:0]] * (info.count - len(dealt))
            received = all_to_all([*(blocks[i] for i in dealt), *spare], arriving, group)
            outgoing = received
            if mine is not None:
                outgoing = list(compute(torch.cat(received)).split([height for height, _ in arriving]))
            shapes = [(blocks[i].shape[0], blocks[i].shape[1]) for i in dealt] + [(0, 0)] * len(spare)
            for i, rows in zip(dealt, all_to_all(outgoing, shapes, group), strict=False):
                results[i] = rows
    return results


def all_to_all(outgoing: Sequence[Tensor], arriving: list[tuple[int, int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Send block i to rank i, and return the blocks received, of the given shapes, by sender."""
    send = torch.cat([block.reshape(-1) for block in outgoing])
    sizes = [math.prod(shape) for shape in arriving]
    received = send.new_empty(sum(sizes))
    dist.all_to_all_single(received, send, sizes, [block.numel() for block in outgoing], group=group)
    return [flat.view(shape) for flat, shape in zip(received.split(sizes), arriving, strict=True)]
