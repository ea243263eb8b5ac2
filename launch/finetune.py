"""Fine-tune: ``torchrun --nproc-per-node N launch/finetune.py model=FOLDER data.path=TEXT [adapter.name=pissa]``."""

from __future__ import annotations

import os
import sys

try:
    from lowrank_train.errors import UserError
    from lowrank_train.finetuning import finetuning_help, load_finetuning
    from lowrank_train.trainer import train
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or stopped by a signal with a checkpoint, 2 for anything the user must mend."""
    if {"-h", "--help"} & set(arguments):
        print(finetuning_help())
        return 0
    try:
        train(load_finetuning(arguments))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step there is nothing to save
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
