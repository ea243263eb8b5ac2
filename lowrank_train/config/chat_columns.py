"""Which column of a local file holds chats, where the configuration names none."""

from __future__ import annotations

from pathlib import Path

from lowrank_train.common.errors import UserError
from lowrank_train.config.data import DataConfig
from lowrank_train.files.json_files import mapping_or_empty
from lowrank_train.text.chat import COLUMNS
from lowrank_train.text.files import find_files
from lowrank_train.text.rows import kind_of, rows

__all__ = ["find_messages_key"]


def find_messages_key(data: DataConfig, run_dir: str) -> str | None:
    """Return ``messages`` or ``conversations`` if the first row of a file has a list there, and no ``text_key``.

    Files that moved after a run tokenized them are not needed: the run's own record has the name. Files that cannot
    be read give None; the reader of the run then says what is wrong with them.

    Args:
        data: with a path.
        run_dir: of the run, which may have tokens already.
    """
    if data.path is None or data.is_supervised or data.prompt_key is not None:
        return None
    if not Path(data.path).exists():
        return _recorded(Path(data.folder or Path(run_dir, "data"), "data.json"))
    try:
        file = find_files(data.path, "data.path", without=data.validation, training=True).files[0]
    except UserError:
        return None
    if kind_of(file) == "text" or _first(file, data.text_key) is not None:
        return None
    return next((column for column in COLUMNS if isinstance(_first(file, column), list)), None)


def _first(file: Path, column: str) -> object:
    try:
        return next(rows(file, {column: "data.messages_key"}), {}).get(column)
    except UserError:  # a table without the column
        return None


def _recorded(record: Path) -> str | None:
    settings = mapping_or_empty(record).get("settings")
    found = settings.get("data.messages_key") if isinstance(settings, dict) else None
    return found if isinstance(found, str) else None
