"""The body that all commands share: help, errors as one message, the end as an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from lowrank_train.common.errors import OwnError, UserError
from lowrank_train.common.host_memory import say_out_of_memory
from lowrank_train.common.lasting_output import lasting_output

__all__ = ["Command", "Work", "asks_for_help", "command", "run_command"]

Command = Callable[[list[str]], int]
"""A command takes the words after its name and returns an exit code."""


class Work(NamedTuple):
    """What a command does with its words."""

    help_text: Callable[[], str]
    do: Callable[[], object]


def command(extra: str, *, stopped: str = "") -> Callable[[Callable[[list[str]], Work]], Command]:
    """Make a command of a function that imports what it needs and returns its ``Work``.

    Args:
        extra: the extra of this distribution that installs what the command imports.
        stopped: what is said when Ctrl-C ends it.
    """

    def wrap(prepare: Callable[[list[str]], Work]) -> Command:
        @functools.wraps(prepare)
        def run(words: list[str]) -> int:
            return run_command(lambda: _prepare_and_do(prepare, words, extra), stopped=stopped)

        return run

    return wrap


def asks_for_help(words: list[str]) -> bool:
    """Return whether ``-h`` or ``--help`` is among the words."""
    return bool({"-h", "--help"} & set(words))


def run_command(work: Callable[[], object], *, stopped: str = "") -> int:
    """Do the work of a command.

    Args:
        work: what the command does.
        stopped: what is said when Ctrl-C ends it.

    Returns:
        The exit code: 0 done, 2 for anything the user must fix, which is said in one message, 130 stopped by Ctrl-C.
    """
    with lasting_output():
        try:
            with say_out_of_memory():
                work()
        except UserError as error:
            if isinstance(error, OwnError) or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if stopped:
                print(f"\n{stopped}", file=sys.stderr)
            return 130
    return 0


def _prepare_and_do(prepare: Callable[[list[str]], Work], words: list[str], extra: str) -> None:
    try:
        work = prepare(words)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lowrank_train"):
            raise
        raise UserError(
            f"this command needs the package {error.name!r}, which is not installed; run: pip install "
            f"'lowrank-train[{extra}]'"
        ) from None
    if asks_for_help(words):
        print(work.help_text())
    else:
        work.do()
