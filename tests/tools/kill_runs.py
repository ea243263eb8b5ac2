"""Kill training runs before and after every file operation of a checkpoint, a rotation and an export, and resume them.

Each killed run is started again, and must end with the losses, the exported weights and the checkpoints of a run that
was never killed, bit for bit. Linux only.

    python tests/tools/kill_runs.py                          one rank, checkpoints written at once and in the background
    python tests/tools/kill_runs.py --ranks 2                two ranks, all killed together
    python tests/tools/kill_runs.py --ranks 2 --alone        two ranks, one killed; the other must end by itself
    python tests/tools/kill_runs.py --only checksums.txt     only operations whose description has this in it
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.train.loop import train
from tests.runs import arguments, documents, exact_history, write_jsonl

__all__ = ["Case", "Kill", "kill_and_resume", "operations", "undisturbed"]

_SECONDS = 120
_NOT_WATCHED = ("data", "tensorboard", "lock", "metrics.jsonl")
"""Of a run folder: tokens, which a run of its own wrote; and what is flushed in every step."""


@dataclass(frozen=True)
class Case:
    """A kind of run that is killed."""

    text: Path
    ranks: int = 1
    background: bool = False
    """Whether checkpoints are written in the background."""
    alone: bool = False
    """Whether the other ranks are left to themselves."""

    def words(self, run_dir: Path) -> list[str]:
        """The command line: two checkpoints of which one is kept, and the export."""
        words = ["steps=4", "checkpoint.every=2", "checkpoint.keep=1", f"data.folder={self.text.parent / 'tokens'}"]
        return arguments(self.text, run_dir, *words, f"checkpoint.asynchronous={str(self.background).lower()}")


@dataclass(frozen=True)
class Kill:
    """Where a run is killed."""

    rank: int
    number: int
    """Of the file operation on that rank, from 1."""
    after: bool
    operation: str
    """What it was in the undisturbed run; in the background the order of two threads may differ."""

    def __str__(self) -> str:
        return f"rank {self.rank}, {'after' if self.after else 'before'} operation {self.number}, {self.operation}"


def undisturbed(case: Case, run_dir: Path) -> list[list[str]]:
    """Train without a kill; returns the file operations of each rank, in order."""
    codes = _run(case, run_dir, None, run_dir.parent)
    if codes != [0] * case.ranks:
        raise RuntimeError(f"the undisturbed run ended with {codes}; see {run_dir.parent}/output-*")
    return [(run_dir.parent / f"operations-{rank}").read_text().splitlines() for rank in range(case.ranks)]


def operations(found: list[list[str]], only: str = "") -> Iterator[Kill]:
    """A kill before and one after every file operation whose description has ``only`` in it."""
    for rank, names in enumerate(found):
        for number, name in enumerate(names, 1):
            if only in name:
                yield from (Kill(rank, number, after, name) for after in (False, True))


def kill_and_resume(case: Case, kill: Kill, whole: Path, folder: Path) -> str | None:
    """Kill a run in an empty folder and start it again; what differs from the undisturbed one, None if nothing does."""
    run_dir = folder / "run"
    codes = _run(case, run_dir, kill, folder)
    if codes[kill.rank] == 0:
        return "was not killed"
    if codes[kill.rank] != -signal.SIGKILL:
        return f"ended with {codes} by itself"
    if None in codes:
        return f"left a rank that did not end within {_SECONDS} s"
    codes = _run(case, run_dir, None, folder)
    if codes != [0] * case.ranks:
        output = "".join((folder / f"output-{rank}").read_text() for rank in range(case.ranks))
        return f"could not be resumed ({codes}): {output.strip().splitlines()[-1:]}"
    if exact_history(run_dir) != exact_history(whole):
        return "has other losses"
    weights = "huggingface/model.safetensors"
    if (run_dir / weights).read_bytes() != (whole / weights).read_bytes():
        return "exported other weights"
    names = [sorted(path.name for path in (place / "checkpoints").iterdir()) for place in (run_dir, whole)]
    if not set(names[1]) <= set(names[0]):  # an older one is left where the kill came before its deletion
        return f"has the checkpoints {names[0]}; expected {names[1]}"
    left = [path.name for path in run_dir.rglob("*.tmp")]
    return f"left {left[0]}" if left else None


def _run(case: Case, run_dir: Path, kill: Kill | None, folder: Path) -> list[int | None]:
    """Exit code of each rank, None for one that had to be ended."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="store-") as store:
        ranks = [
            context.Process(target=_rank, args=(case, run_dir, rank, Path(store), kill, folder))
            for rank in range(case.ranks)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + _SECONDS
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [None if rank.is_alive() else rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
    return codes


def _rank(case: Case, run_dir: Path, rank: int, store: Path, kill: Kill | None, folder: Path) -> None:
    """The life of a rank."""
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.ranks))
    (store / f"pid-{rank}").write_text(str(os.getpid()))
    limit = timedelta(seconds=_SECONDS // 2)
    method = f"file://{store}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=case.ranks, timeout=limit)
    seen: list[str] = []

    def die() -> None:
        others = [] if case.alone else [int((store / f"pid-{other}").read_text()) for other in range(case.ranks)]
        for process in [*(pid for pid in others if pid != os.getpid()), os.getpid()]:
            os.kill(process, signal.SIGKILL)

    def act(operation: str, after: bool) -> None:
        if not after:
            seen.append(operation)
        if kill is not None and kill.rank == rank and kill.number == len(seen) and kill.after == after:
            die()

    _watch(run_dir, act)
    try:
        train(load_config(case.words(run_dir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    if kill is None:
        (folder / f"operations-{rank}").write_text("\n".join(seen))
    dist.destroy_process_group()


def _watch(folder: Path, act: Callable[[str, bool], None]) -> None:
    """Call ``act(description, after)`` around every operation of this process that changes what is in a folder."""
    lock = threading.RLock()

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            path = _inside(folder, name, args, kwargs)
            if path is None:
                return original(*args, **kwargs)
            with lock:
                act(f"{name} {path}", False)
                try:
                    return original(*args, **kwargs)
                finally:  # also one that fails, such as making a folder that is there
                    act(f"{name} {path}", True)

        setattr(module, name, call)

    for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "fsync", "open", "truncate", "link"):
        watched(os, name)
    watched(io, "open")
    builtins.open = io.open


def _inside(folder: Path, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The path within the folder that an operation changes; None if it changes nothing there."""
    target = args[0] if args else kwargs.get("file", kwargs.get("path"))
    if name == "open" and not _writes(args, kwargs):
        return None
    with contextlib.suppress(OSError, TypeError, ValueError):
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        else:
            base = kwargs.get("dir_fd")
            path = os.path.join(os.getcwd() if base is None else os.readlink(f"/proc/self/fd/{base}"), target)
        within = Path(path).relative_to(folder)
        return None if not within.parts or within.parts[0] in _NOT_WATCHED else str(within)
    return None


def _writes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
    if isinstance(mode, int):  # flags of os.open
        return bool(mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return bool(set(str(mode)) & set("wax+"))


def main(words: list[str]) -> int:
    """Exit code: 0 if every killed run came out as the undisturbed one, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="how many processes a run has (default 1)")
    parser.add_argument("--alone", action="store_true", help="kill one rank and leave the others to themselves")
    parser.add_argument("--background", choices=("true", "false"), help="how checkpoints are written (default both)")
    parser.add_argument("--only", default="", help="operations whose description has this in it (default all)")
    parser.add_argument("--every", type=int, default=1, help="take every n-th kill (default 1)")
    given = parser.parse_args(words)
    failed = 0
    for background in (False, True) if given.background is None else (given.background == "true",):
        with tempfile.TemporaryDirectory(prefix="kill-runs-") as name:
            folder = Path(name)
            text = write_jsonl(folder / "stories.jsonl", documents(60))
            case = Case(text, given.ranks, background, given.alone)
            whole = folder / "whole" / "run"
            whole.parent.mkdir()
            undisturbed(case, whole.parent / "first")  # writes the tokens
            kills = list(operations(undisturbed(case, whole), given.only))[:: given.every]
            print(f"{len(kills)} kills, {given.ranks} rank(s), in the background: {background}", flush=True)
            outcomes: dict[str, int] = {}
            for i, kill in enumerate(kills, 1):
                place = folder / "killed"
                place.mkdir()
                problem = kill_and_resume(case, kill, whole, place)
                outcomes[problem or "resumed bit for bit"] = outcomes.get(problem or "resumed bit for bit", 0) + 1
                if problem is not None:
                    failed += 1
                    print(f"{kill}: {problem}", flush=True)
                elif i % 20 == 0:
                    print(f"{i} of {len(kills)}", flush=True)
                shutil.rmtree(place)
            for outcome, count in outcomes.items():
                print(f"  {count:4d} {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
