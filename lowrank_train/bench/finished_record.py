"""Trainings of a benchmark, of which some finished in an earlier session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowrank_train.common.errors import UserError
from lowrank_train.files.json_files import read_mapping
from lowrank_train.hyperbolic.recipes import RecipeConfig
from lowrank_train.hyperbolic.record import NetworkRecord
from lowrank_train.train.run_folder import check_same_settings

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
    earlier = _earlier(config, kind)
    record = train(config) if earlier is None else earlier
    if record.status != "finished":
        raise UserError(f"{config.run_dir} was stopped; start the benchmark again to go on")
    return record


def _earlier(config: RecipeConfig, kind: type[R]) -> R | None:
    folder = Path(str(config.run_dir))
    file, remedy = folder / "record.json", f"delete {folder} to train it again"
    if not file.exists():
        return None
    needed = {field.name for field in dataclasses.fields(kind) if field.default is field.default_factory}
    saved = read_mapping(file, remedy, sorted(needed))
    check_same_settings(folder, config, "give another output, or delete that folder")
    if saved["status"] != "finished":
        return None
    try:
        return kind(**saved)
    except TypeError as error:
        raise UserError(f"{file} was written by another version ({error}); {remedy}") from None
