"""The optimizers: a file each, a line each.

The line that a new method needs is its import, which also makes its class a name of ``lowrank_train.optim``. Everything
else about a method follows from its class: its ``name`` (of the file, unless the class has another), its arguments with
their defaults (the signature), where it is published, its state, its communication and its workspace.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.arguments.torch_arguments import FLAGS
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.methods.adamw import AdamW as AdamW
from lowrank_train.optim.methods.low_rank.apollo import APOLLO as APOLLO
from lowrank_train.optim.methods.low_rank.apollo import APOLLOMini as APOLLOMini
from lowrank_train.optim.methods.low_rank.dct_adamw import DCTAdamW as DCTAdamW
from lowrank_train.optim.methods.low_rank.fira import Fira as Fira
from lowrank_train.optim.methods.low_rank.frugal import FRUGAL as FRUGAL
from lowrank_train.optim.methods.low_rank.galore_adamw import GaLoreAdamW as GaLoreAdamW
from lowrank_train.optim.methods.low_rank.ldadam import LDAdam as LDAdam
from lowrank_train.optim.methods.low_rank.low_rank_adamw import LowRankAdamW as LowRankAdamW
from lowrank_train.optim.methods.muon import Muon as Muon
from lowrank_train.optim.methods.relora import ReLoRA as ReLoRA
from lowrank_train.optim.methods.riemannian import RiemannianAdamW as RiemannianAdamW
from lowrank_train.optim.methods.scale import SCALE as SCALE
from lowrank_train.optim.methods.sst import SST as SST
from lowrank_train.optim.methods.trion import Trion as Trion
from lowrank_train.optim.methods.welore_adamw import WeLoreAdamW as WeLoreAdamW
from lowrank_train.optim.parameters.group_checks import SHARED_SETTINGS

METHODS: dict[str, type[MatrixOptimizer]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, MatrixOptimizer) and cls is not MatrixOptimizer
}
"""The classes imported above, by name."""

if not TYPE_CHECKING:  # what a type checker sees are the imports
    __all__ = [
        *(cls.__name__ for cls in METHODS.values()),
        *("check_arguments", "create", "describe", "find", "names"),
    ]


def names(*, of_matrices: bool = False) -> list[str]:
    """Return all names, sorted; with ``of_matrices``, only of optimizers that need no layers of their own."""
    return sorted(name for name, cls in METHODS.items() if cls.layers is None or not of_matrices)


def find(name: str) -> type[MatrixOptimizer]:
    """Return the class of a name; raises ValueError with the nearest names for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown optimizer {name!r}; {suggestion(name, names())}")
    return METHODS[name]


def describe(name: str) -> str:
    """Return the first line of the class's docstring and its arguments with defaults."""
    cls = find(name)
    arguments = ", ".join(f"{key}={default!r}" for key, default in _arguments(cls).items())
    return f"{name}: {summary(name)} Arguments: {arguments}"


def summary(name: str) -> str:
    """Return the first line of the class's docstring."""
    return (inspect.getdoc(find(name)) or "").splitlines()[0]


def check_arguments(name: str, arguments: Iterable[str]) -> None:
    """Raise ValueError, with the valid list, for an argument that the optimizer does not take."""
    valid = [*_arguments(find(name)), *SHARED_SETTINGS]
    for argument in arguments:
        if argument not in (*valid, *FLAGS):
            raise ValueError(f"optimizer {name!r} takes no argument {argument!r}; {suggestion(argument, valid)}")


def takes(name: str, argument: str) -> bool:
    """Return whether an optimizer has an argument of this name."""
    return argument in _arguments(find(name))


def create(
    name: str, model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]], **arguments: Any
) -> MatrixOptimizer:
    """Build an optimizer by name.

    Args:
        name: one of ``names()``.
        model: a module (its groups are made by ``param_groups``) or parameter groups.
        arguments: the class's own, ``lr`` among them; for all groups, those of
            ``optim.SHARED_SETTINGS``; and the flags of torch's optimizers (``foreach=False`` and so on;
            ``maximize=True`` works).

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
