"""``lowrank-train COMMAND [ARGUMENT ...]``, or ``python -m lowrank_train COMMAND``."""

from __future__ import annotations

import sys

from lowrank_train.commands import COMMANDS
from lowrank_train.common.command import asks_for_help, run_command
from lowrank_train.common.errors import UserError
from lowrank_train.optim.arguments.suggestion import suggestion

__all__ = ["help_text", "main"]


def main(words: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 for anything the user must fix, 130 stopped by Ctrl-C."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name](rest)
    return run_command(lambda: _say(name))


def help_text() -> str:
    """Return every command and what it does."""
    lines = [f"  {name}: {command.__doc__}" for name, command in COMMANDS.items()]
    usage = "usage: lowrank-train COMMAND [ARGUMENT ...]; COMMAND --help lists its arguments"
    return "\n".join([usage, "", "commands:", *lines])


def _say(name: str) -> None:
    if not asks_for_help([name]):
        raise UserError(f"unknown command {name!r}; {suggestion(name, COMMANDS)}")
    print(help_text())


if __name__ == "__main__":
    sys.exit(main())
