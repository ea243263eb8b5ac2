"""Matrices kept in 8 bits while they are trained: 1.03 bytes a number where bfloat16 takes 2.

Blocks of 128 numbers along a row: w = s c, c = -127 .. 127, s in float32. A step reads the matrix in float32, updates
it, and rounds it stochastically (``optim.storage.rounding``), so that updates far smaller than s are right on average.

    s stays  while  max |w| / 508 <= s and max |w| <= 127 s;  else  s <- 9/8 max |w| / 127

Where nothing is added to a number its code stays, bit for bit; a scale that followed the largest number of its block at
every step would round all the others anew, and they would wander.

Under FSDP2 codes and scales are gathered, half the bytes of bfloat16, and a layer computes with the matrix in its own
arithmetic; its gradient is an ordinary one. Rows are sharded, evenly.

Source: the weights of Q-GaLore, Zhang et al. (arXiv 2407.08296).

We differ: Q-GaLore has an offset beside the scale, and takes both from the block at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lowrank_train.optim.shards.blocks import row_blocks

__all__ = ["BLOCK", "Int8Weight", "held_bytes", "keep_in_int8"]

BLOCK = 128
_LEVELS = 127
_MARGIN = 9 / 8
_FEW_LEVELS = 4
"""How far below its range a block may shrink before its scale follows."""
_EXACT = 1e-3
"""A distance in units of a code: what is nearer is rounding in float32, not an update."""

_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


class Int8Weight(Tensor):
    """A matrix (m, n) that says it is bfloat16 and holds codes (m, n) int8 and scales (m, blocks) float32.

    What reads it gets numbers (``wide``); ``copy_`` and ``write`` write it. No other arithmetic is defined.
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Int8Weight:
        """From its parts, which it keeps."""
        made: Int8Weight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, dtype=torch.bfloat16, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, value: Tensor) -> Int8Weight:
        """Return a matrix rounded to the nearest int8 codes; on meta, only its shape."""
        return cls.empty(value.shape[0], value.shape[1], value.device).write(value)

    @classmethod
    def empty(cls, rows: int, columns: int, device: Any) -> Int8Weight:
        """Return zeros."""
        return cls(
            torch.zeros(rows, columns, dtype=torch.int8, device=device),
            torch.zeros(rows, math.ceil(columns / BLOCK), device=device),
        )

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers (m, n), made in float32 or wider, rows at a time."""
        result = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        exact = torch.promote_types(dtype, torch.float32)
        for rows in row_blocks(result.shape[0], result.shape[1], result.device):
            result[rows] = _times(self.codes[rows].to(exact), self.scale[rows])
        return result

    def write(self, value: Tensor, bits: Tensor | None = None) -> Int8Weight:
        """Store numbers (m, n); rounded by random bits (m, n) int32, which are used up, or to the nearest."""
        if value.device.type == "meta":
            return self
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        rows, columns = value.shape
        blocks = self.scale.shape[1]
        padded = torch.nn.functional.pad(value, (0, blocks * BLOCK - columns)) if columns % BLOCK else value
        largest = padded.view(rows, blocks, BLOCK).abs().amax(2).float()
        fits = (largest <= _LEVELS * self.scale) & (largest * _FEW_LEVELS >= _LEVELS * self.scale)
        self.scale.copy_(torch.where(fits, self.scale, largest * (_MARGIN / _LEVELS)))
        units = _times(value.clone(), self.scale.clamp_min(torch.finfo(torch.float32).tiny).reciprocal())
        nearest = units.round()
        if bits is not None:
            is_code = (units - nearest).abs_() < _EXACT
            noise = bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).to(units.dtype).div_(2**24)
            nearest = torch.where(is_code, nearest, noise.add_(units).floor_())
        self.codes.copy_(nearest.clamp_(-_LEVELS, _LEVELS))
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, device={self.device})"

    def __getitem__(self, rows: Any) -> Int8Weight:
        """Some rows, sharing memory."""
        return Int8Weight(self.codes[rows], self.scale[rows])

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _IMPLEMENTATIONS:
            raise NotImplementedError(
                f"{func} is not defined for weights kept in int8; compute with weight.wide(dtype), and write with copy_"
            )
        return _IMPLEMENTATIONS[func](*args, **(kwargs or {}))

    # ------------------------------------------------------------------------------------------------ FSDP2's extension

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return what is gathered.

        A single rank gathers the matrix itself, because FSDP2 copies only one tensor then.
        """
        if mesh.size() == 1:
            return (self.wide(policy.param_dtype or torch.bfloat16),), None
        if outer_size[0] % mesh.size():
            raise ValueError(
                f"a matrix of shape {tuple(outer_size)} kept in int8 does not shard evenly over {mesh.size()} ranks"
            )
        return (self.codes, self.scale), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Return the whole matrix in the type of the arithmetic."""
        if len(gathered) == 1:
            return (gathered[0], ()) if out is None else None
        value = Int8Weight(*gathered).wide(dtype)
        if out is None:
            return value, (value,)
        with torch.no_grad(), _unsafe_preserve_version_counter(out):  # as FSDP2 fills its own
            out.copy_(value)
        return None


def keep_in_int8(model: nn.Module, names: Sequence[str]) -> None:
    """Keep matrices of a model in int8, in place, before it is sharded; best on meta, and filled afterwards.

    Args:
        model: whose parameters they are.
        names: of parameters of two dimensions. Their optimizer must round stochastically:
            ``optim.param_groups(model, stochastic_rounding=True)``.

    Raises:
        ValueError: for a parameter of another number of dimensions.
    """
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        param = module.get_parameter(key)
        if param.ndim != 2:
            raise ValueError(f"{name!r} has shape {tuple(param.shape)}; expected a matrix to keep in int8")
        setattr(module, key, nn.Parameter(Int8Weight.of(param.detach()), requires_grad=param.requires_grad))


def held_bytes(param: Tensor, shape: Sequence[int] | None = None) -> int:
    """Return the bytes of (the part of ``shape`` of) a parameter that is not a DTensor; in int8, of its codes and
    scales.
    """
    shape = tuple(param.shape if shape is None else shape)
    if isinstance(param, Int8Weight):
        return shape[0] * (shape[1] + 4 * math.ceil(shape[1] / BLOCK))
    return math.prod(shape) * param.element_size()


def _times(value: Tensor, scale: Tensor) -> Tensor:
    """``value`` (m, n) times a number for each block, in place."""
    columns = value.shape[1]
    if columns % BLOCK == 0:
        value.view(value.shape[0], -1, BLOCK).mul_(scale.unsqueeze(2))
        return value
    return value.mul_(scale.repeat_interleave(BLOCK, dim=1)[:, :columns])


def _implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _IMPLEMENTATIONS[function] = implementation
        return implementation

    return register


aten = torch.ops.aten


@_implements(aten.detach.default, aten.alias.default, aten.view.default, aten.as_strided.default)
def _same(weight: Int8Weight, *shape: Any) -> Int8Weight:
    return Int8Weight(weight.codes, weight.scale)  # a view of any shape: FSDP2 flattens shards, and only keeps that


@_implements(aten.clone.default)
def _clone(weight: Int8Weight, **settings: Any) -> Int8Weight:
    return Int8Weight(weight.codes.clone(), weight.scale.clone())


@_implements(aten.empty_like.default, aten.zeros_like.default)
def _zeros_like(weight: Int8Weight, *, device: Any = None, dtype: Any = None, **settings: Any) -> Tensor:
    device = weight.device if device is None else device
    if dtype not in (None, torch.bfloat16):
        return torch.zeros(weight.shape, dtype=dtype, device=device)
    return Int8Weight.empty(weight.shape[0], weight.shape[1], device)


@_implements(aten.new_zeros.default, aten.new_empty.default)
def _new(weight: Int8Weight, size: Sequence[int], **settings: Any) -> Tensor:
    return Int8Weight.empty(size[0], size[1], weight.device)


@_implements(aten._to_copy.default)
def _to_copy(weight: Int8Weight, *, dtype: Any = None, device: Any = None, **settings: Any) -> Tensor:
    if dtype is None:
        return Int8Weight(weight.codes.to(device, copy=True), weight.scale.to(device, copy=True))
    value = weight.wide(dtype)
    return value if device is None else value.to(device)


@_implements(aten.copy_.default)
def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, Int8Weight) and isinstance(source, Int8Weight):
        target.codes.copy_(source.codes)
        target.scale.copy_(source.scale)
        return target
    if isinstance(target, Int8Weight):
        return target.write(source)
    assert isinstance(source, Int8Weight)
    return target.copy_(source.wide(target.dtype))


@_implements(aten.split.Tensor)
def _split(weight: Int8Weight, size: int, dim: int = 0) -> list[Int8Weight]:
    _check_rows(dim)
    return [
        Int8Weight(codes, scale)
        for codes, scale in zip(weight.codes.split(size), weight.scale.split(size), strict=True)
    ]


@_implements(aten.slice.Tensor)
def _slice(weight: Int8Weight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Int8Weight:
    _check_rows(dim)
    return weight[slice(start, end, step)]


def _check_rows(dim: int) -> None:
    if dim != 0:
        raise ValueError(
            "a matrix kept in int8 has a scale for every 128 numbers of a row, so its rows stay whole; expected it to "
            "be sharded along dimension 0"
        )
