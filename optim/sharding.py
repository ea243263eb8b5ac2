"""Everything this package knows about DTensor and process groups.

The optimizers see plain local tensors. A matrix is handed to them *tall*: its unprojected dimension first, (m, d),
with m split over the ranks and d whole. Where a parameter is sharded along its unprojected dimension (what
``preferred_shard_dim`` asks for) that is a view; where somebody sharded the projected dimension instead, one
all-to-all turns the shards over, and one turns the update back. Either way the numbers are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from optim.blocks import row_blocks, widened
from optim.placements import is_scattered, part_of, work_dim

__all__ = [
    "StateTensor",
    "accumulator",
    "add_tall",
    "allocate",
    "block_origin",
    "chunk_sizes",
    "copy_into",
    "decide_on_one_rank",
    "first_column",
    "is_distributed",
    "is_sharded",
    "laid_out_as",
    "local",
    "local_shape",
    "matrix_shape",
    "max_over_ranks",
    "max_over_shards",
    "on_whole_matrices",
    "preferred_shard_dim",
    "projected_dim",
    "put_rows",
    "row_range",
    "shard_count",
    "sharded_dim",
    "sum_over_shards",
    "take_rows",
    "tall",
    "tall_weight",
    "turned_numbers",
]


@dataclass(frozen=True)
class StateTensor:
    """One tensor of optimizer state, by its global shape.

    layout:
        ``parameter``  an element-wise twin of the parameter, sharded as it is
        ``rows``       first dimension = the matrix's unprojected dimension, sharded over the same ranks
        ``leading``    first dimension = the parameter's first; sharded where that is, else equal on every rank
        ``replicated`` equal on every rank, on the parameter's device
        ``host``       equal on every rank, in CPU memory: what Python must read without a device sync

    ``stacked``: how many leading dimensions count matrices of a stack; the layout is that of one matrix, and where the
    parameter is split along one of these, so is the state. ``transposed``: a matrix is the transpose of its weight.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Literal["parameter", "rows", "leading", "replicated", "host"]
    stacked: int = 0
    transposed: bool = False

    def split_dim(self, shard_dim: int) -> int | None:
        """The dimension that is split where the parameter is split along ``shard_dim``; None: each rank has it all."""
        if shard_dim < self.stacked:
            return shard_dim
        if self.layout in ("replicated", "host") or len(self.shape) == self.stacked:
            return None
        inner = shard_dim - self.stacked
        inner = 1 - inner if self.transposed else inner
        if self.layout == "leading" and inner != 0:
            return None
        return self.stacked + (inner if self.layout == "parameter" else 0)


@dataclass(frozen=True)
class _ShardInfo:
    """How a DTensor is split: tensor dimension ``dim`` over the ranks of mesh axis ``axis``."""

    dim: int
    mesh: DeviceMesh
    axis: int

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(self.axis)

    @property
    def index(self) -> int:
        return self.mesh.get_local_rank(self.axis)

    @property
    def count(self) -> int:
        return self.mesh.size(self.axis)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter of more than two dimensions, where its role is ``matrix``: the first by all the others together."""
    return shape[0], math.prod(shape[1:])


def projected_dim(shape: Sequence[int]) -> int:
    """The dimension a low-rank method projects: the smaller one (columns when square), from the global shape only.

    Never from the number of ranks, or a checkpoint could not be loaded on another number of them.
    """
    rows, columns = matrix_shape(shape)
    return 1 if rows >= columns else 0


def preferred_shard_dim(shape: Sequence[int], world_size: int) -> int:
    """The dimension to shard a matrix along so that its projection is local: the unprojected one.

    FSDP2 refuses uneven shards on any dimension but 0; there the answer is 0, and the optimizer turns the shards over.
    """
    unprojected = 1 - projected_dim(shape)
    if len(shape) > 2:
        return 0
    return unprojected if shape[unprojected] % world_size == 0 else 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is. No communication, shared storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(param: Tensor) -> bool:
    """Whether a parameter is laid out on a mesh of ranks, sharded or not."""
    return isinstance(param, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied anywhere in a model, though its parameters may be gathered at the moment."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(param, DTensor) for param in model.parameters()
    )


def chunk_sizes(size: int, parts: int) -> list[int]:
    """Lengths ``torch.chunk`` and DTensor give to ``parts`` shards of ``size``; the last ones may be 0."""
    step = math.ceil(size / parts)
    return [max(0, min(step, size - i * step)) for i in range(parts)]


def local_shape(spec: StateTensor, shard_dim: int, index: int, parts: int) -> tuple[int, ...]:
    """Shape of shard ``index`` of ``parts`` of a state tensor whose parameter is sharded along ``shard_dim``."""
    dim = spec.split_dim(shard_dim)
    if dim is None:
        return spec.shape
    shape = list(spec.shape)
    step = math.ceil(shape[dim] / parts)
    shape[dim] = max(0, min(step, shape[dim] - index * step))  # as chunk_sizes, for any number of parts at once
    return tuple(shape)


def allocate(spec: StateTensor, param: Tensor, *, on_host: bool = False) -> Tensor:
    """Zeros for one state tensor of ``param``; a DTensor with explicit global shape and stride where it is sharded.

    A plain local tensor would be taken for replicated by every checkpoint path and silently overwritten.

    Args:
        spec: what to allocate.
        param: whose state it is.
        on_host: in CPU memory whatever the parameter's device, pinned where that is a GPU; sharded all the same.
    """
    if on_host and spec.layout != "host" and local(param).device.type != "cpu":
        return _on_host(allocate(spec, param))
    info = _shard_info(param) if not is_scattered(param) else None
    dim = spec.split_dim(info.dim) if info is not None else None
    device = torch.device("cpu") if spec.layout == "host" else local(param).device
    if not isinstance(param, DTensor) or (dim is None and spec.layout in ("replicated", "host")):
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    placements: list[Placement] = list(param.placements)
    shape = spec.shape
    if is_scattered(param):
        assert spec.layout == "parameter"
        assert spec.shape == tuple(param.shape)
        shape = tuple(local(param).shape)
    elif info is not None:
        shape = local_shape(spec, info.dim, info.index, info.count)
        placements[info.axis] = Replicate() if dim is None else Shard(dim)
    made = DTensor.from_local(
        torch.zeros(shape, dtype=spec.dtype, device=local(param).device),
        param.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(spec.shape),
        stride=_contiguous_stride(spec.shape),
    )
    if local(made).device == device:
        return made
    there = made if local(made).is_meta else made.cpu()
    there._local_tensor = torch.zeros(shape, dtype=spec.dtype)  # type: ignore[attr-defined]
    return there


def _on_host(tensor: Tensor) -> Tensor:
    if local(tensor).is_meta:
        return tensor
    pinned = torch.zeros(local(tensor).shape, dtype=tensor.dtype, pin_memory=True)
    if not isinstance(tensor, DTensor):
        return pinned
    there = tensor.cpu()  # keeps mesh and placements, which from_local would not: it moves to the mesh's device
    there._local_tensor = pinned  # type: ignore[attr-defined]  # as FSDP2's own CPU offload does
    return there


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a loaded state tensor into an allocated one, dtype and placement of the target kept."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor) and is_scattered(target):
        value = part_of(value, target)
    elif isinstance(target, DTensor) and not isinstance(value, DTensor):
        for axis, placement in enumerate(target.placements):
            if isinstance(placement, Shard):
                sizes = chunk_sizes(target.shape[placement.dim], target.device_mesh.size(axis))
                index = target.device_mesh.get_local_rank(axis)
                value = value.narrow(placement.dim, sum(sizes[:index]), sizes[index])
    elif isinstance(value, DTensor):
        if isinstance(target, DTensor) and value.placements != target.placements:
            value = value.redistribute(target.device_mesh, target.placements)
        value = value.to_local() if isinstance(target, DTensor) else value.full_tensor()
    local(target).copy_(value)


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


def first_column(param: Tensor) -> int | None:
    """Where this rank's columns begin, if the parameter is sharded along its last dimension (and has another).

    None where several mesh axes shard it: what depends on columns works on it gathered (``optim.placements``).
    """
    if is_scattered(param):
        return None
    info = _shard_info(param)
    if info is None or info.count == 1 or param.ndim != 2 or info.dim != 1:
        return None
    return sum(chunk_sizes(param.shape[1], info.count)[: info.index])


def block_origin(tensor: Tensor) -> tuple[int, int]:
    """Row and column of the whole matrix (the first dimension by all others) where this rank's part begins.

    Of more than two dimensions, cut along another than the first, the columns are those of the cut part.
    """
    info = _shard_info(tensor)
    if info is None or info.count == 1:
        return 0, 0
    start = sum(chunk_sizes(tensor.shape[info.dim], info.count)[: info.index])
    return (start, 0) if info.dim == 0 else (0, start * math.prod(tensor.shape[info.dim + 1 :]))


def laid_out_as(tensor: Tensor, block: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor that is sharded as another, with this local part: of the same shape unless told otherwise."""
    if not isinstance(tensor, DTensor):
        return block
    whole = torch.Size(tensor.shape if shape is None else shape)
    stride = _contiguous_stride(whole)
    return DTensor.from_local(block, tensor.device_mesh, tensor.placements, run_check=False, shape=whole, stride=stride)


def row_range(param: Tensor) -> range:
    """Global indices of the rows this rank holds. Raises ValueError if it holds parts of rows."""
    info = _shard_info(param)
    if info is None or info.count == 1:
        return range(param.shape[0])
    if info.dim != 0:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is sharded along dimension {info.dim}; its rows (singular "
            "vectors or factors) must stay whole: shard it along dimension 0, as fully_shard does unless told otherwise"
        )
    sizes = chunk_sizes(param.shape[0], info.count)
    start = sum(sizes[: info.index])
    return range(start, start + sizes[info.index])


def take_rows(param: Tensor, block: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (global, CPU) of ``block``, a local tensor with a row for each local row of ``param``.

    Rows of other ranks are 0: ``sum_over_shards`` completes them.
    """
    here = row_range(param)
    mine = (index >= here.start) & (index < here.stop)
    rows = block.new_zeros(len(index), *block.shape[1:])
    rows[mine.to(block.device)] = block[(index[mine] - here.start).to(block.device)]
    return rows


def put_rows(param: Tensor, block: Tensor, index: Tensor, rows: Tensor) -> None:
    """The reverse of ``take_rows``: write those of the (whole) rows that are this rank's into ``block``."""
    here = row_range(param)
    mine = (index >= here.start) & (index < here.stop)
    block[(index[mine] - here.start).to(block.device)] = rows[mine.to(rows.device)].to(block.dtype)


def max_over_shards(param: Tensor, value: Tensor) -> Tensor:
    """Largest of each number over the ranks that share rows of a parameter; no communication if none do."""
    info = _shard_info(param)
    if info is not None and first_column(param) is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=info.group)
    return value


def max_over_ranks(param: Tensor, value: Tensor) -> Tensor:
    """Largest of each number over the ranks that share a parameter."""
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
    """Decisions equal on all ranks, each made by one of them: matrices are dealt round, one each at a time.

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


def sharded_dim(param: Tensor) -> int | None:
    """The dimension a parameter is really split along, in a step; None if every rank holds it whole."""
    if is_scattered(param):
        return work_dim(param)[0]
    info = _shard_info(param)
    return info.dim if info is not None and info.count > 1 else None


def shard_count(param: Tensor) -> int:
    """Over how many ranks a parameter is split in a step."""
    if is_scattered(param):
        return work_dim(param)[1]
    info = _shard_info(param)
    return info.count if info is not None else 1


def turned_numbers(shape: Sequence[int], shard_dim: int, world_size: int) -> tuple[int, int]:
    """Numbers a rank sends when a matrix is turned over, and when its update is turned back; the largest share.

    None if it is sharded along the dimension that is not projected.
    """
    if world_size == 1 or shard_dim != projected_dim(shape):
        return 0, 0
    d, m = sorted(matrix_shape(shape))
    return m * math.ceil(d / world_size), math.ceil(m / world_size) * d


def on_whole_matrices(
    params: Sequence[Tensor],
    blocks: Sequence[Tensor],  # (m_local, d) each, as ``tall`` returns them, of one dtype
    compute: Callable[[Tensor], Tensor],  # (m, d) -> (m, d)
) -> list[Tensor]:
    """Rows (m_local, d) of ``compute`` of every whole matrix, each made by one rank: they are dealt round.

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
            received = _all_to_all([*(blocks[i] for i in dealt), *spare], arriving, group)
            outgoing = received
            if mine is not None:
                outgoing = list(compute(torch.cat(received)).split([height for height, _ in arriving]))
            shapes = [(blocks[i].shape[0], blocks[i].shape[1]) for i in dealt] + [(0, 0)] * len(spare)
            for i, rows in zip(dealt, _all_to_all(outgoing, shapes, group), strict=False):
                results[i] = rows
    return results


def tall(param: Tensor, tensor: Tensor) -> Tensor:
    """Local tall block (m_local, d) of a tensor shaped and sharded as ``param``; m is the unprojected dimension.

    Where ``param`` is sharded along its projected dimension this is a collective, to be entered by every rank.
    """
    block = _tall_view(param, _flat(local(tensor)))
    info = _shard_info(param)
    if info is None or not _is_turned(param, info):
        return block
    rows, columns = _turned_sizes(param, info)
    arriving = [(rows[info.index], width) for width in columns]
    return torch.cat(_all_to_all(block.split(rows), arriving, info.group), dim=1)


def tall_weight(param: Tensor) -> Tensor | None:
    """The weight in memory seen as its tall block (m_local, d); None where it cannot be seen so."""
    info = _shard_info(param)
    if (info is not None and _is_turned(param, info)) or not (param.ndim == 2 or local(param).is_contiguous()):
        return None
    weight = local(param)
    return _tall_view(param, weight.view(weight.shape[0], math.prod(weight.shape[1:])))


def accumulator(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros (m_local, d) to sum an update in that ``add_tall`` then adds, where there is no ``tall_weight``."""
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
        update = torch.cat(_all_to_all(update.split(columns, dim=1), arriving, info.group), dim=0)
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


def _all_to_all(outgoing: Sequence[Tensor], arriving: list[tuple[int, int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Send block i to rank i; returns the blocks received, of the given shapes, by sender."""
    send = torch.cat([block.reshape(-1) for block in outgoing])
    sizes = [math.prod(shape) for shape in arriving]
    received = send.new_empty(sum(sizes))
    dist.all_to_all_single(received, send, sizes, [block.numel() for block in outgoing], group=group)
    return [flat.view(shape) for flat, shape in zip(received.split(sizes), arriving, strict=True)]


def _shard_info(param: Tensor) -> _ShardInfo | None:
    """None for a tensor that every rank holds whole; raises ValueError for one that is sharded over several axes."""
    if not isinstance(param, DTensor):
        return None
    if is_scattered(param):
        raise ValueError(
            f"cannot work on a parameter of shape {tuple(param.shape)} with placements {tuple(param.placements)} on "
            f"mesh {param.device_mesh}; expected Replicate and at most one Shard"
        )
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            return _ShardInfo(placement.dim % param.ndim, param.device_mesh, axis)
    return None


def _sharded_axes(param: Tensor) -> list[_ShardInfo]:
    """Every mesh axis over which the numbers of a parameter are spread."""
    if not isinstance(param, DTensor):
        return []
    axes = [
        _ShardInfo(placement.dim % param.ndim, param.device_mesh, axis)  # type: ignore[attr-defined]
        for axis, placement in enumerate(param.placements)
        if type(placement) is not Replicate
    ]
    return [info for info in axes if info.count > 1]


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()
