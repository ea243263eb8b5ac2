"""Fields of a configuration: what they mean, which values they take, and which of them are paths.

A schema says so where it declares a field; ``--help`` shows it, and ``settle`` checks it for every schema alike.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lowrank_train.common.errors import UserError

__all__ = ["Range", "check_numbers", "key_help", "keys", "path_of", "setting", "settle"]

_MOST = 10**12
"""The largest whole number of any setting: beyond it counts of bytes and of random seeds overflow."""

_DISTANT = 100
"""Above it, the upper end of a range is a matter of memory, not of meaning."""

_LONGEST_PART, _LONGEST_PATH = 240, 3500
"""Bytes of a name and of a path: what Linux allows, less what a run appends to it."""


@dataclass(frozen=True)
class Range:
    """The numbers a setting takes; an end that is None is open."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a number is finite and in the range."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = _shown(self.at_least, self.above)
        high = _shown(self.at_most, self.below)
        if high and self.above is not None:
            high = f"at most {high}" if self.below is None else f"below {high}"
        elif self.below is not None:
            high = f"below {high}"
        if low and high:
            return f"above {low} and {high}" if self.above is not None else f"from {low} to {high}"
        if low:
            return f"> {low}" if self.above is not None else f">= {low}"
        return f"up to {high}" if high else "that is finite"

    def expected(self, value: float) -> Range:
        """Return the range to tell for a value outside of it; for a value too low, a distant upper end is left out."""
        too_low = (self.at_least is not None and value < self.at_least) or (
            self.above is not None and value <= self.above
        )
        distant = self.at_most is not None and self.at_most > _DISTANT
        return dataclasses.replace(self, at_most=None) if too_low and distant else self


def _shown(closed: float | None, open_: float | None) -> str:
    end = closed if open_ is None else open_
    if end is None:
        return ""
    return f"{end:g}" if isinstance(end, float) else f"{end}"


def setting(default: Any, meaning: str, *, path: bool = False, **ends: float) -> Any:
    """Make a field of a schema.

    Args:
        default: value of the field; a list or a dictionary is copied for each configuration.
        meaning: shown by ``--help``.
        path: whether the value names a file or a folder; then ``~`` stands for the home folder.
        ends: of the ``Range`` that a number, or each number of a list, must be in.
    """
    metadata = {"help": meaning, "range": Range(**ends), "path": path}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, value and metadata of every setting of a configuration, section by section."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f.metadata


def key_help(schema: type[Any]) -> list[str]:
    """Return a line for every key of a schema: default, meaning and range."""
    lines = ["keys (default): meaning"]
    for name, value, metadata in keys(schema()):
        told = "" if metadata["range"] == Range() else f"; a number {metadata['range']}"
        lines.append(f"  {name} ({'null' if value is None else value}): {metadata['help']}{told}")
    return lines


def settle(config: Any, prefix: str = "") -> None:
    """Expand the paths of a configuration in place, and check every value.

    Raises:
        UserError: a number out of range or not finite, an empty text, a path that no file can have.
    """
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            settle(value, f"{key}.")
        elif f.metadata["path"] and isinstance(value, str):
            setattr(config, f.name, path_of(key, value))
        elif f.metadata["path"] and isinstance(value, dict):
            setattr(config, f.name, {name: path_of(f"{key}.{name}", entry) for name, entry in value.items()})
        else:
            _check(key, value, f.metadata["range"], value == f.default, ", or null" * ("None" in str(f.type)))


def path_of(key: str, text: str) -> str:
    """Return a path as it was typed, ``~`` replaced by the home folder.

    Raises:
        UserError: it is empty, has characters that no path can have, or is too long for a file system.
    """
    _check_text(key, text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{key}={text}: there is no such home folder; write ./{text} for a folder of that name")
    parts = [len(os.fsencode(part)) for part in expanded.split("/")]
    if max(parts) > _LONGEST_PART or len(os.fsencode(expanded)) > _LONGEST_PATH:
        raise UserError(
            f"{key}={text[:40]}... has {len(text)} characters; expected a path of at most {_LONGEST_PATH} bytes whose "
            f"names have at most {_LONGEST_PART} bytes each"
        )
    return expanded


def check_numbers(key: str, value: Any) -> None:
    """Raise UserError for a free value in which a number is not finite, or a key is not a text."""
    _check(key, value, Range(), False)


def _check(key: str, value: Any, range_: Range, is_default: bool, or_null: str = "") -> None:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        _check_number(key, value, range_, or_null)
    elif isinstance(value, str):
        if not is_default:
            _check_text(key, value)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(key, item, range_, False)
    elif isinstance(value, dict):
        for name, entry in value.items():
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise UserError(f"{key} has the key {name!r}; expected a name")
            _check(f"{key}.{name}", entry, range_, False)


def _check_number(key: str, value: float, range_: Range, or_null: str) -> None:
    if isinstance(value, int) and abs(value) > _MOST:
        low = -_MOST if range_.at_least is None and range_.above is None else range_.at_least
        range_ = dataclasses.replace(range_, at_least=low, at_most=range_.at_most or _MOST)
    if not range_.holds(value):
        raise UserError(f"{key}={value}; expected a number {range_.expected(value)}{or_null}")


def _check_text(key: str, text: str) -> None:
    if not text.strip():
        raise UserError(
            f"{key} is empty, as where a variable of the shell is not set; give a value, or null where the key has one"
        )
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}={text!r} has characters that are not text (NUL, or bytes that are not UTF-8)")
