"""Pretrain LLaMA or OPT: ``torchrun --nproc-per-node N launch/pretrain.py [FILE.yaml ...] [key=value ...]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.config.schema import help_text, load_config
    from lowrank_train.train.loop import train
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder, or 'make pretrain'")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or stopped by a signal with a checkpoint, 2 for anything the user must fix."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    return run_command(lambda: train(load_config(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
