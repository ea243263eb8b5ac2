"""Compress a model to low-rank factors: ``python launch/compress.py FOLDER --rank-reduction 0.5 --out small/``."""

from __future__ import annotations

import os
import sys

try:
    from lowrank_train.compress_run import compress_folder, help_text, load_settings
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
        folder, settings = load_settings(arguments)
        table = compress_folder(folder, settings)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
