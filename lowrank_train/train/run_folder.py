"""The folder of a run: one process group at a time in it, and the settings it was trained with."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import IO, Any

from lowrank_train.common.errors import UserError
from lowrank_train.config.loading import changed_keys, save_config
from lowrank_train.config.saved import read_saved

__all__ = ["RunFolder", "changed_settings", "check_same_settings"]

_PLACES = ("run_dir", "resume", "data.folder", "data.tokenizer_folder")
"""Keys that say where things are, not what a run computes."""


class RunFolder:
    """Used on the first rank only; its lock ends with the process, however that ends.

    Args:
        path: made if absent.

    Raises:
        UserError: it cannot be written, or another run is at work in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work in run_dir={path}; wait for it, or set another run_dir") from None
        except OSError as error:
            raise UserError(f"cannot write to run_dir={path}: {error}; set run_dir to another folder") from None

    def write_config(self, config: Any) -> None:
        """Keep the resolved settings of this session."""
        try:
            save_config(config, self.path / "config.yaml")
        except OSError as error:
            raise UserError(f"cannot write to run_dir={self.path}: {error}; free space and resume") from None


def changed_settings(folder: Path, config: Any) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return what differs from the settings of the last session in a run folder.

    Returns:
        Key -> (then, now); and notes on what of the earlier settings could not be read.
    """
    try:
        return _changed(folder, config)
    except UserError as error:
        return {}, [f"{error}: what changed since the last session is not known"]


def check_same_settings(folder: Path, config: Any, remedy: str) -> None:
    """Refuse the results of an earlier training that had other settings; keys of another version are only printed.

    Args:
        folder: of the earlier training.
        config: of the training whose results are wanted.
        remedy: what to do about the folder, in the imperative.

    Raises:
        UserError: a setting differs, or the settings of the earlier training cannot be read.
    """
    try:
        changes, notes = _changed(folder, config)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    for key, (then, now) in changes.items():
        raise UserError(f"{folder} holds a training with other settings: {key} was {then}, is {now}; {remedy}")
    for note in notes:
        print(note, file=sys.stderr)


def _changed(folder: Path, config: Any) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    file = folder / "config.yaml"
    if not file.exists():
        return {}, []
    saved, notes = read_saved(file, type(config))
    differing = changed_keys(saved, config)
    return {key: values for key, values in differing.items() if key not in _PLACES}, notes
