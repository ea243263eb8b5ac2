"""Placements of parameters and gradients on a mesh of ranks, and the layout in which a step works on them.

Two things differ from what the methods of this package expect:

    a gradient placed otherwise than its parameter    tensor and sequence parallelism leave partial sums; they are
                                                      redistributed to the parameter's placements where they are read
    a parameter sharded over several mesh axes        tensor parallelism together with FSDP2, or a packed layer; what
                                                      needs more than single numbers works on it in a *work layout*

The work layout keeps one sharded axis, in contiguous pieces, and is replicated over the others. The state of such a
parameter is allocated in it. The weight and the gradient are gathered over the other axes for the step, and each rank
takes its part of the new weight back, which needs no communication along the axes that were gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "check_even",
    "check_not_scattered",
    "from_work_layout",
    "in_work_layout",
    "is_scattered",
    "layout_key",
    "part_of",
    "placed_as",
    "reshard",
    "work_copies",
    "work_dim",
]


def layout_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what optimizer state depends on: global shape, dtype, device and, of a DTensor, its placements."""
    placements = tensor.placements if isinstance(tensor, DTensor) else None
    return tuple(tensor.shape), tensor.dtype, tensor.device, placements


def is_scattered(param: Tensor) -> bool:
    """Return whether a parameter is sharded over several mesh axes, or over one in pieces that are not contiguous.

    Raises ValueError for a parameter that holds partial sums.
    """
    if not isinstance(param, DTensor):
        return False
    kinds = [type(placement) for placement in param.placements if type(placement) is not Replicate]
    if any(issubclass(kind, Partial) for kind in kinds):
        raise ValueError(
            f"cannot optimize a parameter of shape {tuple(param.shape)} with placements {tuple(param.placements)}: "
            "its value is a partial sum; expected Replicate or Shard: redistribute the parameter"
        )
    return len(kinds) > 1 or any(kind is not Shard for kind in kinds)


def placed_as(gradient: Tensor, param: Tensor, name: str) -> Tensor:
    """Return a gradient with its parameter's placements; a collective where the placements differ.

    Raises ValueError if only one of the two is distributed.
    """
    if isinstance(gradient, DTensor) != isinstance(param, DTensor):
        whole, parts = (param, gradient) if isinstance(gradient, DTensor) else (gradient, param)
        raise ValueError(
            f"{name!r} and its gradient are not distributed alike: one is a plain tensor of shape "
            f"{tuple(whole.shape)}, the other a DTensor with placements {tuple(_placements(parts))}; expected the "
            "gradient that backward() left"
        )
    if not isinstance(gradient, DTensor) or gradient.placements == _placements(param):
        return gradient
    return _moved(gradient, _placements(param))


def in_work_layout(tensor: Tensor, like: Tensor, *, values: bool) -> Tensor:
    """Return a tensor in the work layout of a scattered parameter; a collective if its values are wanted.

    Args:
        tensor: the parameter, or its gradient with any placements.
        like: the parameter.
        values: without them the result has the work layout's shapes and takes no memory.
    """
    assert isinstance(like, DTensor)
    placements = _work_placements(like)
    if values:
        return _moved(tensor, placements)
    shape = list(like.shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            shape[placement.dim] = _chunk(like.shape[placement.dim], like.device_mesh, axis)
    empty = torch.empty((), dtype=like.dtype, device=like.to_local().device).expand(shape)
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(empty, like.device_mesh, placements, run_check=False, shape=like.shape, stride=stride)


def from_work_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor in the work layout of ``like``, placed as ``like`` is."""
    assert isinstance(like, DTensor)
    moved = _moved(tensor, like.placements)
    assert isinstance(moved, DTensor)
    return moved.to_local()


def check_not_scattered(name: str, param: Tensor, method: str) -> None:
    """Raise ValueError for a scattered parameter of a method that reads its parameters between steps too."""
    if is_scattered(param):
        raise ValueError(
            f"{method} cannot train {name!r} of shape {tuple(param.shape)}, which is sharded over several mesh axes "
            f"({', '.join(map(str, _placements(param)))}), as tensor parallelism with FSDP2 does; shard it over one, "
            "or take a method that docs/swap.md lists for both"
        )


def check_even(name: str, param: Tensor) -> None:
    """Raise ValueError where DTensor cannot gather a parameter: pieces that are strided and not equally long."""
    placements, mesh = _placements(param), param.device_mesh  # type: ignore[attr-defined]
    for strided in placements:
        if type(strided) in (Replicate, Shard):
            continue
        dim = strided.dim % param.ndim  # type: ignore[attr-defined]
        own = [mesh.size(axis) for axis, other in enumerate(placements) if getattr(other, "dim", None) == strided.dim]  # type: ignore[attr-defined]
        if param.shape[dim] % math.prod(own):
            ranks = " x ".join(map(str, own))
            raise ValueError(
                f"{name!r} of shape {tuple(param.shape)} is sharded along dimension {dim} over {ranks} ranks in pieces "
                "of different lengths, which DTensor cannot gather; expected a dimension that their product divides, "
                "or one mesh axis"
            )


def work_copies(param: Tensor) -> int:
    """Return how many ranks hold the same piece of a scattered parameter in the work layout; 1 for any other."""
    if not is_scattered(param):
        return 1
    assert isinstance(param, DTensor)
    kept = _work_placements(param)
    mesh = param.device_mesh
    return math.prod(
        mesh.size(axis)
        for axis, placement in enumerate(param.placements)
        if type(placement) is not Replicate and type(kept[axis]) is Replicate
    )


def work_dim(param: Tensor) -> tuple[int, int]:
    """Return the dimension that a scattered parameter's work layout shards, and over how many ranks."""
    assert isinstance(param, DTensor)
    for axis, placement in enumerate(_work_placements(param)):
        if isinstance(placement, Shard):
            return placement.dim, param.device_mesh.size(axis)
    raise AssertionError


def part_of(whole: Tensor, target: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, equal on all ranks, where ``target`` is scattered."""
    assert isinstance(target, DTensor)
    whole = whole.to(target.to_local().device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of FSDP2, so that the model's modules hold the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _placements(tensor: Tensor) -> tuple[Placement, ...]:
    assert isinstance(tensor, DTensor)
    return tensor.placements


def _work_placements(param: DTensor) -> list[Placement]:
    """Keep the axis of most ranks; among equals one in contiguous pieces, the last, which costs one gather."""
    sizes = {
        axis: (param.device_mesh.size(axis), type(placement) is Shard, axis)
        for axis, placement in enumerate(param.placements)
        if type(placement) is not Replicate
    }
    kept = max(sizes, key=lambda axis: sizes[axis])
    placements: list[Placement] = [Replicate()] * param.device_mesh.ndim
    placements[kept] = Shard(param.placements[kept].dim % param.ndim)  # type: ignore[attr-defined]
    return placements


def _moved(tensor: Tensor, placements: Sequence[Placement]) -> Tensor:
    """Redistribute, one collective at a time: DTensor logs a warning where it has to make several at once."""
    assert isinstance(tensor, DTensor)
    start: Sequence[Placement] = tensor.placements
    # strided pieces lie inside those of later axes, contiguous ones inside those of earlier axes: the inner ones first
    axes = range(tensor.device_mesh.ndim)
    inner_first = sorted(axes, key=lambda axis: (type(start[axis]) is Shard, -axis))
    with torch.no_grad():
        for axis in inner_first:
            if tensor.placements[axis] != placements[axis] and type(tensor.placements[axis]) is not Replicate:
                gathered = list(tensor.placements)
                gathered[axis] = Replicate()
                tensor = tensor.redistribute(placements=gathered)
        return tensor.redistribute(placements=list(placements))


def _chunk(size: int, mesh: DeviceMesh, axis: int) -> int:
    """Return the length of this rank's piece, as torch.chunk cuts."""
    step = -(-size // mesh.size(axis))
    return max(0, min(step, size - step * mesh.get_local_rank(axis)))
