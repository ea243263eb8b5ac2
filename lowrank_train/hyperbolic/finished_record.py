"""Trainings of a benchmark, of which some finished in an earlier session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowrank_train.errors import UserError
from lowrank_train.hyperbolic.network_record import NetworkRecord
from lowrank_train.hyperbolic.recipes import RecipeConfig
from lowrank_train.run_folder import changed_settings

__all__ = ["finished_record"]

C = TypeVar("C", bound=RecipeConfig)
R = TypeVar("R", bound=NetworkRecord)


def finished_record(config: C, kind: type[R], *, train: Callable[[C], R]) -> R:
    """The record of a training: what record.json in its folder says if it finished earlier, else it is trained now.

    Args:
        config: of the training.
        kind: of record.
        train: does it.

    Raises:
        UserError: the folder holds another training; this one was stopped; as ``train``.
    """
    earlier = _earlier(config)
    record = train(config) if earlier is None else kind(**earlier)
    if record.status != "finished":
        raise UserError(f"{config.run_dir} was stopped; start the benchmark again to go on")
    return record


def _earlier(config: RecipeConfig) -> dict[str, Any] | None:
    folder = Path(str(config.run_dir))
    try:
        saved: dict[str, Any] = json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):  # none, or cut short by a kill
        return None
    for key, (then, now) in changed_settings(folder, config)[0].items():
        raise UserError(
            f"{folder} holds a training with other settings: {key} was {then}, is {now}; give another output, or "
            "delete that folder"
        )
    return saved if saved["status"] == "finished" else None
