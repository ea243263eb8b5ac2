"""Fine-tune: ``torchrun --nproc-per-node N launch/finetune.py model=FOLDER data.path=TEXT [adapter.name=pissa]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.train.finetune import finetuning_help, load_finetuning
    from lowrank_train.train.loop import train
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or stopped by a signal with a checkpoint, 2 for anything the user must fix."""
    if {"-h", "--help"} & set(arguments):
        print(finetuning_help())
        return 0
    return run_command(lambda: train(load_finetuning(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
