"""A weight as the matrices (out, in) that a method works on; this lies between the parameters and the methods.

    weight_layout   shape of the weight   its matrices (out, in)
    "out,in"        (..., out, in)        one for each of the leading indices: a stack, as the experts of a layer are
    "in,out"        (..., in, out)        the same, transposed: weights that are multiplied from the right
    "out,rest"      (out, ...)            one, the first dimension by all others: the filters of a convolution

A method takes each matrix of a stack as a separate slot, called ``name[i]``. Its tensors are views, so the
method writes into the stack. The state of a stack has the leading dimensions of the weight before those of a matrix's.

A stack that is sharded along a leading dimension, as FSDP2 does by default, leaves whole matrices on each rank. Their
updates communicate nothing, and each rank may hold another number of them, or none. A stack that is sharded along
another dimension is as many sharded matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lowrank_train.optim.parameters.slot import Slot, stored_gradient
from lowrank_train.optim.shards.layout import StateTensor, chunk_sizes, local, sharded_dim

__all__ = ["LAYOUTS", "has_own_matrices", "is_taken_apart", "leading", "matrix_like", "parts", "stacked"]

LAYOUTS = ("out,in", "in,out", "out,rest")


def leading(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    """Return how many leading dimensions of a weight count matrices."""
    return 0 if group["weight_layout"] == "out,rest" else max(0, len(shape) - 2)


def is_taken_apart(shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """Return whether the matrices of a weight are something else than the weight itself."""
    transposed = group["weight_layout"] == "in,out" and len(shape) >= 2
    return group["role"] == "matrix" and (transposed or leading(shape, group) > 0)


def matrix_like(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a tensor like one matrix (out, in) of a weight, on meta."""
    rows, columns = param.shape[-2:]
    shape = (columns, rows) if group["weight_layout"] == "in,out" else (rows, columns)
    return torch.empty(shape, dtype=param.dtype, device="meta")


def stacked(layout: Mapping[str, StateTensor], param: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
    """Return the state of a whole weight, from the state of one of its matrices."""
    count = leading(param.shape, group)
    before, transposed = tuple(param.shape[:count]), group["weight_layout"] == "in,out"
    return {
        key: replace(spec, shape=(*before, *spec.shape), stacked=count, transposed=transposed)
        for key, spec in layout.items()
    }


def has_own_matrices(slot: Slot) -> bool:
    """Return whether this rank holds whole matrices of a stack that other ranks do not hold."""
    dim = sharded_dim(slot.param)
    return dim is not None and dim < leading(slot.param.shape, slot.group)


def parts(slot: Slot) -> Iterator[Slot]:
    """Yield the matrices of a weight that this rank has a part of; they share the memory of the weight."""
    count, transposed = leading(slot.param.shape, slot.group), slot.group["weight_layout"] == "in,out"
    param, gradient = slot.param.detach(), None if slot.grad is None else stored_gradient(slot)
    sizes, origin = local(param).shape[:count], _origin(param, count)
    for index in itertools.product(*map(range, sizes)):
        matrix = _matrix(param, index, transposed=transposed, replicas=True)
        if gradient is not None:
            if gradient.dtype != matrix.dtype:
                matrix.grad_dtype = gradient.dtype  # type: ignore[attr-defined]
            matrix.grad = _matrix(gradient, index, transposed=transposed, replicas=True)
        state = slot.state if count == 0 else {key: _matrix(value, index) for key, value in slot.state.items()}
        places = ", ".join(str(i + first) for i, first in zip(index, origin, strict=True))
        yield Slot(f"{slot.name}[{places}]" if count else slot.name, matrix, state, slot.group)


def _origin(param: Tensor, count: int) -> list[int]:
    """Return the leading indices of the first matrix of this rank."""
    origin, dim = [0] * count, sharded_dim(param)
    if dim is not None and dim < count:
        assert isinstance(param, DTensor)
        axis = next(i for i, placement in enumerate(param.placements) if isinstance(placement, Shard))
        sizes = chunk_sizes(param.shape[dim], param.device_mesh.size(axis))
        origin[dim] = sum(sizes[: param.device_mesh.get_local_rank(axis)])
    return origin


def _matrix(tensor: Tensor, index: tuple[int, ...], *, transposed: bool = False, replicas: bool = False) -> Tensor:
    """Return a view of a tensor at local leading indices, sharded alike; whole if a leading dimension is sharded.

    ``replicas``: a whole matrix keeps the mesh of the ranks that hold copies of it (HSDP).
    """
    block = local(tensor)[index]
    block = block.mT if transposed else block
    if not isinstance(tensor, DTensor):
        return block
    count, mesh = len(index), tensor.device_mesh
    placements = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            dim = placement.dim % tensor.ndim - count
            if dim < 0:
                others = _mesh_without(mesh, axis) if replicas and mesh.ndim > 1 else None
                if others is None:
                    return block
                return DTensor.from_local(block, others, [Replicate()] * others.ndim, run_check=False)
            placements[axis] = Shard(1 - dim if transposed else dim)
    shape = tensor.shape[count:]
    shape = torch.Size(reversed(shape)) if transposed else shape
    stride = (1, shape[0]) if transposed else tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(block, mesh, placements, run_check=False, shape=shape, stride=stride)


@lru_cache(maxsize=64)
def _mesh_without(mesh: DeviceMesh, axis: int) -> DeviceMesh:
    """Return the mesh of the ranks that have the same index along ``axis`` as this one."""
    others = [i for i in range(mesh.ndim) if i != axis]
    if len(others) == 1:
        return DeviceMesh.from_group(mesh.get_group(others[0]), mesh.device_type)
    assert mesh.mesh_dim_names is not None
    return mesh[tuple(mesh.mesh_dim_names[i] for i in others)]
