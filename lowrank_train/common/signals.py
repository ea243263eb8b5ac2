"""Signals that end a training: finish the step, write a checkpoint, say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["Stop", "resume_command", "stop_signals", "typed_command"]

_ALWAYS = (signal.SIGINT, signal.SIGTERM)

_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A closed terminal, and what job schedulers send before the time is up; nohup ignores the first, and so do we then."""


class Stop:
    """Set by the first signal; the loop ends after the step at hand."""

    requested = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the signals into a request, for as long as the context lasts.

    These are SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2; the last three only where they were not ignored before.
    """
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        if not stop.requested:
            name = signal.Signals(number).name
            # not print: it fails where the signal interrupts a write to the same stream
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: finishing what is at hand, then writing a checkpoint\n".encode())
        stop.requested = True  # a second one (a terminal and a launcher both send it) changes nothing

    heeded = [n for n in _UNLESS_IGNORED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in (*_ALWAYS, *heeded)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def typed_command(words: list[str] | None = None) -> str:
    """Return the command line of this run, launcher included."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    script, *rest = sys.argv if words is None else words
    module = ["-m", "lowrank_train"] if Path(script).name == "__main__.py" else [script]
    return shlex.join([*launcher, *module, *rest])


def resume_command() -> str:
    """Return the command as it was typed; typed again, it continues the run."""
    return typed_command([*(word for word in sys.argv if not word.startswith("resume=")), "resume=auto"])
