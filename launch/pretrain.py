"""Pretrain a language model: ``torchrun --nproc-per-node N launch/pretrain.py [FILE.yaml ...] [key=value ...]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.commands import pretrain as main
except ModuleNotFoundError as error:
    if error.name != "lowrank_train":
        raise
    sys.exit(
        "lowrank-train is not installed in this Python: run 'pip install -e .[all]' or 'make pretrain' in its folder"
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
