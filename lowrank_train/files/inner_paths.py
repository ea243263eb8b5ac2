"""Names of files that a file gives: whether they stay inside the folder they are meant for."""

from __future__ import annotations

from pathlib import PurePosixPath

__all__ = ["is_inside"]


def is_inside(name: str) -> bool:
    """Return whether a relative path, with slashes, leads to a place inside the folder that it starts from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
