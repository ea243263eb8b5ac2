"""A session of a run on one process: from its folder's last checkpoint to the end, or to a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.common.signals import Stop, stop_signals
from lowrank_train.files.checkpoint_folder import choose_checkpoint, last_good
from lowrank_train.files.disk import write_failure
from lowrank_train.hyperbolic.recipes import RecipeConfig
from lowrank_train.hyperbolic.run import CPU, NetworkRun
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.run_folder import RunFolder, changed_settings

__all__ = ["hold_session", "show_report"]

C = TypeVar("C", bound=RecipeConfig)
R = TypeVar("R", bound=NetworkRun)
Record = TypeVar("Record")


def hold_session(
    config: C,
    steps: int,
    *,
    build: Callable[[C, Ranks], R],
    loop: Callable[[R, Metrics, Stop], None],
    finish: Callable[[R], Record],
) -> Record:
    """Build a run, restore it, train it and say how it ended; its folder is locked meanwhile.

    Args:
        config: of the run.
        steps: or epochs, of the progress bar.
        build: makes the run, as if there were no checkpoint.
        loop: trains until the run is finished or the stop requested.
        finish: makes the record.

    Raises:
        UserError: more than one rank; the folder, a checkpoint or the settings do not fit; as ``build``, ``loop`` and
            ``finish``.
    """
    with start(CPU.type) as ranks:
        if ranks.world_size > 1:
            raise UserError(
                f"these networks are trained in one process, not in {ranks.world_size}; start launch/hyperbolic.py "
                "with python"
            )
        folder = RunFolder(Path(str(config.run_dir)))
        checkpoint, notes = choose_checkpoint(config.resume, folder.path / "checkpoints", ranks)
        run = build(config, ranks)
        if checkpoint is not None:
            run.restore(checkpoint)
        run.check_space(steps)
        changes, unknown = changed_settings(folder.path, config) if run.progress.done else ({}, [])
        if changes and run.finished:
            key, (then, now) = next(iter(changes.items()))
            raise UserError(
                f"{folder.path} holds a run that is finished at {run.unit} {run.progress.done}; {key} was {then}, is "
                f"{now}: set run_dir to another folder"
            )
        folder.write_config(config)
        metrics = Metrics(folder.path, start=run.progress.done, steps=steps, active=True)
        settings = ", ".join(f"{key} {value}" for key, value in config.optimizer.items())
        begin = f"resuming from {checkpoint}" if checkpoint else f"writing to {run.folder}"
        metrics.say(f"{run.greeting()}; {config.model.geometry}; optimizer {settings}; {begin}")
        for note in [*notes, *unknown]:
            metrics.say(note)
        for key, (then, now) in changes.items():
            metrics.say(f"changed since the last session: {key} {then} -> {now}")
        with stop_signals() as stop:
            try:
                loop(run, metrics, stop)
            finally:
                metrics.close()
            return finish(run)


def show_report(run: NetworkRun, write: Callable[[], str]) -> None:
    """Write a report and show its table.

    Raises:
        UserError: it cannot be written.
    """
    try:
        table = write()
    except OSError as error:
        raise write_failure("the report", run.folder, str(error), last_good(run.checkpoints.folder)) from None
    print(f"\n{table}\n", file=sys.stderr)
