"""torchrun's own agent, in forked processes: ranks that are killed and started again, an agent that is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from lowrank_train.common.ranks import Ranks
from lowrank_train.common.rendezvous import attempt_store
from lowrank_train.config.schema import Config
from lowrank_train.train import run
from tests.runs import (
    LAUNCHER,
    arguments,
    assert_equal_tensors,
    at_step,
    checkpoint_tensors,
    checkpoints,
    exact_history,
    send,
    train_on,
)

pytestmark = pytest.mark.slow


def start(words: list[str], log: Path, before: Callable[[], None], *, restarts: int) -> BaseProcess:
    """``torchrun --standalone --nproc-per-node 2 --max-restarts RESTARTS launch/pretrain.py WORDS``, by fork."""
    process = multiprocessing.get_context("fork").Process(target=_agent, args=(words, log, before, restarts))
    process.start()
    return process


def finish(process: BaseProcess, log: Path, seconds: float = 100) -> int:
    process.join(seconds)
    if process.is_alive():
        process.terminate()  # its ranks too
        process.join(40)
        raise AssertionError(f"the ranks hang\n{log.read_text()}")
    assert process.exitcode is not None
    return process.exitcode


def said_by_ranks(log: Path) -> list[str]:
    """Without what the agent logs."""
    return [line for line in log.read_text().splitlines() if not re.match(r"[DIWE]\d{4} ", line)]


def _agent(words: list[str], log: Path, before: Callable[[], None], restarts: int) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(settings, _rank)(words, before)


def _rank(words: list[str], before: Callable[[], None]) -> None:
    agent = os.getppid()
    _prctl_pr_set_pdeathsig(0)  # torch sets it for functions, not for commands
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # the agent's, inherited by fork
        signal.signal(number, signal.SIG_DFL)
    before()
    sys.argv = [str(LAUNCHER), *words]
    try:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    finally:
        if os.getppid() != agent:  # torch would now wait for the agent to read what a forked function returns
            os._exit(0)


def test_ranks_that_are_killed_start_again_and_the_run_ends_as_if_nothing_had_happened(
    text: Path, tmp_path: Path
) -> None:
    """A rank other than the first, then the first; the store of the agent holds what each of the dead has written."""
    words = ["steps=12", "checkpoint.every=2"]
    train_on(2, arguments(text, tmp_path / "whole", *words))

    def kill() -> None:
        step, rank = {"0": (4, 1), "1": (7, 0)}.get(os.environ["TORCHELASTIC_RESTART_COUNT"], (0, 0))
        at_step(step, send(signal.SIGKILL), rank=rank)()

    log = tmp_path / "log"
    assert finish(start(arguments(text, tmp_path / "run", *words), log, kill, restarts=3), log) == 0, log.read_text()
    assert exact_history(tmp_path / "run") == exact_history(tmp_path / "whole")
    got, expected = (checkpoint_tensors(tmp_path / name / "checkpoints" / "step-12") for name in ("run", "whole"))
    assert_equal_tensors(got, expected)
    said = said_by_ranks(log)
    assert sum("36,768 parameters; optimizer" in line for line in said) == 3
    assert not [line for line in said if "Traceback" in line or ".cc:" in line]
    for message in [line for line in said if line.startswith("error: ")]:  # of those that were not killed
        assert "lost the connection to another rank, which ended or hangs" in message
        assert "resumes from the last checkpoint" in message


@pytest.mark.parametrize("training", [True, False])
def test_ranks_whose_agent_is_killed_end_by_themselves(text: Path, tmp_path: Path, training: bool) -> None:
    """In training after the step, with a checkpoint; before it at once, also where they wait for each other."""
    words = arguments(text, tmp_path / "run", "steps=100000", "checkpoint.every=0")

    def reached() -> None:
        (tmp_path / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))

    def prepare(config: Config, ranks: Ranks, folder: Path) -> None:
        reached()
        ranks.first(lambda: time.sleep(600))

    def before() -> None:
        if training:
            at_step(3, reached)()
        else:
            run.prepare_data = prepare  # type: ignore[assignment]

    log = tmp_path / "log"
    agent = start(words, log, before, restarts=0)
    ranks = [tmp_path / "rank-0", tmp_path / "rank-1"]
    deadline = time.monotonic() + 100
    while not all(path.exists() and path.read_text() for path in ranks):
        assert agent.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    agent.kill()
    agent.join()
    left = [int(path.read_text()) for path in ranks]
    while left and time.monotonic() < deadline:
        left = [process for process in left if _is_alive(process)]
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"the ranks go on\n{log.read_text()}"
    assert "torchrun has ended without its ranks; they stop" in said_by_ranks(log)
    assert not [line for line in said_by_ranks(log) if "Traceback" in line]
    if training:
        record = json.loads((tmp_path / "run" / "record.json").read_text())
        assert record["status"] == "interrupted"
        assert checkpoints(tmp_path / "run") == [f"step-{record['steps']}"]


def _is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_attempts_with_one_store_do_not_meet(tmp_path: Path) -> None:
    """Ranks die while they look for each other, or later; the next attempt finds nothing of them."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def find(rank: int, attempt: int) -> None:
        store = attempt_store(dist.FileStore(str(tmp_path / "store"), -1), rank, 3)  # type: ignore[attr-defined]
        if rank == 0:
            store.set("who", str(attempt))
        found.put((rank, store.get("who").decode()))

    for attempt, ranks in enumerate([(1, 2), (0, 2), (2, 0, 1), (1, 0, 2)]):
        processes = [context.Process(target=find, args=(rank, attempt)) for rank in ranks]
        for process in processes:
            process.start()
        if len(ranks) == 3:
            answers = [found.get(timeout=60) for _ in ranks]
            assert sorted(answers) == [(rank, str(attempt)) for rank in range(3)]
        else:
            time.sleep(0.5)
        for process in processes:
            process.kill()
            process.join()
