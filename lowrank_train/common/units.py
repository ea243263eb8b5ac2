"""Sizes as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes", "show_bytes"]

_UNITS = {
    **{"B": 1, "BYTES": 1},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}
"""A bare letter is binary, as SLURM, Docker and ``ulimit`` read it."""


def parse_bytes(text: str, whole: int | None = None) -> int:
    """Return the bytes of a size with its unit.

    Args:
        text: ``24GiB`` or ``24G`` (2^30 bytes each), ``600 MB`` (10^6 each), ``1000000B``.
        whole: what a percentage is of; None: no percentage is taken.

    Raises:
        ValueError: another text, no unit, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*|%)\s*", str(text))
    unit = match[2].upper() if match else ""
    if match and unit == "" and len(match[1]) < 20:
        number = match[1]
        share = f" or {number}%" if whole is not None else ""
        raise ValueError(
            f"{text!r} has no unit; write {number}GiB (2^30 bytes each), {number}GB (10^9), {number}MiB, {number}B "
            f"(bytes){share}"
        )
    share = " or a percentage" if whole is not None else ""
    expected = f"expected a number above 0 with a unit, such as 600MiB, 24GiB (2^30 bytes) or 24GB (10^9){share}"
    if not match or not (unit in _UNITS or (unit == "%" and whole is not None)) or len(match[1]) > 30:
        raise ValueError(f"{text!r} is not a size; {expected}")
    number = float(match[1])
    size = int(number / 100 * whole) if unit == "%" and whole is not None else int(number * _UNITS[unit])
    if size < 1:
        raise ValueError(f"{text!r} is no bytes at all; {expected}")
    return size


def show_bytes(count: int) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
