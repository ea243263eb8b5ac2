"""A session of a training: from the last checkpoint in its folder to the end, or to a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import say_out_of_memory
from lowrank_train.common.ranks import Ranks
from lowrank_train.common.signals import Stop, resume_command, stop_signals
from lowrank_train.files.checkpoint_folder import choose_checkpoint
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.run_folder import RunFolder, changed_settings
from lowrank_train.train.training import Training

__all__ = ["hold_session", "show_report"]

R = TypeVar("R", bound=Training)
Record = TypeVar("Record")


def hold_session(
    config: Any,
    ranks: Ranks,
    *,
    build: Callable[[], R],
    train: Callable[[R, Metrics], Iterator[None]],
    finish: Callable[[R], Record],
) -> Record:
    """Build a run, restore it, train it and say how it ended; its folder is locked meanwhile.

    A signal lets the step at hand finish; then a checkpoint is written, and the session ends as interrupted.

    Args:
        config: of the run, with ``run_dir``, ``resume`` and ``optimizer``.
        ranks: of the run; all of them must call.
        build: makes the run, as if there were no checkpoint.
        train: yields after every step, until the run is finished.
        finish: makes the record.

    Raises:
        UserError: the folder, a checkpoint or the settings do not fit; as ``build``, ``train`` and ``finish``.
    """
    path = Path(config.run_dir)
    folder = ranks.on_first(lambda: RunFolder(path))  # whose lock ends with this function
    checkpoint, found = choose_checkpoint(config.resume, path / "checkpoints", ranks)
    run = build()
    if checkpoint is not None:
        run.restore(checkpoint)
    run.check_space()
    settled = ranks.first(lambda: _settle(folder, config, run))
    metrics = Metrics(path, start=run.done, steps=run.steps, active=ranks.is_first)
    settings = ", ".join(f"{key} {value}" for key, value in config.optimizer.items())
    where = f"{ranks.world_size} rank(s) on {ranks.device.type}"
    begin = f"resuming from {checkpoint}" if checkpoint else f"writing to {path}"
    for note in [f"{run.greeting()}; optimizer {settings}; {where}; {begin}", *found, *settled, *run.notes()]:
        metrics.say(note)
    with stop_signals() as stop:
        try:
            with say_out_of_memory(run.predicted_bytes):
                for _ in train(run, metrics):
                    if _keep(run, metrics, stop):
                        break
                run.checkpoints.wait()
        finally:
            metrics.close()
        record = finish(run)
    if not run.finished and ranks.is_first:
        print(f"stopped at {run.unit} {run.done}; resume with: {resume_command()}", file=sys.stderr)
    return record


def show_report(run: Training, write: Callable[[], str]) -> None:
    """Write a report on the first rank and show its table. Raises UserError, on all ranks, if it cannot be written."""
    table = run.ranks.first(lambda: run.write("the report", write))
    if run.ranks.is_first:
        print(f"\n{table}\n", file=sys.stderr)


def _settle(folder: RunFolder | None, config: Any, run: Training) -> list[str]:
    """Write the settings of this session; returns what changed since the last. A finished run must not change."""
    assert folder is not None  # on the first rank
    changes, notes = changed_settings(folder.path, config) if run.done else ({}, [])
    if changes and run.finished:
        key, (then, now) = next(iter(changes.items()))
        raise UserError(
            f"{folder.path} holds a run that is finished at {run.unit} {run.done}; {key} was {then}, is {now}: set "
            f"run_dir to another folder{run.to_train_on}"
        )
    folder.write_config(config)
    return [*notes, *(f"changed since the last session: {key} {then} -> {now}" for key, (then, now) in changes.items())]


def _keep(run: Training, metrics: Metrics, stop: Stop) -> bool:
    """After a step: write a checkpoint if one is due; returns whether the session ends, the same on all ranks.

    Raises:
        UserError: a checkpoint, this one or an earlier, or figures could not be written.
    """
    ranks, checkpoints = run.ranks, run.checkpoints
    if ranks.any(checkpoints.poll() or metrics.failure is not None):
        checkpoints.wait()  # raises what went wrong, on every rank
        ranks.first(lambda: _check_written(run, metrics))
    stopping = ranks.any(stop.requested)  # a signal may have reached some ranks only
    if run.finished or stopping or (checkpoints.every > 0 and run.done % checkpoints.every == 0):
        run.save()
    return stopping


def _check_written(run: Training, metrics: Metrics) -> None:
    if metrics.failure is not None:
        raise run.write_failure("metrics", metrics.failure)
