"""Trainings of a benchmark, each in a folder that it is found in again: what ended in an earlier session is not redone.

A training's configuration has a ``run_dir``. In it are config.yaml, and record.json or diverged.txt once it has ended.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from tqdm import tqdm

from lowrank_train.bench.report import finite, output_folder
from lowrank_train.common.errors import Diverged, UserError
from lowrank_train.common.progress import bar_style
from lowrank_train.common.small_files import write_text
from lowrank_train.config.loading import save_config
from lowrank_train.files.checkpoint_folder import find_checkpoint
from lowrank_train.files.json_files import read_mapping
from lowrank_train.train.run_folder import check_same_settings

__all__ = ["Configured", "Outcome", "Trainer", "check_same", "keep_record", "required"]

_START = "forkserver"
"""A server without threads forks the trainings: forking this process would copy the locks of threads it may have, and
a fresh interpreter for each would import torch every time."""

_DIVERGED = "diverged.txt"
_LOG = "log.txt"


class Configured(Protocol):
    """A configuration, of any schema, of one training."""

    run_dir: str | None


C = TypeVar("C", bound=Configured)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one training."""

    status: Literal["finished", "diverged", "failed"]
    record: dict[str, Any] | None = None
    """record.json of a finished run."""
    message: str = ""
    """The reason why a training did not finish."""


@dataclass(frozen=True)
class Trainer(Generic[C]):
    """One kind of training, in this process or in others.

    Args:
        train: trains a configuration and leaves record.json, with a ``status``, in its ``run_dir``; for other
            processes, a function of a module.
        needs: keys that a record must have; ``a.b`` for the key b of the mapping a.
        jobs: processes at one time, each on one thread; None: all in this one.
        no_more_use: names in ``run_dir`` that are deleted once the training has finished.
    """

    train: Callable[[C], object]
    needs: Sequence[str] = ()
    jobs: int | None = None
    no_more_use: Sequence[str] = ()

    def train_each(self, configs: Sequence[C]) -> list[Outcome]:
        """Train every configuration in its ``run_dir``; configurations that share one are trained once.

        A training that finished or diverged in an earlier session is taken as it is, one that was stopped is resumed,
        one that failed is tried again. Killing this process stops the trainings too.

        Raises:
            UserError: a ``run_dir`` holds a training with other settings; in this process, also as ``train``, or the
                training was stopped.
        """
        distinct: dict[str, C] = {}
        for config in configs:
            if distinct.setdefault(str(config.run_dir), config) != config:
                raise UserError(f"two different trainings would be written to {config.run_dir}; give other names")
        outcomes = {path: found for path, config in distinct.items() if (found := self.earlier(config)) is not None}
        missing = {path: config for path, config in distinct.items() if path not in outcomes}
        counts = {"total": len(distinct), "initial": len(outcomes), "disable": not configs}
        with tqdm(desc="trainings", unit="training", **counts, **bar_style()) as bar:
            for path in self._in_processes(missing) if self.jobs else self._in_place(missing):
                outcomes[path] = self.outcome(distinct[path])
                bar.set_postfix_str(f"{'/'.join(Path(path).parts[-2:])}: {outcomes[path].status}", refresh=False)
                bar.update()
        return [outcomes[str(config.run_dir)] for config in configs]

    def earlier(self, config: C) -> Outcome | None:
        """Return what came of a training in an earlier session; None if it is still to be done, or to be resumed."""
        folder = Path(str(config.run_dir))
        ended = [name for name in ("record.json", _DIVERGED) if (folder / name).exists()]
        if not ended and find_checkpoint("auto", folder / "checkpoints") is None:
            return None
        check_same_settings(folder, config, "give another output, or delete that folder to train it again")
        outcome = self.outcome(config)
        return None if outcome.status == "failed" else outcome

    def outcome(self, config: C) -> Outcome:
        """Return what a training has left in its folder. Raises UserError for a damaged record."""
        folder = Path(str(config.run_dir))
        record: dict[str, Any] = {}
        if (folder / "record.json").exists():
            record = self._read(folder / "record.json", f"delete {folder} to train it again")
        if record.get("status") == "finished":
            for path in (folder / name for name in self.no_more_use):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return Outcome("finished", record)
        if (folder / _DIVERGED).exists():
            return Outcome("diverged", message=(folder / _DIVERGED).read_text(errors="replace").strip())
        said = (folder / _LOG).read_text(errors="replace").split("\n") if (folder / _LOG).exists() else []
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return Outcome("failed", message=f"{last} (all of it: {folder / _LOG})")

    def _read(self, file: Path, remedy: str) -> dict[str, Any]:
        record = read_mapping(file, remedy, ["status", *(key.partition(".")[0] for key in self.needs)])
        for section, inner in (key.split(".") for key in self.needs if "." in key):
            if not isinstance(record[section], dict) or inner not in record[section]:
                raise UserError(f"{file} is damaged (its {section} has no {inner!r}); {remedy}")
        return record

    def _in_place(self, configs: Mapping[str, C]) -> Any:
        for path, config in configs.items():
            _noting_divergence(self.train, config)
            if self.outcome(config).status == "failed":
                raise UserError(f"{path} was stopped; start the benchmark again to go on")
            yield path

    def _in_processes(self, configs: Mapping[str, C]) -> Any:
        waiting, running = list(configs), dict[int, tuple[str, BaseProcess]]()
        context: Any = multiprocessing.get_context(_START)
        context.set_forkserver_preload([__name__, self.train.__module__])
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or 1):
                    process = context.Process(target=_life, args=(self.train, configs[waiting[0]]))
                    process.start()
                    running[process.sentinel] = waiting.pop(0), process
                for sentinel in set(wait(list(running))) & set(running):
                    path, process = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    yield path
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()
            signal.signal(signal.SIGTERM, before)


def required(schema: type[Any]) -> list[str]:
    """Return the keys that a record of this dataclass must have."""
    return [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory]


def check_same(outcomes: Iterable[Outcome], what: str, of: Callable[[Any], object]) -> None:
    """Raise UserError if records, perhaps of several sessions, differ in something that all must share."""
    first: dict[str, Any] | None = None
    for record in (outcome.record for outcome in outcomes if outcome.record):
        first = first or record
        if of(record) != of(first):
            folders = [found["config"]["run_dir"] for found in (record, first)]
            raise UserError(
                f"{folders[0]} was trained on another {what} than {folders[1]}: {of(record)}, not {of(first)}; delete "
                "one of them and run again"
            )


def keep_record(config: Configured, figures: Mapping[str, Any]) -> None:
    """Write config.yaml and record.json of a training that is over into its ``run_dir``.

    Raises UserError for a folder that cannot be written.
    """
    folder = output_folder(str(config.run_dir), "run_dir")
    text = json.dumps(finite({"status": "finished", **figures}), indent=1)
    try:
        save_config(config, folder / "config.yaml")
        write_text(folder / "record.json", text + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; free space, or give another folder") from None


def _life(train: Callable[[C], object], config: C) -> None:
    """The whole life of a process: what it says goes to a file in the run's folder."""
    folder = Path(str(config.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _noting_divergence(train, config)
    except UserError as error:
        sys.exit(f"error: {error}")


def _noting_divergence(train: Callable[[C], object], config: C) -> None:
    try:
        train(config)
    except Diverged as error:
        write_text(Path(str(config.run_dir)) / _DIVERGED, str(error).split(";")[0] + "\n")


def _end_with_parent() -> None:
    """Without it trainings would go on alone, and a benchmark started again would find their folders locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
