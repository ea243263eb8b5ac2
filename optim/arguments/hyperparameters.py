"""Values of hyperparameters: the checks that several methods make, and that every number is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.arguments.torch_arguments import is_number

__all__ = ["check_finite", "check_flag", "check_fraction", "check_whole", "is_whole"]

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


def is_whole(value: Any) -> bool:
    """Return whether a value is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(
    settings: Mapping[str, Any],
    key: str,
    least: int,
    *,
    name: str | None = None,
    unit: str = "",
    optional: bool = False,
) -> None:
    """Raise ValueError unless a setting is a whole number from ``least``, or None where it is optional.

    ``name``: the parameter it is for; ``unit``: what it counts (" of steps"). Both are for the message.
    """
    value = settings[key]
    if (value is None and optional) or (is_whole(value) and value >= least):
        return
    where = "" if name is None else f" for {name!r}"
    raise ValueError(f"{key}={value!r}{where}; expected a whole number{unit} >= {least}" + ", or None" * optional)


def check_fraction(settings: Mapping[str, Any], key: str, name: str) -> None:
    """Raise ValueError unless a setting of the parameter ``name`` is a number in [0, 1)."""
    if not is_number(settings[key]) or not 0 <= settings[key] < 1:
        raise ValueError(f"{key}={settings[key]!r} for {name!r}; expected a number in [0, 1)")


def check_flag(settings: Mapping[str, Any], key: str, name: str) -> None:
    """Raise ValueError unless a setting of the parameter ``name`` is True or False."""
    if not isinstance(settings[key], bool):
        raise ValueError(f"{key}={settings[key]!r} for {name!r}; expected True or False")


def _is_finite(number: Any) -> bool:
    if isinstance(number, Tensor):
        return number.is_meta or bool(torch.isfinite(number).all())
    if isinstance(number, int):
        return abs(number) < _MOST
    return not isinstance(number, Real) or math.isfinite(number)
