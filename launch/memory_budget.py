"""What fits a memory budget: ``python launch/memory_budget.py --budget 24GiB --models llama opt --seq-len 1024``."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.memory.budget import help_text, load_budget, measured_against, solve
    from lowrank_train.memory.report import check_budget, table, write_budget
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 2 for a setting that does not fit and for anything else the user must fix, 130 stopped."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    return run_command(lambda: _answer(arguments))


def _answer(arguments: list[str]) -> None:
    config = load_budget(arguments)
    outcome = solve(config)
    write_budget(outcome, Path(config.out))
    measured = measured_against(config, outcome.fits[0]) if config.measure else ""
    print(table(outcome))
    if measured:
        print(f"\n{measured}")
    check_budget(outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
