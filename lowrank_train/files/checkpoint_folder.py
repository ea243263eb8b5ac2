"""The folder of a run's checkpoints: which are there, which one a run starts from, and what is done about damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError, type_and_line
from lowrank_train.common.ranks import Ranks
from lowrank_train.files.checkpoint_files import read_index
from lowrank_train.files.checksums import damage_in, has_checksums, unverified
from lowrank_train.files.disk import write_failure
from lowrank_train.files.json_files import read_mapping

__all__ = [
    "checkpoints_of",
    "choose_checkpoint",
    "clear_leftovers",
    "delete_checkpoint",
    "error_cause",
    "find_checkpoint",
    "last_good",
    "read_about",
    "write_about",
]


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    complete = [path for path in numbered if (path / ".metadata").is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def last_good(folder: Path) -> str:
    """Say which checkpoint is the last good one, for messages."""
    good = checkpoints_of(folder)
    return f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"


def choose_checkpoint(resume: str, folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Return the checkpoint a run starts from, its files verified; all ranks must call, and each reads a share of them.

    With ``resume=auto`` a damaged checkpoint is set aside and the one before is taken.

    Args:
        resume: as for ``find_checkpoint``.
        folder: the run's own checkpoints.
        ranks: of the run.

    Returns:
        The checkpoint, or None if the run starts from the beginning; and notes for the user.

    Raises:
        UserError: as ``find_checkpoint``; every checkpoint is damaged, or the one that was asked for.
    """
    path = ranks.first(lambda: find_checkpoint(resume, folder))
    damaged: list[tuple[Path, str]] = []
    while path is not None and (problem := _problem(path, ranks)) is not None:
        damaged.append((path, problem))
        path = ranks.first(lambda: _one_before(damaged, resume))
    notes = [] if path is None or not damaged else ranks.first(lambda: _set_aside(damaged, path))
    return path, [*notes, *([] if path is None else ranks.first(lambda: unverified(path)))]


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint that ``resume`` names; nothing of it is read.

    Args:
        resume: auto (the newest in ``folder``, if any), never, or the path of a checkpoint or of a run folder.
        folder: the run's own checkpoints.

    Raises:
        UserError: never, or another path, but there are checkpoints that the run would overwrite; or nothing at the
            path given.
    """
    own = checkpoints_of(folder)
    if resume == "auto":
        return own[-1] if own else None
    if resume == "never":
        if own:
            raise UserError(
                f"resume=never, but {folder} holds checkpoints of an earlier run; set another run_dir, delete "
                "this one, or use resume=auto"
            )
        return None
    path = Path(resume)
    if not (path / "about.json").is_file():
        found = checkpoints_of(path / "checkpoints") or checkpoints_of(path)
        if not found:
            raise UserError(f"resume={resume}: no checkpoint there; expected auto, never, a step-N or a run folder")
        path = found[-1]
    if own and path.resolve() != own[-1].resolve():
        raise UserError(
            f"resume={resume}, but {folder} holds checkpoints up to {own[-1].name} that the run would mix with its "
            "own; set another run_dir, or use resume=auto to continue them"
        )
    return path


def read_about(path: Path) -> dict[str, Any]:
    """Return the plain facts beside a checkpoint. Raises UserError if they cannot be read."""
    return read_mapping(path / "about.json", f"delete {path}, and resume from the checkpoint before")


def write_about(scratch: Path, about: dict[str, Any]) -> None:
    """Begin a checkpoint folder with its plain facts. Raises UserError if it cannot be written."""
    try:
        scratch.mkdir(parents=True)
        (scratch / "about.json").write_text(json.dumps(about, indent=2))
    except OSError as error:
        raise write_failure("a checkpoint", scratch.parent, str(error), last_good(scratch.parent)) from None


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint at once for all readers: a kill meanwhile must not leave half of it."""
    doomed = path.rename(path.with_name(path.name + ".old.tmp"))
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Make a folder of checkpoints, or delete what a killed run left half written in it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; set run_dir to another folder") from None


def error_cause(error: BaseException) -> str:
    """Return the first rank's reason inside a CheckpointException, or the error itself, in words."""
    failures = list(getattr(error, "failures", {}).values())
    reason = failures[0][0] if failures else error
    return type_and_line(reason)


def _problem(path: Path, ranks: Ranks) -> str | None:
    """Say what is damaged in a checkpoint, the same on all ranks; None if nothing is."""

    def compare() -> None:
        damage = damage_in(path, rank=ranks.rank, world_size=ranks.world_size) if has_checksums(path) else None
        if damage is not None:
            raise UserError(damage)

    def read() -> None:  # all there is to tell damage by in a checkpoint of an earlier version
        read_about(path)
        try:
            read_index(path)
        except Exception as error:  # unpickling a damaged file may raise anything
            raise UserError(error_cause(error)) from None

    try:
        ranks.each(compare)
        ranks.first(read)
    except UserError as error:
        return str(error)
    return None


def _one_before(damaged: list[tuple[Path, str]], resume: str) -> Path:
    """Return the newest checkpoint older than the damaged ones. Raises UserError if there is none to be taken."""
    path, problem = damaged[-1]
    older = checkpoints_of(path.parent)
    older = older[: older.index(path)] if path in older else []
    if resume != "auto":
        then = f"; resume={older[-1]} is the one before" if older else ""
        raise UserError(f"{path} is damaged ({problem}){then}")
    if not older:
        first, reason = damaged[0]
        raise UserError(
            f"{first} is damaged ({reason}), and so is every checkpoint before it; delete {path.parent} to start over"
        )
    return older[-1]


def _set_aside(damaged: list[tuple[Path, str]], taken: Path) -> list[str]:
    """Rename damaged checkpoints, so that they are neither taken nor counted again; returns what to say of each."""
    notes = []
    for path, problem in damaged:
        aside = path.with_name(path.name + ".damaged")
        while aside.exists():
            aside = aside.with_name(aside.name + "+")
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(f"{path} is damaged ({problem}) and cannot be renamed: {error}") from None
        notes.append(f"{path} is damaged ({problem}): it is set aside as {aside.name}; going on from {taken.name}")
    return notes
