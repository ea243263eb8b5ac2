"""Optimizer state in fewer bits.

Moments, block-wise (``state_dtype="8bit"``): blocks of 128 numbers along the last dimension of the *global* tensor,
s = largest magnitude of the block (float32), and codes that are finer near zero, as moments are:

    first moment,  signed:    x = s sgn(c) (c / 127)^2,   c = -127 .. 127
    second moment, unsigned:  x = s (c / 255)^4,          c = 0 .. 255;  a positive number never becomes 0

In 4 bits (``state_dtype="4bit"``), two codes a byte, columns j and j + 1 together:

    first moment,  signed:    x = s sgn(c) (c / 7)^2,     c = -7 .. 7
    second moment, unsigned:  x = s ((c + 1) / 16)^2,     c = 0 .. 15;  nothing becomes 0 but a block of zeros

Error feedback, row-wise and uniform: x = s c with s = largest magnitude of the row / 127, c in 8 bits.

Which tensors are quantised, and in what blocks, follows from global shapes alone, so precision never depends on the
number of ranks. torchao's 8-bit state decides by the size of the local shard and needs it to be a multiple of its
block, which low-rank moments (m, r) seldom are; hence a storage of our own.

Sources: block-wise quantisation, Dettmers et al. (arXiv 2110.02861); 4 bits, and no zero for
the second moment, Li et al. (arXiv 2309.01507), where it is linear; rows for error feedback, Modoranu et al.
(arXiv 2505.17967), whose released 8-bit code uses 16 levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowrank_train.optim.shards.layout import StateTensor, local

__all__ = [
    "BITS",
    "MOMENTS",
    "STATE_DTYPES",
    "as_stored",
    "decode_rows",
    "dequantize",
    "encode_rows",
    "quantize",
    "read",
    "replace",
    "write",
]

BLOCK = 128
_MIN_NUMBERS = 4096
"""Smaller tensors stay as they are: their bytes do not matter (the threshold of bitsandbytes, on the global size)."""

_WHOLE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BITS = {"8bit": 8, "4bit": 4}
"""Values of ``state_dtype`` that need blocks."""

STATE_DTYPES = (*_WHOLE, *BITS)
"""Values of ``state_dtype``, beside None for the parameter's own dtype."""

_SIGNED = {"exp_avg": True, "momentum": True, "exp_avg_sq": False}

MOMENTS = frozenset(_SIGNED)
"""Keys of state that ``state_dtype`` is about."""


def as_stored(layout: Mapping[str, StateTensor], state_dtype: str | None) -> dict[str, StateTensor]:
    """Return the tensors in which a layout is really kept; only moments are affected.

    Raises ValueError for a wrong dtype.
    """
    if state_dtype is None:
        return dict(layout)
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype={state_dtype!r}; expected None or one of {', '.join(STATE_DTYPES)}")
    stored: dict[str, StateTensor] = {}
    for key, spec in layout.items():
        if key not in _SIGNED or not spec.shape:
            stored[key] = spec
        elif state_dtype in _WHOLE:
            stored[key] = StateTensor(spec.shape, _WHOLE[state_dtype], spec.layout)
        elif len(spec.shape) != 2 or math.prod(spec.shape) < _MIN_NUMBERS or spec.shape[1] < BLOCK // 4:
            stored[key] = spec
        else:
            blocks = math.ceil(spec.shape[1] / BLOCK)
            packed = BITS[state_dtype] == 4
            width = math.ceil(spec.shape[1] / 2) if packed else spec.shape[1]
            dtype = torch.int8 if _SIGNED[key] and not packed else torch.uint8
            stored[key] = StateTensor((spec.shape[0], width), dtype, spec.layout)
            scale_layout = "leading" if spec.layout == "parameter" else spec.layout
            stored[f"{key}_scale"] = StateTensor((spec.shape[0], blocks), torch.float32, scale_layout)
    return stored


def write_bytes(state_dtype: str | None) -> int:
    """Return what ``write`` needs of each number: in units of its scale, its root, its code, and in 8 bits its sign."""
    return {"8bit": 3 * 4 + 1, "4bit": 2 * 4}.get(str(state_dtype), 0)


def read(state: Mapping[str, Tensor], key: str, rows: slice, width: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Return rows of a moment in ``dtype``: the stored tensor itself, to be changed in place, if it has that type.

    ``width``: numbers in a row of this shard. ``offset``: global index of its first column, not 0 only where columns
    are sharded.
    """
    stored = local(state[key])[rows]
    if f"{key}_scale" not in state:
        return stored if stored.dtype == dtype else stored.to(dtype)
    return dequantize(stored, local(state[f"{key}_scale"])[rows], width, _SIGNED[key], dtype, offset)


def write(
    state: Mapping[str, Tensor],
    key: str,
    rows: slice,
    value: Tensor,
    offset: int = 0,
    maximum: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> None:
    """Store what ``read`` gave, after it was changed.

    ``maximum``: largest over the ranks that share a row, where columns are sharded.
    """
    stored = local(state[key])[rows]
    if f"{key}_scale" in state:
        quantize(value, stored, local(state[f"{key}_scale"])[rows], _SIGNED[key], offset, maximum)
    elif stored.dtype != value.dtype:
        stored.copy_(value)


def replace(state: Mapping[str, Tensor], key: str, value: Tensor) -> None:
    """Store a whole moment (the local rows of it) computed anew."""
    stored = local(state[key])
    if f"{key}_scale" in state:
        quantize(value, stored, local(state[f"{key}_scale"]), _SIGNED[key])
    else:
        stored.copy_(value)


def dequantize(
    codes: Tensor,  # (m, n) int8 or uint8; (m, ceil(n / 2)) uint8 of 4 bits
    scale: Tensor,  # (m, blocks) float32
    width: int,  # n
    signed: bool,
    dtype: torch.dtype,
    offset: int = 0,
) -> Tensor:
    """Return the numbers (m, n) of codes and scales."""
    if codes.shape[1] != width:
        value = _unpacked(codes, width).to(dtype)
        value = value.sub_(8).div_(7) if signed else value.add_(1).div_(16)
        value.mul_(value.abs() if signed else value)
    elif signed:
        value = codes.to(dtype).div_(127)
        value.mul_(value.abs())
    else:
        value = codes.to(dtype).div_(255).square_().square_()
    return value.mul_(_spread(scale.to(dtype), width, offset))


def quantize(
    value: Tensor,  # (m, n)
    codes: Tensor,  # (m, n) int8 or uint8, or (m, ceil(n / 2)) uint8 of 4 bits; written
    scale: Tensor,  # (m, blocks) float32, written
    signed: bool,
    offset: int = 0,
    maximum: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> None:
    """Return codes and scales of numbers; those of an unsigned code must not be negative."""
    scale.copy_(maximum(_block_maxima(value, scale.shape[1], offset)))
    unit = value / _spread(scale.to(value.dtype), value.shape[1], offset).clamp_min(torch.finfo(torch.float32).tiny)
    if codes.shape[1] != value.shape[1]:
        if signed:
            unit = unit.abs().sqrt_().copysign_(unit).mul_(7).round_().add_(8)
        else:
            unit = unit.sqrt_().mul_(16).round_().clamp_(min=1, max=16).sub_(1)
        codes.copy_(_packed(unit.to(torch.uint8)))
    elif signed:
        codes.copy_(unit.abs().sqrt_().copysign_(unit).mul_(127).round_())
    else:
        positive = unit > 0
        codes.copy_(unit.sqrt_().sqrt_().mul_(255).round_().clamp_(max=255).maximum(positive.to(unit.dtype)))


def _packed(nibbles: Tensor) -> Tensor:
    """(m, ceil(n / 2)) bytes of (m, n) numbers below 16."""
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpacked(codes: Tensor, width: int) -> Tensor:
    """The reverse."""
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :width]


def _block_maxima(value: Tensor, blocks: int, offset: int) -> Tensor:
    m, n = value.shape
    padded = torch.nn.functional.pad(value, (offset, blocks * BLOCK - offset - n))
    return padded.view(m, blocks, BLOCK).abs().amax(2).float()


def _spread(scale: Tensor, n: int, offset: int) -> Tensor:
    """Scales (m, blocks) repeated to columns offset .. offset + n - 1."""
    return scale.repeat_interleave(BLOCK, dim=1)[:, offset : offset + n]


def encode_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (m, d) int8 and scales (m, 1) of rows (m, d)."""
    scale = value.abs().amax(1, keepdim=True) / 127
    return (value / torch.where(scale > 0, scale, 1)).round_().to(torch.int8), scale


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows (m, d) from their codes and scales."""
    return codes.to(dtype).mul_(scale.to(dtype))
