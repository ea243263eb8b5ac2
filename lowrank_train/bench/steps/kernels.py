"""Kernels and bytes of an optimizer's step, counted on tensors that hold no numbers.

The step runs on the meta device, where an operator only says which shape its result has. Python then takes the path it
takes on an accelerator: whole matrices instead of the blocks that fit a CPU's cache, products instead of a Fourier
transform. What is counted is exact:

    kernels   operators that are not views, on tensors of the device
    bytes     what these operators read and write: their arguments, and their results or what they change in place
    products  floating-point operations of matrix products, by torch's own formulas

A list operator (``torch._foreach_*``, a fused optimizer) counts as one kernel; on a GPU it is launched once for about
20 million numbers. Decompositions (QR, SVD) count as one kernel with their bytes; their operations are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # private, and so imported by this benchmark alone
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Kernel", "StepCount", "count"]

_ATEN = torch.ops.aten

_NO_KERNELS = {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.empty_strided.default, _ATEN.detach.default}

_DECOMPOSITIONS = ("linalg_qr", "linalg_svd", "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_cholesky_ex")


@dataclass(frozen=True)
class Kernel:
    """One operator: what it is called, the bytes it moves, and the operations of its product."""

    name: str
    bytes: int
    flops: int


@dataclass
class StepCount:
    """All kernels of one step, and how often Python asked the device for a number."""

    kernels: list[Kernel] = field(default_factory=list)
    device_reads: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def decompositions(self) -> int:
        """QR, SVD and eigenvalue decompositions among the kernels."""
        return sum(kernel.name.startswith(_DECOMPOSITIONS) for kernel in self.kernels)

    def seconds(self, bandwidth: float, rate: float, launch: float) -> float:
        """Return the time that the step needs at least: each kernel the longest of its three needs.

        Args:
            bandwidth: bytes a second.
            rate: operations of products a second.
            launch: seconds between two launches.
        """
        return sum(max(launch, kernel.bytes / bandwidth, kernel.flops / rate) for kernel in self.kernels)


def count(optimizer: torch.optim.Optimizer) -> StepCount:
    """Run one step of an optimizer of parameters on the meta device, and return what it consists of."""
    counter = _Counter()
    with counter:
        optimizer.step()
    return counter.found


class _Counter(TorchDispatchMode):
    """Notes every operator on the device, and answers what Python asks of tensors without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found = StepCount()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asks = any(tensor.is_meta for tensor in given)
        if asks and func is _ATEN._local_scalar_dense.default:
            self.found.device_reads += 1
            return 1.0 if given[0].is_floating_point() else 1
        if asks and func is _ATEN._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.found.device_reads += 1
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        made = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        if func.is_view or func in _NO_KERNELS or not any(tensor.is_meta for tensor in [*given, *results]):
            return made
        formula = flop_registry.get(getattr(_ATEN, func._overloadpacket.__name__.rstrip("_"), None))
        self.found.kernels.append(
            Kernel(
                name=func._overloadpacket.__name__,
                bytes=_moved(func, args, kwargs, given, results),
                flops=formula(*args, **kwargs, out_val=made) if formula else 0,
            )
        )
        return made


def _moved(func: Any, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor]) -> int:
    """Bytes read and written; what is changed in place is both, unless it is only overwritten."""
    names = [argument.name for argument in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [name for name in written if name != "grads"]  # fused optimizers write them with a grad_scale only
    changed = [leaf for name in written for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]
    overwrites = func._overloadpacket in (_ATEN.copy_, _ATEN.zero_, _ATEN.fill_)
    read = sum(map(_size, given)) - (sum(map(_size, changed)) if overwrites else 0)
    return read + sum(map(_size, changed if written else results))


def _size(tensor: Tensor) -> int:
    """Bytes that a tensor occupies; of an expanded one, those that are there."""
    there = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(there) * tensor.element_size()
