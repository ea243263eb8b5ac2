"""SIGINT and SIGTERM during training: finish the step, write a checkpoint, say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stop", "resume_command", "stop_signals", "typed_command"]


class Stop:
    """Set by the first signal; the loop ends after the step at hand."""

    requested = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the two signals into a request, for as long as the context lasts."""
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        if not stop.requested:
            name = signal.Signals(number).name
            # not print: it fails where the signal interrupts a write to the same stream
            os.write(2, f"\n{name}: finishing what is at hand, then writing a checkpoint\n".encode())
        stop.requested = True  # a second one (a terminal and a launcher both send it) changes nothing

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def typed_command(words: list[str] | None = None) -> str:
    """The command line of this run, launcher included."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    return shlex.join([*launcher, *(sys.argv if words is None else words)])


def resume_command() -> str:
    """What was typed, to be typed again: the run folder knows where to go on."""
    return typed_command([*(word for word in sys.argv if not word.startswith("resume=")), "resume=auto"])
