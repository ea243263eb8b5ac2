"""What recipes of graphs and of translation have in common: keys that go with a method, and the method itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

import optim
from lowrank_train import methods
from lowrank_train.config import load_schema
from lowrank_train.errors import UserError
from lowrank_train.hyperbolic.lorentz import check_curvature
from lowrank_train.parametrization import Parametrization

__all__ = ["build_method", "check_numbers", "load_recipe"]

C = TypeVar("C")


def load_recipe(schema: type[C], arguments: Sequence[str]) -> C:
    """As ``load_schema``, where ``for_optimizer`` says which keys hold with ``optimizer.name`` unless they are given.

    Raises UserError as ``load_schema``, and if what ``for_optimizer`` has for the method is not keys and values.
    """
    config: Any = load_schema(schema, arguments)
    own = config.for_optimizer.get(str(config.optimizer.get("name"))) or {}
    if own:
        if not isinstance(own, dict):
            raise UserError(f"for_optimizer.{config.optimizer['name']}={own!r}; expected keys and values")
        config = load_schema(schema, [*(f"{key}={value}" for key, value in own.items()), *arguments])
    config.for_optimizer = {}  # what there was to say is said: saved and read again, given keys must win
    return config  # type: ignore[no-any-return]


def check_numbers(
    at_least: dict[str, tuple[float, float]], seeds: dict[str, int], clip: float | None, curvature: float
) -> None:
    """Raise UserError for the first of them that is out of range; ``at_least``: key -> (value, smallest allowed)."""
    for key, (got, low) in at_least.items():
        if got < low:
            raise UserError(f"{key}={got}; expected a number >= {low}")
    for key, seed in seeds.items():
        if not 0 <= seed < 2**32:
            raise UserError(f"{key}={seed}; expected a number from 0 to {2**32 - 1}")
    if clip is not None and not clip > 0:
        raise UserError(f"clip={clip}; expected a number > 0, or null")
    try:
        check_curvature(curvature)
    except UserError as error:
        raise UserError(f"model.{error}") from None


def build_method(
    network: nn.Module, settings: dict[str, Any], linear_maps: str, rates: dict[str, float] | None = None
) -> tuple[Parametrization, optim.MatrixOptimizer]:
    """Replace the linear maps of a network, in place, and make its optimizer.

    Args:
        network: plain.
        settings: name and arguments.
        linear_maps: regular expression of the layers that a method replaces, unless the settings have one.
        rates: role of ``optim.param_groups`` -> its learning rate, where that is not ``lr``.

    Raises:
        UserError: settings that do not fit.
    """
    method, arguments = methods.find(settings["name"]), {"layers": linear_maps, **settings}
    try:
        layers = method.parametrization(arguments)
        layers.convert(network)
        groups = optim.param_groups(network)
        for group in groups:
            if group["role"] in (rates or {}):
                group["lr"] = (rates or {})[group["role"]]
        return layers, optim.create(method.optimizer, groups, **method.optimizer_arguments(settings))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer: {error}") from None
