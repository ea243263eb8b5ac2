"""Signals that end a run, a terminal that is closed, a pipe that nobody reads any more."""

from __future__ import annotations

import json
import os
import pty
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hyperbolic import helpers as graphs
from tests.runs import LAUNCHER, arguments, at_step, checkpoints, losses, send, train_on
from tests.tiers import only_first_quick

SCHEDULERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
"""Beside SIGINT and SIGTERM, which test_resume.py sends."""


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Signals of these tests are not ignored, whoever started the tests: under nohup SIGHUP would be."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SCHEDULERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", only_first_quick(SCHEDULERS))
def test_the_step_is_finished_and_a_checkpoint_written(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Sent to one rank only, as a terminal or a scheduler may do."""
    world_size = 2 if number == signal.SIGUSR1 else 1
    rank = world_size - 1
    record = train_on(world_size, arguments(text, tmp_path), at_step(5, send(number), rank=rank))[0]
    assert (record.status, record.steps) == ("interrupted", 5)
    assert checkpoints(tmp_path) == ["step-5"]


@pytest.mark.parametrize("number", only_first_quick(SCHEDULERS))
def test_networks_in_hyperbolic_space_too(tmp_path: Path, number: signal.Signals) -> None:
    folder = graphs.tree_folder(tmp_path)
    record = graphs.train(graphs.words(folder, tmp_path / "run"), graphs.at_call(13, send(number)))
    assert record.status == "interrupted"
    assert checkpoints(tmp_path / "run")[-1] == f"step-{record.epochs}"


def test_sigcont_before_sigterm_and_a_signal_that_nohup_ignores(text: Path, tmp_path: Path) -> None:
    """SLURM sends the two in a row; under nohup a closed terminal does not matter."""

    def both() -> None:
        os.kill(os.getpid(), signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGTERM)

    record = train_on(1, arguments(text, tmp_path / "a"), at_step(3, both))[0]
    assert (record.status, record.steps) == ("interrupted", 3)

    def ignored() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_step(3, send(signal.SIGHUP))()

    assert train_on(1, arguments(text, tmp_path / "b", "steps=4"), ignored)[0].status == "finished"


def launch(words: list[str], place: Callable[[], None] = lambda: None) -> None:
    """The rest of a forked process: the command, its output on descriptors 1 and 2."""
    code = 1
    try:
        place()
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = [str(LAUNCHER), *words]
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def follow(reader: int, run_dir: Path, steps: int) -> str:
    """Read what a process says until it has made so many steps; then close its terminal, or pipe."""
    os.set_blocking(reader, False)
    said, deadline = b"", time.monotonic() + 100
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < steps:
        assert time.monotonic() < deadline, said.decode()
        try:
            said += os.read(reader, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(reader)
    return said.decode()


def exit_code(process: int) -> int:
    deadline = time.monotonic() + 100
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError("the run did not end")
        time.sleep(0.02)


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    process, terminal = pty.fork()
    if process == 0:
        launch(arguments(text, tmp_path, "steps=100000"))
    said = follow(terminal, tmp_path, 3)
    assert exit_code(process) == 0, said
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert checkpoints(tmp_path) == [f"step-{record['steps']}"]
    assert (tmp_path / "report.md").exists()


def test_a_run_goes_on_when_nobody_reads_what_it_says(text: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:

        def into_pipe() -> None:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)

        launch(arguments(text, tmp_path, "steps=40", "log_every=1"), into_pipe)
    os.close(writer)
    said = follow(reader, tmp_path, 1)
    assert exit_code(process) == 0, said
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "finished"
    assert checkpoints(tmp_path) == ["step-40"]
