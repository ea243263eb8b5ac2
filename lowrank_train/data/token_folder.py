"""The folder of a run's tokens: what it holds, whether that is what a run asks for, and who writes it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import Config, DataConfig
from lowrank_train.data.sources import KEYS, difference, digest, sources, summary
from lowrank_train.files.checkpoint_folder import find_checkpoint
from lowrank_train.files.json_files import read_mapping

__all__ = ["REMEDY", "TokenRecord", "is_gone", "locked", "read_record", "still_valid"]

REMEDY = "delete {folder} and run again: the same text gives the same tokens"

_ORDER = ("seq_len", "seed")  # settings of how tokens are read; the others say which they are
_ORDER_OF_ROWS = ("seed",)  # rows of examples were laid out for one seq_len


@dataclass
class TokenRecord:
    """What ``data.json`` says about the tokens beside it."""

    settings: dict[str, Any]
    """Settings of the configuration; ``data.streams`` is null for text that was tokenized once."""
    found: dict[str, Any]
    """What was found in the text."""
    text: dict[str, Any] = field(default_factory=dict)
    """Sources by key; empty in the folders of earlier versions."""
    notes: list[str] = field(default_factory=list)
    """What the user must know, said once a session; not in the file."""

    @property
    def streaming(self) -> bool:
        """Whether training text is read while training."""
        return self.settings["data.streams"] is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What is equal for runs on the same data: content, not places."""
        settings = {key: value for key, value in self.settings.items() if key not in KEYS}
        if self.streaming:  # whose training tokens have no hash
            settings.update({key: self.settings[key] for key in KEYS})
            settings.update({key: digest(source) for key, source in self.text.items() if "files" in source})
        return {**settings, **self.found}

    @property
    def description(self) -> dict[str, Any]:
        """What the record of a run says about its data."""
        text = {key: summary(source) for key, source in self.text.items() if source}
        return {**self.settings, **self.found, "text": text}

    def write(self, folder: Path) -> None:
        """Write ``data.json``."""
        content = {key: value for key, value in asdict(self).items() if key != "notes"}
        (folder / "data.json").write_text(json.dumps(content, indent=2))


def read_record(folder: Path) -> TokenRecord | None:
    """Read what ``folder`` holds; None if it holds no tokens yet. Raises UserError for a damaged file."""
    record = folder / "data.json"
    if not record.exists():
        return None
    remedy = REMEDY.format(folder=folder)
    saved = read_mapping(record, remedy, ("settings", "found"))
    try:
        return TokenRecord(dict(saved["settings"]), _checked(dict(saved["found"])), dict(saved.get("text", {})))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error!r}); {remedy}") from None


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found in a text, once checked; raises ValueError or KeyError if a value does not fit."""
    if found["dtype"] not in ("uint16", "uint32", "int32"):
        raise ValueError(f"dtype={found['dtype']!r}")
    for key in ("train_tokens", "validation_tokens"):
        if key in found and (not isinstance(found[key], int) or found[key] < 0):
            raise ValueError(f"{key}={found[key]!r}")
    return {**found, "held_out_below": float(found["held_out_below"]), "validation_tokens": found["validation_tokens"]}


def still_valid(config: Config, folder: Path, saved: TokenRecord, settings: dict[str, Any]) -> tuple[bool, list[str]]:
    """Decide whether tokens that are there are those of a run.

    A run that was trained goes on with the tokens it began with; one that was not makes them again.

    Args:
        config: of the run.
        folder: of the tokens.
        saved: what the folder holds.
        settings: as the configuration gives them.

    Returns:
        Whether to use the tokens, and what the user must know.

    Raises:
        UserError: the tokens are other ones, and may not be made again.
    """
    shared = config.data.folder is not None
    trained = find_checkpoint("auto", (Path(str(config.run_dir)) if shared else folder.parent) / "checkpoints")
    gone = [key for key in KEYS if is_gone(key, config.data, saved)]
    now = sources(config.data, saved.text, sampled=saved.streaming, skip=gone)
    same_place = {key for key in KEYS if key in gone or saved.settings.get(key) == settings[key]}
    other = [key for key in settings if key not in KEYS and saved.settings.get(key) != settings[key]]
    if shared:
        other = [key for key in other if key not in (_ORDER_OF_ROWS if config.data.is_supervised else _ORDER)]
    changed: dict[str, str] = {}
    for key in KEYS:
        if not saved.text:  # there is nothing to compare but the name
            other += [key] if key not in same_place else []
        elif key not in gone and (words := difference(saved.text[key], now[key])):
            changed[key] = words
    moved = [key for key in changed if key not in same_place]
    if other or moved:
        key = next(iter([*moved, *other]))
        differs = f"{key} was {saved.settings.get(key)!r}, is {settings[key]!r}"
        if shared:
            raise UserError(f"data.folder={folder} holds other tokens: {differs}; set it to another folder")
        if trained is None:
            return False, []
        raise UserError(f"{folder.parent} holds a run on other data: {differs}; set run_dir to another folder")
    if changed:
        return _changed(config, folder, saved, changed, trained is not None)
    if gone and saved.streaming and "data.path" in gone:
        raise UserError(
            f"data.path={config.data.path} does not exist, and streamed text is read while training; put it back, or "
            "give its new place with data.path"
        )
    notes = [f"{key}={_value(config, key)} is no longer there; the tokens in {folder} are used" for key in gone]
    if not saved.text:
        if trained is None and not shared and not gone:
            return False, []
        notes.append(f"an earlier version made the tokens in {folder}: whether the text has changed is not known")
    return True, notes


def _changed(
    config: Config, folder: Path, saved: TokenRecord, changed: dict[str, str], trained: bool
) -> tuple[bool, list[str]]:
    """Say what becomes of tokens whose text is at the same place and has changed."""
    key, words = next(iter(changed.items()))
    what = f"{key}={_value(config, key)} has changed since it was tokenized ({words})"
    if trained and saved.streaming and "data.path" in changed:
        raise UserError(
            f"{what}; a run on streamed text goes on in the same text only: put it back, or set run_dir to another "
            "folder"
        )
    if trained:
        return True, [
            f"{what}; this run goes on with the tokens it began with: to train on the text of today, set run_dir"
            f"{' and data.folder' * (config.data.folder is not None)} to another folder"
        ]
    if config.data.folder is not None:
        raise UserError(
            f"data.folder={folder} holds other tokens: {what}; set it to another folder, or delete it to tokenize the "
            "text of today"
        )
    return False, [f"{what}: it is tokenized again"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work alone on a folder that is yet to be made; a lock ends with its process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _value(config: Config, key: str) -> str | None:
    value: str | None = getattr(config.data, key.removeprefix("data."))
    return "null" if value is None else value


def is_gone(key: str, config: DataConfig, saved: TokenRecord) -> bool:
    """Return whether a key names the place of local files that tokens were made from and that are there no more."""
    value: str | None = getattr(config, key.removeprefix("data."))
    if value is None or Path(value).exists():
        return False
    place = saved.settings.get(key)
    places = {place, saved.text.get(key, {}).get("given")} if place and os.path.isabs(place) else set()
    return bool(places & {os.path.abspath(value), os.path.realpath(value)})
