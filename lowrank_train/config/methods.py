"""Training methods by name: which layers, which optimizer. A name of ``optim.names()`` trains dense layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.layers.lora import LowRankAdapters
from lowrank_train.layers.parametrization import Dense, Parametrization, Spectral
from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.arguments.torch_arguments import is_number

__all__ = ["OTHER_ROLES", "Method", "check", "describe", "find", "names"]


class Method(NamedTuple):
    """What ``optimizer.name`` stands for."""

    layers: Callable[..., Parametrization]
    optimizer: str

    @property
    def needs_rank(self) -> bool:
        """Whether the layers cannot be made without a rank."""
        rank = inspect.signature(self.layers).parameters.get("rank")
        return rank is not None and rank.default is rank.empty

    def arguments(self) -> list[str]:
        """Return the keys of the optimizer and of the layers, each once."""
        own = self._optimizer_keys()
        return [*own, *(key for key in inspect.signature(self.layers).parameters if key not in own)]

    def parametrization(self, arguments: dict[str, Any]) -> Parametrization:
        """Make the layers from those arguments that are theirs. Raises ValueError if one is missing."""
        parameters = inspect.signature(self.layers).parameters
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in arguments:
                raise ValueError(f"{key} is missing: give optimizer.{key}=")
        return self.layers(**{key: arguments[key] for key in parameters if key in arguments})

    def about(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps of a section ``optimizer``: the name, and settings of the layers."""
        parameters = inspect.signature(self.layers).parameters.items()
        layers = {f"optimizer.{key}": settings.get(key, parameter.default) for key, parameter in parameters}
        return {"optimizer.name": settings["name"], **layers}

    def optimizer_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that belong to the optimizer."""
        own = self._optimizer_keys()
        return {key: value for key, value in arguments.items() if key in own}

    def _optimizer_keys(self) -> list[str]:
        own = [key for key in inspect.signature(optim.find(self.optimizer)).parameters if key != "params"]
        return list(dict.fromkeys([*own, *optim.SHARED_SETTINGS]))


OTHER_ROLES = ("embedding", "head", "vector")
"""The roles of parameters that are neither matrices, nor parts of matrices, nor points of a manifold."""

_TABLE: dict[str, Method] = {
    "lora": Method(LowRankAdapters, "adamw"),
    "relora": Method(LowRankAdapters, "relora"),
    "sst": Method(Spectral, "sst"),
}


def names() -> list[str]:
    """Return all values of ``optimizer.name``, sorted."""
    return sorted({*optim.names(), *_TABLE})


def find(name: str, arguments: Iterable[str] = ()) -> Method:
    """Return the method of a name.

    Raises ValueError for an unknown name, or an argument that the method does not take.
    """
    if name not in names():
        raise ValueError(f"unknown optimizer {name!r}; {suggestion(name, names())}")
    method = _TABLE.get(name, Method(Dense, name))
    for argument in arguments:
        if argument not in method.arguments():
            raise ValueError(
                f"optimizer {name!r} takes no argument {argument!r}; {suggestion(argument, method.arguments())}"
            )
    return method


def check(settings: dict[str, Any], rates: Iterable[str], others: Iterable[str] = ()) -> None:
    """Check the keys of a section ``optimizer``, and the rates among them that are no arguments of the optimizer.

    Args:
        settings: of the section.
        rates: keys of learning rates that some of the parameters have instead of ``lr``.
        others: further keys that are no arguments of the optimizer.

    Raises:
        UserError: an unknown name or key, or a rate that is no number >= 0.
    """
    rates = tuple(rates)
    for key in rates:
        rate = settings.get(key)
        if rate is not None and not (is_number(rate) and 0 <= rate < math.inf):
            raise UserError(f"optimizer.{key}={rate!r}; expected a number >= 0")
    try:
        find(str(settings.get("name")), [key for key in settings if key not in ("name", *rates, *others)])
    except ValueError as error:
        raise UserError(f"in optimizer: {error}") from None


def describe(name: str) -> str:
    """Return the line of the method's optimizer, and the settings of its layers."""
    method = find(name)
    layers = inspect.signature(method.layers).parameters
    settings = [key if p.default is p.empty else f"{key}={p.default!r}" for key, p in layers.items()]
    line = optim.describe(method.optimizer)
    line = f"{name}: " + line.split(": ", 1)[1]
    if not settings:
        return line
    about = (inspect.getdoc(method.layers) or "").splitlines()[0]
    return f"{line} Layers: {about} Arguments: {', '.join(settings)}"
