"""Files of text: which of a folder are read, in which order, and which are left out because they are held-out text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowrank_train.common.errors import UserError
from lowrank_train.text.rows import SUFFIXES, kind_of

__all__ = ["TextFiles", "find_files"]

_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that ``datasets`` writes beside data; ``save_to_disk`` also writes a state.json."""

_HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
"""Words in the names of files and folders that are not for training; ``datasets`` reads names in the same way."""

_NAMED_BY_SUBJECT = {".py", ".md", ".rst"}
"""Suffixes of files that are named after what they are about, such as a test."""


@dataclass(frozen=True)
class TextFiles:
    """Files of one kind, in the order in which they are read."""

    root: Path
    files: list[Path]
    left_out: list[Path]
    """Files in the same folder whose names say that they are held-out text."""

    def name(self, file: Path) -> str:
        """Return the name of a file within the folder."""
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


def find_files(path: str, key: str, *, without: str | None = None, training: bool = False) -> TextFiles:
    """Find the files to read in a folder, or take the one that is given.

    Args:
        path: a file or folder; what lies in hidden files and folders is not read.
        key: of the configuration that gave the path, for messages.
        without: a file or folder (of held-out text) whose files are not read.
        training: leave out files of a folder whose names say that they are held-out text, if others remain.

    Raises:
        UserError: there is nothing to read, or files of different kinds.
    """
    root = Path(path)
    held_out = set()
    if without and Path(without).exists():
        held_out = {file.resolve() for file in find_files(without, "data.validation").files}
    if root.is_file():
        if kind_of(root) is None:
            raise UserError(f"{key}={path} is a {''.join(root.suffixes) or 'nameless'} file; expected {SUFFIXES}")
        files = [root]
    else:
        found = sorted(_readable(root))
        records = [file for file in found if kind_of(file) != "text"]
        files = records or found  # a README beside data files is about them
    if not files:
        raise UserError(f"{key}={path} has no file to read; expected {SUFFIXES}")
    kinds = {str(kind_of(file)) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{key}={path} mixes files of kinds {', '.join(sorted(kinds))}; keep one kind in a folder")
    files = [file for file in files if file.resolve() not in held_out]
    if not files:
        raise UserError(f"every file of {key}={path} is also in data.validation={without}; give different text")
    left_out = [file for file in files if training and _is_held_out(root, file)]
    if len(left_out) == len(files):
        left_out = []
    return TextFiles(root, [file for file in files if file not in left_out], left_out)


def _readable(root: Path) -> Iterator[Path]:
    for file in root.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if kind_of(file) and not hidden and not _is_about_data(file) and file.is_file():
            yield file


def _is_about_data(file: Path) -> bool:
    if file.name == "state.json":
        return file.with_name("dataset_info.json").exists()
    return file.name in _ABOUT_DATA or (file.suffix == ".arrow" and file.name.startswith("cache-"))


def _is_held_out(root: Path, file: Path) -> bool:
    if file == root or _NAMED_BY_SUBJECT.intersection(file.suffixes):
        return False
    words = set(re.split(r"[^a-z]+", file.relative_to(root).as_posix().lower()))
    return bool(words & _HELD_OUT) and "train" not in words
