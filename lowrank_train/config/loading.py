"""Configurations of any schema: YAML files merged left to right, then ``key=value`` overrides; and back to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from lowrank_train.common.errors import UserError
from lowrank_train.common.small_files import write_text
from lowrank_train.config.interpolation import refuse_interpolation
from lowrank_train.config.settings import keys, settle

__all__ = ["changed_keys", "flags_to_keys", "given_value", "load_schema", "save_config"]

T = TypeVar("T")

_DEEPEST = 20
"""Levels of nesting: a configuration has four, and deeper ones exhaust the readers' recursion."""


def load_schema(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a configuration from YAML files and ``key=value`` overrides, with its paths expanded.

    Args:
        schema: a dataclass whose fields are sections or ``setting``s.
        arguments: files (``*.yaml``) and overrides, in any order; files are merged left to right, then overrides.

    Raises:
        UserError: unreadable file, unknown key (with the closest match), value of the wrong type or out of range.
    """
    files = [word for word in arguments if _is_file(word)]
    overrides = [a for a in arguments if a not in files]
    changes = [(_read_yaml(file), f"in {file}") for file in files]
    has_model_name = hasattr(getattr(schema(), "model", None), "name")
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "model" and has_model_name:  # model=small/ is short for model.name=small/; data=x/ is a mistake
            override = f"{key}.name{equals}{value}"
        changes.append((_read_override(override), f"in {_short(override)}"))
    for change, where in changes:
        for key in _missing(OmegaConf.to_container(change, resolve=False)):
            raise UserError(f"{key}=??? {where} stands for a value that is still to be given; give one, see --help")
    merged = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(merged, *(change for change, _ in changes))  # at once: every call copies the schema
    except (OmegaConfBaseException, TypeError):
        for change, where in changes:  # one of them raises, and is named
            merged = _merge(merged, change, where)
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"wrong value for {error.full_key!r}: {str(error).splitlines()[0]}") from None
    settle(config)
    return config


def given_value(arguments: Sequence[str], key: str) -> Any:
    """Return what files and overrides say last of one dotted key; None if they say nothing. Nothing is checked.

    Raises UserError for a file that cannot be read.
    """
    value = None
    for word in arguments:
        name, _, text = word.partition("=")
        if _is_file(word) and not word.startswith("-"):
            try:
                found = OmegaConf.select(_read_yaml(word), key)
            except OmegaConfBaseException as error:
                raise UserError(f"cannot read {key!r} in {_short(word)}: {str(error).splitlines()[0]}") from None
            value = value if found is None else found
        elif name == key:
            value = text
    return value


def flags_to_keys(arguments: Sequence[str], schema: type[Any]) -> list[str]:
    """Return ``--rank-reduction 0.5``, ``--rank-reduction=0.5`` and ``--merge`` as ``key=value``, and other words as
    they are.

    Raises UserError for a flag without a value.
    """
    switches = {name for name, value, _ in keys(schema()) if isinstance(value, bool)}
    words: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            alone = key in switches and waiting[:1] not in (["true"], ["false"])
            value = "true" if alone else waiting.pop(0) if waiting else ""
        if not value:
            raise UserError(f"{word} has no value; expected {word} VALUE, see --help")
        words.append(f"{key}={value}")
    return words


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration, of any schema; loading it gives an equal object."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def changed_keys(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ between two configurations of one schema, with (before, after)."""
    then, now = dict(_values(before)), dict(_values(after))
    names = [*now, *(name for name in then if name not in now)]
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value, _ in keys(config):
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        else:
            yield name, value


def _is_file(word: str) -> bool:
    """Whether an argument is a file to read: one that is no override, or a YAML file that is there."""
    try:
        return "=" not in word or (word.endswith((".yaml", ".yml")) and Path(word).is_file())
    except OSError:  # a name that no file can have
        return False


def _read_yaml(file: str) -> Any:
    try:
        text = Path(file).read_text(encoding="utf-8")
        _check_shape(text)
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    except FileNotFoundError:
        raise UserError(f"there is no file {_short(file)}; expected FILE.yaml or key=value, see --help") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:500]
        raise UserError(f"cannot read {_short(file)} as YAML: {reason}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file!r} holds a list or a single value; expected keys and values")
    refuse_interpolation(loaded, f"in {file}")
    return loaded


def _read_override(override: str) -> Any:
    key, equals, value = override.partition("=")
    if equals and not value.strip():
        raise UserError(
            f"{_short(key)} is given without a value, as where a variable of the shell is not set; give one, or write "
            f"{key}=null for null"
        )
    try:
        if key.count(".") + key.count("[") > _DEEPEST:
            raise ValueError(f"its key has more than {_DEEPEST} levels")
        _check_shape(value)
        parsed = OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AssertionError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read the override {_short(override)}: {reason}; expected key=value") from None
    refuse_interpolation(parsed, f"in {_short(override)}")
    return parsed


def _check_shape(text: str) -> None:
    """Raise ValueError for YAML that is nested too deeply for its readers."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys whose value is OmegaConf's mark of one that is missing; merging would pass over it."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value == "???":
            yield f"{prefix}{key}"
        yield from _missing(value, f"{prefix}{key}.")


def _short(word: str) -> str:
    """Return a word of the command line as a message quotes it."""
    return repr(word if len(word) <= 200 else f"{word[:200]}...")


def _merge(base: Any, change: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, change)
    except ConfigKeyError as error:
        key = (error.full_key or str(error.key))[:200]
        schema: type[Any] = OmegaConf.get_type(base)
        known = [name for name, _, _ in keys(schema())]
        known += {name.split(".")[0] for name in known}
        leaves = {name.split(".")[-1]: name for name in known}
        close = difflib.get_close_matches(key, known, n=1)
        close = close or [leaves[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], leaves, n=1)]
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown key {key!r} {where}; {hint}--help lists all keys") from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        if not error.full_key:  # a section was given a value
            reason = "it is a section of keys, such as model.name or data.path; give those"
        raise UserError(
            f"wrong value {f'for {error.full_key!r} ' if error.full_key else ''}{where}: {reason}"
        ) from None
    except TypeError:  # of a list and a mapping, which does not name the key
        raise UserError(f"there is a list {where} where keys and values belong, or the reverse; see --help") from None
    except OmegaConfBaseException as error:
        raise UserError(f"cannot use the configuration {where}: {str(error).splitlines()[0]}") from None
