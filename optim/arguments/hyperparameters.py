"""Numbers of a parameter group: whatever a method makes of one, it must be finite."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_finite"]

_MOST = 2**63
"""Whole numbers below it are seeds and counts that a kernel can take."""


def check_finite(group: dict[str, Any], index: int) -> None:
    """Check every number of a parameter group, those in tuples included. It is done when a group is added.

    Args:
        group: of an optimizer, with its hyperparameters.
        index: of the group, for the message.

    Raises:
        ValueError: a number is infinite or nan, or a whole number is beyond 64 bits.
    """
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        for number in value if isinstance(value, list | tuple) else (value,):
            if not _is_finite(number):
                raise ValueError(f"parameter group {index} has {key}={value!r}; expected a finite number")


def _is_finite(number: Any) -> bool:
    if isinstance(number, Tensor):
        return number.is_meta or bool(torch.isfinite(number).all())
    if isinstance(number, int):
        return abs(number) < _MOST
    return not isinstance(number, Real) or math.isfinite(number)
