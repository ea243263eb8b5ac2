"""Stochastic rounding: a number between two that can be stored becomes the upper one as often as it is near to it.

To the nearest, an update smaller than half the gap between neighbours is lost, every time: in bfloat16 whatever changes
a weight by less than 0.2 percent. Rounded stochastically the expected value is exact.

The noise is no stream of random numbers but a hash of (parameter, time, place in the whole matrix). So a sharded
parameter is rounded as the whole one would be, and a resumed run as the one that was not stopped; nothing is stored but
the time.

Sources: Gupta et al. (arXiv 1502.02551) for training in few bits; the finaliser of MurmurHash3 for the hash.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.layout import block_origin, local
from lowrank_train.optim.storage.int8_weight import Int8Weight

__all__ = ["round_to_bfloat16", "seed_of", "store", "store_bytes", "uniform_bits"]


def store(kept: Tensor, value: Tensor, seed: Tensor | None, rows: slice = slice(None)) -> None:
    """Write local ``value`` into (rows of) a parameter or a state tensor, sharded or not.

    Rounded stochastically where that is bfloat16 and there is a seed; to the nearest otherwise.
    """
    target = local(kept)[rows] if kept.ndim else local(kept)
    if seed is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    height = value.shape[0] if value.ndim else 1
    width, whole_width = math.prod(value.shape[1:]), math.prod(kept.shape[1:])
    row, column = block_origin(kept)
    flat = value.float().reshape(height, width)
    for part in row_blocks(height, width * (2 if isinstance(target, Int8Weight) else 1), value.device):
        origin = (row + (rows.start or 0) + part.start, column)
        bits = uniform_bits(part.stop - part.start, width, origin=origin, width=whole_width, seed=seed)
        if isinstance(target, Int8Weight):
            target[part].write(flat[part], bits)
            continue
        rounded = round_to_bfloat16(flat[part].contiguous(), bits)
        (target[part] if target.ndim else target).copy_(rounded.view_as(target[part] if target.ndim else target))


def store_bytes(numbers: int, *, in_int8: bool) -> int:
    """Return what ``store`` needs to round a block: noise, its magnitudes and what is finite, or what is chosen, and
    that in bfloat16.

    In int8, also numbers in units of their scale, the nearest codes, which of them are exact; of half a block.
    """
    return (21 * numbers // 2) if in_int8 else 11 * numbers


def seed_of(name: str, time: Tensor) -> Tensor:
    """Return a seed, () int32 on the device of ``time``, that differs for every parameter and every time."""
    return _mixed(time.to(torch.int32) * 0x3C6EF372 + _int32(zlib.crc32(name.encode())))


def uniform_bits(rows: int, columns: int, *, origin: tuple[int, int], width: int, seed: Tensor) -> Tensor:
    """Return random bits for the places of a block.

    Args:
        rows: of the block.
        columns: of the block.
        origin: row and column of the whole matrix where the block begins.
        width: columns of the whole matrix.
        seed: () int32.

    Returns:
        (rows, columns) int32, uniform over all 32 bits.
    """
    device = seed.device
    # places are counted in 64 bits, folded to 32: matrices of more than 2^32 numbers repeat the noise, harmlessly
    first = torch.arange(origin[0], origin[0] + rows, device=device, dtype=torch.int64) * width + origin[1]
    place = first.to(torch.int32)[:, None] + torch.arange(columns, device=device, dtype=torch.int32)
    return _mixed(place.bitwise_xor_(seed))


def round_to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Round a float32 ``value`` to bfloat16 by as many random bits (int32, changed); what is not finite stays so."""
    # bfloat16 is the upper half of a float32: a carry out of the lower half is a step to the next number away from 0
    raw = value.view(torch.int32)
    rounded = bits.bitwise_and_(0xFFFF).add_(raw).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of the input moves half of the output; in place but for the seed's."""
    for shift, factor in ((16, _int32(0x85EBCA6B)), (13, _int32(0xC2B2AE35))):
        x = x.bitwise_xor_(_logical_shift(x, shift)).mul_(factor)
    return x.bitwise_xor_(_logical_shift(x, 16))


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in; torch's own shift of a signed number brings in its sign."""
    return (x >> bits).bitwise_and_(2 ** (32 - bits) - 1)


def _int32(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
