"""The settings of an earlier session: ``config.yaml`` of a run folder, perhaps written by another version."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank_train.common.errors import UserError, first_line

__all__ = ["read_saved"]

C = TypeVar("C")


def read_saved(file: Path, schema: type[C]) -> tuple[C, list[str]]:
    """Read a saved configuration; keys and values that this version does not know are left out.

    Args:
        file: written by ``save_config``.
        schema: dataclass of the configuration.

    Returns:
        The configuration, and a note on what was left out.

    Raises:
        UserError: the file cannot be read, or holds no keys.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file} is damaged ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it holds no keys)")
    try:
        return _built(schema, [found]), []
    except OmegaConfBaseException:
        parts = list(_leaves(found, schema(), ()))
    known, unknown = [], []
    for path, value in parts:
        part: Any = value
        for key in reversed(path):
            part = {key: part}
        try:
            _built(schema, [part])
        except OmegaConfBaseException:
            unknown.append(".".join(map(str, path)))
        else:
            known.append(part)
    note = f"{file} has what this version does not know, and it is left out: {', '.join(unknown)}"
    return _built(schema, known), [note]


def _built(schema: type[C], parts: list[Any]) -> C:
    config: C = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *parts))  # type: ignore[assignment]
    return config


def _leaves(found: dict[Any, Any], section: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in found.items():
        inner = getattr(section, key, None) if isinstance(key, str) else None
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            yield from _leaves(value, inner, (*path, key))
        else:
            yield (*path, key), value
