"""A training that finished in an earlier session of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowrank_train.errors import UserError
from lowrank_train.run_folder import changed_settings

__all__ = ["earlier_record"]

C = TypeVar("C")


def earlier_record(config: C, load: Callable[[Sequence[str]], C]) -> dict[str, Any] | None:
    """The record.json in ``config.run_dir`` of a training that finished; None if there is none.

    ``load`` reads a configuration such as ``config`` from files. Raises UserError if it was another training.
    """
    folder = Path(str(config.run_dir))  # type: ignore[attr-defined]
    try:
        saved: dict[str, Any] = json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):  # none, or cut short by a kill
        return None
    for key, (then, now) in changed_settings(folder, config, load).items():
        raise UserError(
            f"{folder} holds a training with other settings: {key} was {then}, is {now}; give another output, or "
            "delete that folder"
        )
    return saved if saved["status"] == "finished" else None
