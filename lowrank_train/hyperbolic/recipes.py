"""What recipes of graphs and of translation have in common: keys, keys that go with a method, and the method itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting, settle
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.optim.core.coverage import unwarned

__all__ = ["RecipeConfig", "SpaceConfig", "build_method", "load_recipe", "recipe_help"]


@dataclass
class SpaceConfig:
    """Where a network computes; its sizes are those of each kind."""

    geometry: Literal["lorentz", "euclidean"] = setting("lorentz", "the space it computes in")
    curvature: float = setting(
        1.0, "k > 0: points have <x, x> = -k, and space curvature -1/k", at_least=1e-6, at_most=1e6
    )


@dataclass
class RecipeConfig:
    """Keys of every recipe; each kind has its own ``data`` and ``model``, and more."""

    rates: ClassVar[tuple[str, ...]] = ()
    """Keys of ``optimizer`` that are rates of groups, not arguments of the optimizer."""

    data: Any
    model: Any
    optimizer: dict[str, Any] = setting(
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.0},
        "name and arguments of a method: optimizer.name=sst optimizer.rank=2",
    )
    for_optimizer: dict[str, Any] = setting(
        {}, "optimizer.name -> keys that hold with it unless given: for_optimizer.sst={optimizer.resample_every: 100}"
    )
    clip: float | None = setting(None, "largest gradient norm; null: no clipping", above=0)
    precision: Literal["float32", "float64"] = setting("float32", "of weights and arithmetic")
    seed: int = setting(
        1234, "of initial weights, of the order of the data, of dropout and of negatives", at_least=0, at_most=2**32 - 1
    )
    run_dir: str | None = setting(
        None, "folder of everything the run writes; null: in runs/, named after data, space and optimizer", path=True
    )
    resume: str = setting(
        "auto", "auto: continue the run in run_dir if it has a checkpoint; never; or a checkpoint's path", path=True
    )
    checkpoint_every: int = setting(
        500, "steps (of a graph: epochs) between two checkpoints; 0: only at the end", at_least=0
    )
    log_every: int = setting(
        10, "steps (of a graph: epochs) between two rows of metrics.jsonl and TensorBoard", at_least=1
    )

    @property
    def name(self) -> str:
        """Name of the folder of a run, unless it is given."""
        raise NotImplementedError


C = TypeVar("C", bound=RecipeConfig)


def load_recipe(schema: type[C], arguments: Sequence[str]) -> C:
    """Build a configuration from YAML files, merged left to right, and ``key=value`` overrides.

    ``for_optimizer`` says which keys hold with ``optimizer.name`` unless they are given.

    Raises:
        UserError: unreadable file, unknown key (with the closest match), value of the wrong type or out of range; an
            unknown optimizer or an argument that it does not take; ``for_optimizer`` has no keys and values for it.
    """
    config = load_schema(schema, arguments)
    own = config.for_optimizer.get(str(config.optimizer.get("name"))) or {}
    if own:
        if not isinstance(own, dict):
            raise UserError(f"for_optimizer.{config.optimizer['name']}={own!r}; expected keys and values")
        config = load_schema(schema, [*(f"{key}={value}" for key, value in own.items()), *arguments])
    config.for_optimizer = {}  # what there was to say is said: saved and read again, given keys must win
    if config.run_dir is None:
        config.run_dir = f"runs/{config.name}"
    settle(config)
    methods.check(config.optimizer, config.rates)
    return config


def recipe_help(schema: type[RecipeConfig], usage: str) -> str:
    """Return methods, and every key with its default and meaning."""
    lines = [f"usage: launch/hyperbolic.py {usage}[FILE.yaml ...] [key=value ...]", "", "optimizers:"]
    lines += [f"  {methods.describe(name)}" for name in methods.names()]
    return "\n".join([*lines, "", *key_help(schema)])


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
        with unwarned():  # the recipe names the layers to convert; that AdamW updates the others is its choice
            return layers, optim.create(method.optimizer, groups, **method.optimizer_arguments(settings))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer: {error}") from None
