"""Many trainings, each an ordinary run in a process and a folder of its own; what was trained before is not again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lowrank_train.common.errors import Diverged, UserError
from lowrank_train.common.progress import bar_style
from lowrank_train.common.small_files import write_text
from lowrank_train.config.schema import Config
from lowrank_train.files.checkpoint_folder import find_checkpoint
from lowrank_train.files.json_files import read_mapping
from lowrank_train.train.loop import train
from lowrank_train.train.run_folder import check_same_settings

__all__ = ["Outcome", "train_each"]

_START = "forkserver"
"""A server without threads forks the trainings: forking this process would copy the locks of threads it may have, and
a fresh interpreter for each would import torch every time."""

_DIVERGED = "diverged.txt"
_LOG = "log.txt"
_OF_NO_MORE_USE = ("checkpoints", "huggingface", "report.md")
"""What a finished run leaves that takes space, and the report that points to it."""


@dataclass(frozen=True)
class Outcome:
    """How one training ended."""

    status: Literal["finished", "diverged", "failed"]
    record: dict[str, Any] | None = None
    """record.json of a finished run."""
    message: str = ""
    """Of one that did not finish."""


def train_each(configs: Sequence[Config], jobs: int) -> list[Outcome]:
    """Train every configuration in its ``run_dir``, on one thread; models are deleted, figures stay.

    A run that finished or diverged in an earlier session is taken as it is, one that was stopped is resumed, one that
    failed is tried again. Killing this process stops the trainings too.

    Args:
        configs: each with a ``run_dir`` of its own.
        jobs: processes at one time.

    Raises:
        UserError: a ``run_dir`` holds a run with other settings.
    """
    outcomes = {index: outcome for index, config in enumerate(configs) if (outcome := _earlier(config)) is not None}
    waiting = [index for index in range(len(configs)) if index not in outcomes]
    bar = tqdm(total=len(configs), initial=len(outcomes), desc="trainings", unit="training", **bar_style())
    context: Any = multiprocessing.get_context(_START)
    context.set_forkserver_preload([__name__])
    running: dict[int, tuple[int, BaseProcess]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=_train, args=(configs[waiting[0]],))
                process.start()
                running[process.sentinel] = waiting.pop(0), process
            ended = set(wait(list(running)))
            for sentinel in [s for s in running if s in ended]:
                index, process = running.pop(sentinel)
                process.join()
                outcomes[index] = _outcome(configs[index])
                bar.set_postfix_str(_in_short(configs[index], outcomes[index]), refresh=False)
                bar.update()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)
        bar.close()
    return [outcomes[index] for index in range(len(configs))]


def _train(config: Config) -> None:
    """The whole life of a process: what it says goes to a file in the run's folder."""
    folder = Path(str(config.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        train(config)
    except Diverged as error:
        write_text(folder / _DIVERGED, str(error).split(";")[0] + "\n")
    except UserError as error:
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    """Or trainings would go on alone, and a benchmark that is started again would find their folders locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _earlier(config: Config) -> Outcome | None:
    """What came of this training in an earlier session; None if it is still to be done, or to be resumed."""
    folder = Path(str(config.run_dir))
    ended = [name for name in ("record.json", _DIVERGED) if (folder / name).exists()]
    if not ended and find_checkpoint("auto", folder / "checkpoints") is None:
        return None
    check_same_settings(folder, config, "write to another folder, or delete this one to train it again")
    outcome = _outcome(config)
    return None if outcome.status == "failed" else outcome


def _outcome(config: Config) -> Outcome:
    folder = Path(str(config.run_dir))
    record: dict[str, Any] = {}
    if (folder / "record.json").exists():
        remedy = f"delete {folder} to train it again"
        record = read_mapping(folder / "record.json", remedy, ("status", "validation_loss", "perplexity", "provenance"))
        if not isinstance(record.get("data"), dict) or not isinstance(record["provenance"], dict):
            raise UserError(f"{folder / 'record.json'} is damaged (its data or provenance is gone); {remedy}")
    if record.get("status") == "finished":
        for name in _OF_NO_MORE_USE:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return Outcome("finished", record)
    if (folder / _DIVERGED).exists():
        return Outcome("diverged", message=(folder / _DIVERGED).read_text(errors="replace").strip())
    said = (folder / _LOG).read_text(errors="replace").split("\n") if (folder / _LOG).exists() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    return Outcome("failed", message=f"{last} (all of it: {folder / _LOG})")


def _in_short(config: Config, outcome: Outcome) -> str:
    name = "/".join(Path(str(config.run_dir)).parts[-2:])
    if outcome.record is None or outcome.record["perplexity"] is None:
        return f"{name}: {outcome.status}"
    return f"{name}: perplexity {outcome.record['perplexity']:.4g}"
