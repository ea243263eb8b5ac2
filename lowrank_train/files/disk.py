"""The disk a run writes to: whether it has room for all that is to come, and what is said when writing fails."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowrank_train.common.errors import UserError
from lowrank_train.common.units import show_bytes

__all__ = ["check_space", "checkpoints_to_come", "write_failure"]


def checkpoints_to_come(done: int, steps: int, every: int) -> int:
    """Return how many checkpoints a run still writes; ``every`` steps (0: only at the end), and at the end."""
    if done >= steps:
        return 0
    return 1 if every < 1 else steps // every - done // every + (steps % every != 0)


def check_space(
    folder: Path, checkpoint: int, *, to_come: int, there: int, keep: int, export: int = 0, keys: str = ""
) -> None:
    """Refuse a disk that will be full before a run has ended.

    Args:
        folder: of the run.
        checkpoint: bytes of one.
        to_come: how many will be written.
        there: how many are on the disk already.
        keep: how many stay when a new one is complete.
        export: bytes of what is written at the end.
        keys: what the user can set to need less, in the imperative; "": nothing.

    Raises:
        UserError: less is free than will be needed at one time.
    """
    writing = min(keep + 1, there + to_come) if to_come else there  # the new one is complete before the oldest goes
    resting = min(keep, there + to_come) if to_come else there
    need = max((writing - there) * checkpoint, (resting - there) * checkpoint + export)
    free = shutil.disk_usage(folder).free
    if need > free:
        exported = f", and {show_bytes(export)} of the exported model" if export else ""
        raise UserError(
            f"the disk of run_dir={folder} has {show_bytes(free)} free, and this run needs {show_bytes(need)} more: "
            f"{writing} checkpoints of {show_bytes(checkpoint)} at one time{exported}; free space, "
            f"{keys + ', ' if keys else ''}or set run_dir to another disk"
        )


def write_failure(what: str, folder: Path, error: str, good: str) -> UserError:
    """Return the error for a write that failed.

    Args:
        what: could not be written.
        folder: it should go to.
        error: what the system said.
        good: where the last good checkpoint is.
    """
    if not folder.is_dir():
        return UserError(
            f"cannot write {what}: {folder} was deleted or moved while the run was writing to it; {good}; put it back "
            "and resume, or start again"
        )
    free = show_bytes(shutil.disk_usage(folder).free)
    return UserError(f"cannot write {what}: {error} ({free} are free in {folder}); {good}; free space and resume")
