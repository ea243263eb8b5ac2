"""References in a configuration to values elsewhere, ``${...}``, which are refused.

OmegaConf resolves them from other keys, from the environment and with functions: a secret of the environment would be
written into every record of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from lowrank_train.common.errors import UserError

__all__ = ["refuse_interpolation"]


def refuse_interpolation(node: Any, where: str) -> None:
    """Raise UserError for the first value that refers to something else; nothing is resolved.

    Args:
        node: an OmegaConf mapping.
        where: it comes from, for the message.
    """
    for key, text in _texts(OmegaConf.to_container(node, resolve=False), ""):
        if "${" in text:
            raise UserError(
                f"{key}={text[:200]} {where} refers to a value elsewhere; references (${{...}}) are not resolved, "
                "neither to keys nor to the environment: give the value itself"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts in nested mappings and lists, keys included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            inside = f"{key}.{name}" if key else str(name)
            yield inside, str(name)
            yield from _texts(inner, inside)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{i}]")
    elif isinstance(value, str):
        yield key, value
