"""A run folder that is deleted under a run, a disk that is full or too small, memory that is not there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from lowrank_train.common import host_memory
from lowrank_train.common.host_memory import available_bytes
from lowrank_train.files import disk
from tests.hyperbolic import helpers as graphs
from tests.runs import Launched, arguments, at_step, checkpoints, failure, train_on

# -------------------------------------------------------------------------------------------------- deleted under a run


@pytest.mark.parametrize(
    ("world_size", "what", "how", "background"),
    [(2, "checkpoints", "delete", "true"), (2, "", "delete", "false"), (1, "", "move", "true")],
)
def test_a_folder_deleted_or_moved_under_a_run_ends_it_with_a_message(
    text: Path, tmp_path: Path, world_size: int, what: str, how: str, background: str
) -> None:
    run_dir = tmp_path / "run"

    def lose() -> None:
        if how == "move":
            run_dir.rename(tmp_path / "elsewhere")
        else:
            while (run_dir / what).exists():  # files may appear meanwhile
                shutil.rmtree(run_dir / what, ignore_errors=True)

    words = arguments(text, run_dir, "checkpoint.every=4", f"checkpoint.asynchronous={background}", "log_every=20")
    message = failure(words, world_size, at_step(7, lose, rank=0))
    assert f"{run_dir}" in message
    assert "was deleted or moved while the run was writing to it" in message
    assert not (run_dir / "checkpoints").exists()  # nothing is begun anew beside what is lost


def test_a_folder_deleted_while_a_checkpoint_is_written(text: Path, tmp_path: Path) -> None:
    """Every file operation of the writer meets a folder that is gone."""

    def install() -> None:
        write = filesystem.FileSystemWriter.write_data

        def write_data(self: Any, *rest: Any) -> Any:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return write(self, *rest)

        filesystem.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]

    for world_size, background in ((2, "true"), (1, "false")):
        words = arguments(text, tmp_path / "run", "steps=6", "checkpoint.every=2")
        message = failure([*words, f"checkpoint.asynchronous={background}"], world_size, install)
        assert f"{tmp_path / 'run'}" in message
        assert "was deleted or moved" in message


def test_a_figure_that_goes_nowhere_is_noticed(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "checkpoint.every=0", "log_every=1")
    message = failure(words, 1, at_step(3, lambda: shutil.rmtree(tmp_path / "run")))
    assert "cannot write metrics" in message
    assert "was deleted or moved while the run was writing to it" in message


def test_networks_in_hyperbolic_space_too(tmp_path: Path) -> None:
    words = graphs.words(graphs.tree_folder(tmp_path), tmp_path / "run")
    for what in ("checkpoints", ""):
        lose = graphs.at_call(13, lambda what=what: shutil.rmtree(tmp_path / "run" / what))  # type: ignore[misc]
        message = graphs.failure(words, lose)
        assert f"{tmp_path / 'run'}" in message
        assert "was deleted or moved while the run was writing to it" in message
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ full disk


def test_a_disk_that_fills_up_is_named_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, where two threads could speak of it."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", no_space)
    run = Launched(arguments(text, tmp_path / "run", "steps=12", "checkpoint.every=2"), tmp_path / "log")
    assert run.finish(100) == 2
    assert run.output.count("No space left on device") == 1
    assert "Traceback" not in run.output


def smaller_disk(free: int) -> Callable[[], None]:
    def install() -> None:
        usage = shutil.disk_usage
        disk.shutil.disk_usage = lambda path: usage(path)._replace(free=free)  # type: ignore[assignment, misc]

    return install


def test_a_disk_too_small_for_what_is_to_come_is_said_before_training(text: Path, tmp_path: Path) -> None:
    world_size = 2
    words = ["steps=12", "checkpoint.every=2", "checkpoint.keep=3"]
    train_on(world_size, arguments(text, tmp_path / "whole", *words))
    folders = list((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(folders) == 3
    one = sum(file.stat().st_size for file in folders[0].iterdir())
    run_dir = tmp_path / "run"
    message = failure(arguments(text, run_dir, *words), world_size, smaller_disk(3 * one))
    for expected in (str(run_dir), "4 checkpoints of", "free space, lower checkpoint.keep, or set run_dir"):
        assert expected in message
    assert checkpoints(run_dir) == []
    assert not (run_dir / "metrics.jsonl").exists()

    enough = smaller_disk(int(5.2 * one))  # what is said to be needed is what is written, and little more
    assert train_on(world_size, arguments(text, run_dir, *words, "steps=8"), enough)[0].status == "finished"
    there = smaller_disk(int(1.6 * one))  # three of them lie there already
    assert train_on(world_size, arguments(text, run_dir, *words), there)[0].status == "finished"


def test_a_disk_too_small_for_networks_in_hyperbolic_space(tmp_path: Path) -> None:
    message = graphs.failure(graphs.words(graphs.tree_folder(tmp_path), tmp_path / "run"), smaller_disk(1000))
    assert "3 checkpoints of" in message
    assert "1000 B free" in message


# --------------------------------------------------------------------------------------------------------------- memory


def test_what_the_memory_of_the_host_cannot_hold_is_said_before_it_is_built(text: Path, tmp_path: Path) -> None:
    run = arguments(text, tmp_path / "run")

    def little() -> None:
        host_memory.available_bytes = lambda: 10 * 2**20  # type: ignore[assignment]

    message = failure([*run, "seq_len=512", "tokens_per_step=8192", "micro_batch=8"], 2, little)
    for expected in ("of host memory, and 10.00 MiB are available", "weights", "checkpoint.asynchronous=false"):
        assert expected in message
    assert not (tmp_path / "run").exists()
    large = ["model.overrides.hidden_size=262144", "model.overrides.num_hidden_layers=2"]
    run = Launched([*run, *large], tmp_path / "log")  # a terabyte, on this machine as it is
    assert run.finish(100) == 2
    assert run.output.count("of host memory, and") == 1
    assert len(run.output.splitlines()) == 1


def test_memory_that_runs_out_is_one_message(text: Path, tmp_path: Path) -> None:
    """Whatever asks for it, torch's allocator or Python, on a rank other than the first too."""
    words = arguments(text, tmp_path / "run")
    for ask in (lambda: torch.empty(2**46), lambda: bytearray(2**46)):
        message = failure(words, 1, at_step(3, ask))
        assert "the memory of this host ran out" in message
        assert "are predicted" in message
        assert "are available; take a smaller model or micro_batch" in message


def test_available_memory_follows_the_limits_of_the_process() -> None:
    whole = available_bytes()
    assert whole is not None
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        os.write(writer, str(available_bytes()).encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert 2**27 < int(os.read(reader, 100)) <= 2**28 < whole
