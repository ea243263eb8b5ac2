"""Singular values of a model's matrices: ``python launch/spectrum.py FOLDER [FOLDER ...] [key=value ...]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.spectra.command import help_text, load_settings, measure
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 2 for anything the user must fix, 130 stopped."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    return run_command(lambda: _measure(arguments))


def _measure(arguments: list[str]) -> None:
    folders, settings = load_settings(arguments)
    print(measure(folders, settings))
    print(f"\nplots, CSV and JSON: {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
