"""The optimizers in torchtitan (0.3).

    optimizer=optim.titan_config(default_adamw(lr=8e-4), "dct_adamw", rank=256)

A recipe of torchtitan holds the ``Config`` of an ``OptimizersContainer``, which builds the container when the model is
sharded. What is handed in says all that is needed of torchtitan; nothing of it is imported.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

from torch import nn

from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.methods import check_arguments, create, find, takes

__all__ = ["titan_config"]

ConfigT = TypeVar("ConfigT")


def titan_config(config: ConfigT, name: str, **arguments: Any) -> ConfigT:
    """Return the configuration of a container, with another optimizer in the place of AdamW.

    The patterns of ``config.param_groups`` stay, first match first, with the settings that the optimizer has too (lr,
    weight decay, betas, eps); roles come from module types. Patterns decide about settings only: one optimizer trains
    all parameters of a model part. ``implementation`` (fused, foreach) is of torch's own optimizers and has no effect.

    Args:
        config: an ``OptimizersContainer.Config``, e.g. from ``default_adamw(lr=8e-4)``.
        name: one of ``optim.names()``.
        arguments: the optimizer's own, except those that every pattern names.

    Returns:
        A configuration of the same fields; ``build(model_parts=...)`` makes a container of the same class's behaviour,
        whose state dict has flat names, as torchtitan's checkpoints need.

    Raises:
        ValueError: unknown name or argument, a configuration that is not a container's; when building, a pattern that
            matches no trainable parameter or a parameter that no pattern matches.
    """
    check_arguments(name, arguments)
    owner = getattr(config, "_owner", None)
    if owner is None or not hasattr(config, "param_groups"):
        raise ValueError(
            f"titan_config got a {type(config).__name__}; expected the Config of torchtitan's OptimizersContainer, as "
            "default_adamw(lr=...) makes it"
        )

    class Container(owner):  # type: ignore[misc, valid-type]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(owner.Config):  # type: ignore[misc, name-defined]
            pass

        def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
            self.model_parts = model_parts
            self.optimizers = [_optimizer(name, part, config, arguments) for part in model_parts]
            params = [param for part in model_parts for param in part.parameters() if param.requires_grad]
            self._post_init(params)

    Container.__name__ = Container.__qualname__ = f"{find(name).__name__}Container"
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return Container.Config(**values)


def _optimizer(name: str, part: nn.Module, config: Any, arguments: dict[str, Any]) -> MatrixOptimizer:
    rules = {
        group.pattern: {key: value for key, value in group.optimizer_kwargs.items() if takes(name, key)}
        for group in config.param_groups
    }
    groups = param_groups(part, rules=rules)
    names = [key for group in groups for key, _ in group["params"]]
    missing = [key for key in names if not any(re.search(pattern, key) for pattern in rules)]
    if missing:
        raise ValueError(f"no pattern of param_groups matches {missing[0]!r}; end with ParamGroupConfig(pattern='.*')")
    return create(name, groups, **arguments)
