"""Everything this package knows about DTensor and process groups.

The optimizers see plain local tensors. A matrix is handed to them *tall*: its unprojected dimension first, (m, d),
with m split over the ranks and d whole. Where a parameter is sharded along its unprojected dimension (what
``preferred_shard_dim`` asks for) that is a view; where somebody sharded the projected dimension instead, one
all-to-all turns the shards over, and one turns the update back. Either way the numbers are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lowrank_train.optim.shards.placements import is_scattered, part_of, work_dim

__all__ = [
    "StateTensor",
    "allocate",
    "block_origin",
    "chunk_sizes",
    "copy_into",
    "first_column",
    "is_distributed",
    "is_sharded",
    "laid_out_as",
    "local",
    "local_shape",
    "matrix_shape",
    "preferred_shard_dim",
    "projected_dim",
    "row_range",
    "shard_count",
    "sharded_dim",
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
        """Return the dimension that is split where the parameter is split along ``shard_dim``; None: each rank has it
        all.
        """
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
    """Return (rows, columns) of a parameter. With more than two dimensions: the first by all the others together."""
    return shape[0], math.prod(shape[1:])


def projected_dim(shape: Sequence[int]) -> int:
    """Return the dimension that a low-rank method projects: the smaller one (columns when square), from the global
    shape only.

    Never from the number of ranks, or a checkpoint could not be loaded on another number of them.
    """
    rows, columns = matrix_shape(shape)
    return 1 if rows >= columns else 0


def preferred_shard_dim(shape: Sequence[int], world_size: int) -> int:
    """Return the dimension to shard a matrix along so that its projection is local: the unprojected one.

    FSDP2 refuses uneven shards on any dimension but 0; there the answer is 0, and the optimizer turns the shards over.
    """
    unprojected = 1 - projected_dim(shape)
    if len(shape) > 2:
        return 0
    return unprojected if shape[unprojected] % world_size == 0 else 0


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is. No communication, shared storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(param: Tensor) -> bool:
    """Return whether a parameter is laid out on a mesh of ranks, sharded or not."""
    return isinstance(param, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was applied anywhere in a model, though its parameters may be gathered at the
    moment.
    """
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(param, DTensor) for param in model.parameters()
    )


def chunk_sizes(size: int, parts: int) -> list[int]:
    """Return the lengths that ``torch.chunk`` and DTensor give to ``parts`` shards of ``size``; the last may be 0."""
    step = math.ceil(size / parts)
    return [max(0, min(step, size - i * step)) for i in range(parts)]


def local_shape(spec: StateTensor, shard_dim: int, index: int, parts: int) -> tuple[int, ...]:
    """Return the shape of shard ``index`` of ``parts`` of a state tensor whose parameter is sharded along
    ``shard_dim``.
    """
    dim = spec.split_dim(shard_dim)
    if dim is None:
        return spec.shape
    shape = list(spec.shape)
    step = math.ceil(shape[dim] / parts)
    shape[dim] = max(0, min(step, shape[dim] - index * step))  # as chunk_sizes, for any number of parts at once
    return tuple(shape)


def allocate(spec: StateTensor, param: Tensor, *, on_host: bool = False) -> Tensor:
    """Return zeros for one state tensor of ``param``; a DTensor with explicit global shape and stride where it is
    sharded.

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


def first_column(param: Tensor) -> int | None:
    """Return where this rank's columns begin, if the parameter is sharded along its last dimension (and has another).

    None where several mesh axes shard it: what depends on columns works on it gathered (``optim.shards.placements``).
    """
    if is_scattered(param):
        return None
    info = _shard_info(param)
    if info is None or info.count == 1 or param.ndim != 2 or info.dim != 1:
        return None
    return sum(chunk_sizes(param.shape[1], info.count)[: info.index])


def block_origin(tensor: Tensor) -> tuple[int, int]:
    """Return row and column of the whole matrix (the first dimension by all others) where this rank's part begins.

    Of more than two dimensions, cut along another than the first, the columns are those of the cut part.
    """
    info = _shard_info(tensor)
    if info is None or info.count == 1:
        return 0, 0
    start = sum(chunk_sizes(tensor.shape[info.dim], info.count)[: info.index])
    return (start, 0) if info.dim == 0 else (0, start * math.prod(tensor.shape[info.dim + 1 :]))


def laid_out_as(tensor: Tensor, block: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor that is sharded as another, with this local part: of the same shape unless told otherwise."""
    if not isinstance(tensor, DTensor):
        return block
    whole = torch.Size(tensor.shape if shape is None else shape)
    stride = _contiguous_stride(whole)
    return DTensor.from_local(block, tensor.device_mesh, tensor.placements, run_check=False, shape=whole, stride=stride)


def row_range(param: Tensor) -> range:
    """Return the global indices of the rows this rank holds. Raises ValueError if it holds parts of rows."""
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


def sharded_dim(param: Tensor) -> int | None:
    """Return the dimension a parameter is really split along, in a step; None if every rank holds it whole."""
    if is_scattered(param):
        return work_dim(param)[0]
    info = _shard_info(param)
    return info.dim if info is not None and info.count > 1 else None


def shard_count(param: Tensor) -> int:
    """Return over how many ranks a parameter is split in a step."""
    if is_scattered(param):
        return work_dim(param)[1]
    info = _shard_info(param)
    return info.count if info is not None else 1


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
