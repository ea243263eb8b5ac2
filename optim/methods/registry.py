"""Optimizers by name: a literal table, no registration side effects."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.arguments.torch_arguments import FLAGS
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import SHARED_SETTINGS, MatrixOptimizer
from lowrank_train.optim.methods.adamw import AdamW
from lowrank_train.optim.methods.low_rank_adamw import (
    APOLLO,
    FRUGAL,
    APOLLOMini,
    DCTAdamW,
    Fira,
    GaLoreAdamW,
    LDAdam,
    LowRankAdamW,
)
from lowrank_train.optim.methods.muon import Muon
from lowrank_train.optim.methods.relora import ReLoRA
from lowrank_train.optim.methods.riemannian import RiemannianAdamW
from lowrank_train.optim.methods.scale import SCALE
from lowrank_train.optim.methods.sst import SST
from lowrank_train.optim.methods.trion import Trion
from lowrank_train.optim.methods.welore_adamw import WeLoreAdamW

__all__ = ["check_arguments", "create", "describe", "find", "names", "takes"]

_TABLE: dict[str, type[MatrixOptimizer]] = {
    "adamw": AdamW,
    "apollo": APOLLO,
    "apollo_mini": APOLLOMini,
    "dct_adamw": DCTAdamW,
    "fira": Fira,
    "frugal": FRUGAL,
    "galore_adamw": GaLoreAdamW,
    "ldadam": LDAdam,
    "low_rank_adamw": LowRankAdamW,
    "muon": Muon,
    "relora": ReLoRA,
    "riemannian_adamw": RiemannianAdamW,
    "scale": SCALE,
    "sst": SST,
    "trion": Trion,
    "welore_adamw": WeLoreAdamW,
}


def names(*, of_matrices: bool = False) -> list[str]:
    """All registered names, sorted; with ``of_matrices``, only of optimizers that need no layers of their own."""
    return sorted(name for name, cls in _TABLE.items() if cls.layers is None or not of_matrices)


def find(name: str) -> type[MatrixOptimizer]:
    """The class of a name; raises ValueError with the nearest names for an unknown one."""
    if name not in _TABLE:
        raise ValueError(f"unknown optimizer {name!r}; {suggestion(name, names())}")
    return _TABLE[name]


def describe(name: str) -> str:
    """First line of the class's docstring and its arguments with defaults."""
    cls = find(name)
    arguments = ", ".join(f"{key}={default!r}" for key, default in _arguments(cls).items())
    return f"{name}: {(inspect.getdoc(cls) or '').splitlines()[0]} Arguments: {arguments}"


def check_arguments(name: str, arguments: Iterable[str]) -> None:
    """Raise ValueError, with the valid list, for an argument that the optimizer does not take."""
    valid = [*_arguments(find(name)), *SHARED_SETTINGS]
    for argument in arguments:
        if argument not in (*valid, *FLAGS):
            raise ValueError(f"optimizer {name!r} takes no argument {argument!r}; {suggestion(argument, valid)}")


def takes(name: str, argument: str) -> bool:
    """Whether an optimizer has an argument of this name."""
    return argument in _arguments(find(name))


def create(
    name: str, model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]], **arguments: Any
) -> MatrixOptimizer:
    """Build an optimizer by name.

    Args:
        name: one of ``names()``.
        model: a module (its groups are made by ``param_groups``) or parameter groups.
        arguments: the class's own, ``lr`` among them; and, for all groups, those of
        ``optim.core.optimizer.SHARED_SETTINGS``;
            the flags of torch's optimizers (``foreach=False`` and so on; ``maximize=True`` works).

    Raises:
        ValueError: unknown name or argument, or one that does not fit the parameters.
    """
    check_arguments(name, arguments)
    cls = find(name)
    shared = {key: arguments.pop(key) for key in SHARED_SETTINGS if key in arguments}
    if isinstance(model, nn.Module):
        return cls(param_groups(model, **shared) if shared or cls.layers is None else model, **arguments)  # type: ignore[arg-type]
    if shared:
        model = [{**shared, **(group if isinstance(group, dict) else {"params": [group]})} for group in model]
    return cls(model, **arguments)  # type: ignore[arg-type]


def _arguments(cls: type[MatrixOptimizer]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "params"}
