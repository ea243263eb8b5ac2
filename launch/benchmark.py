"""Benchmarks: ``python launch/benchmark.py COMMAND [ARGUMENT ...]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.commands import benchmark as main
except ModuleNotFoundError as error:
    if error.name != "lowrank_train":
        raise
    sys.exit(
        "lowrank-train is not installed in this Python: run 'pip install -e .[all]' or 'make pretrain' in its folder"
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
