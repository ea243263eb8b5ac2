"""Hyperparameters as users and torch write them: flags of torch's own optimizers, numpy's scalars, rates as tensors.

Every constructor takes the flags, in one place for all (``accepting_flags``): what a flag asks for is either what these
optimizers do anyway, or is refused with the reason. ``maximize`` is a setting of a group, and turns its gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from lowrank_train.optim.arguments.surroundings import undisturbed

__all__ = ["FLAGS", "accepting_flags", "check_flags", "check_rate", "is_number", "make_plain", "plain"]

_REFUSED = {
    "foreach": "matrices are updated one after the other, and AdamW by torch's fused kernel wherever that works",
    "fused": "AdamW uses torch's fused kernel wherever that works, without being asked",
    "capturable": "steps are counted in host memory, where a captured CUDA graph would not see them change",
    "differentiable": "updates are made in place and without a graph",
    "amsgrad": "no maximum of second moments is kept; riemannian_adamw keeps one for points",
}
"""Flags that may be False (or None), and why they cannot be True."""

FLAGS = (*_REFUSED, "maximize")
"""Flags of torch's optimizers that every constructor takes."""


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return a Python number for a scalar of numpy, so that checkpoints hold nothing else; any other value as it is."""
    if type(value) in (bool, int, float, str) or value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and all(_is_scalar(each) for each in value):
        return type(value)(plain(each) for each in value) if type(value) in (tuple, list) else value
    if _is_scalar(value):
        return value.item() if hasattr(value, "item") else float(value)
    return value


def make_plain(group: dict[str, Any]) -> dict[str, Any]:
    """Make the values of a group plain, in place, and return the group; raises TypeError for what is no group."""
    if not isinstance(group, dict):
        raise TypeError(
            f"a parameter group must be a dict, with its parameters as 'params'; got a {type(group).__name__}"
        )
    for key, value in group.items():
        if key not in ("params", "param_names"):
            group[key] = plain(value)
    return group


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return False
    return isinstance(value, Real) or (hasattr(value, "item") and getattr(value, "shape", None) == ())


def check_rate(value: Any) -> bool:
    """Return whether a value is a number >= 0, or a tensor of one; on meta a tensor has no value to look at."""
    if not isinstance(value, Tensor):
        return is_number(value) and value >= 0
    if value.numel() != 1 or value.is_complex():
        return False
    return value.is_meta or value.item() >= 0


def check_flags(flags: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError for a flag that asks for what there is not."""
    for key, reason in _REFUSED.items():
        if flags.get(key) not in (None, False):
            raise ValueError(f"{key}={flags[key]!r} for {owner}; expected False: {reason}")
    if not isinstance(flags.get("maximize", False), bool):
        raise ValueError(f"maximize={flags['maximize']!r} for {owner}; expected True or False")


def accepting_flags(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor, so that it also takes the flags it does not name and scalars of numpy."""
    own = inspect.signature(init).parameters
    taken = [key for key in FLAGS if key not in own]

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        flags = {key: kwargs.pop(key) for key in taken if key in kwargs}
        check_flags(flags, type(self).__name__)
        if "maximize" in flags:
            self.maximize = flags["maximize"]
        with undisturbed():
            init(self, *args[:1], *map(plain, args[1:]), **{key: plain(value) for key, value in kwargs.items()})

    return constructor
