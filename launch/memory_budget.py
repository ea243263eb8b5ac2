"""What fits a memory budget: ``python launch/memory_budget.py --budget 24GiB --models llama opt --seq-len 1024``."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from lowrank_train.budget_report import table, write_budget
    from lowrank_train.budget_run import help_text, load_budget, measured_against, solve
    from lowrank_train.errors import UserError
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 2 for anything the user must mend, 130 stopped."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        config = load_budget(arguments)
        outcome = solve(config)
        write_budget(outcome, Path(config.out))
        measured = measured_against(config, outcome.fits[0]) if config.measure else ""
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(outcome))
    if measured:
        print(f"\n{measured}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
