"""The body that all commands in ``launch/`` share: errors become one message, the end an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lowrank_train.common.errors import OwnError, UserError
from lowrank_train.common.host_memory import say_out_of_memory
from lowrank_train.common.lasting_output import lasting_output

__all__ = ["run_command"]


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
