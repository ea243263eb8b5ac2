"""JSON files that hold keys and values: read with one message about damage, or taken as empty if they are damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError

__all__ = ["mapping_or_empty", "read_mapping"]


def read_mapping(file: Path, remedy: str, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON file that holds keys and values.

    Args:
        file: to read.
        remedy: what to do about a damaged one, in the imperative.
        needs: keys that it must have.

    Raises:
        UserError: it is gone, is not JSON, holds something else, or lacks a key.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{file} is damaged ({reason}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it holds no keys and values); {remedy}")
    for key in needs:
        if key not in found:
            raise UserError(f"{file} is damaged (it has no {key!r}); {remedy}")
    return found


def mapping_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON file of which another reader says what is wrong; {} if it cannot be read or holds something else."""
    try:
        return read_mapping(file, "")
    except UserError:
        return {}
