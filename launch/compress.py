"""Compress a model to low-rank factors: ``python launch/compress.py FOLDER --rank-reduction 0.5 --out small/``."""

from __future__ import annotations

import os
import sys

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.compress.command import compress_folder, help_text, load_settings
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 2 for anything the user must fix, 130 stopped."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    return run_command(lambda: _compress(arguments))


def _compress(arguments: list[str]) -> None:
    table = compress_folder(*load_settings(arguments))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
