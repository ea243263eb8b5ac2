"""Sizes as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes", "show_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, whole: int | None = None) -> int:
    """Bytes of ``24GiB``, ``600 MB``, ``1000000`` or, given a whole, ``60%`` of it. Raises ValueError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*|%)\s*", str(text))
    unit = match[2].upper() if match else ""
    if match and unit == "%" and whole is not None:
        return int(float(match[1]) / 100 * whole)
    if not match or unit not in _UNITS:
        percent = " or a percentage" if whole is not None else ""
        raise ValueError(f"{text!r} is not a size; expected bytes, with a unit such as MiB or GB{percent}")
    return int(float(match[1]) * _UNITS[unit])


def show_bytes(count: int) -> str:
    """In the largest binary unit that leaves at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
