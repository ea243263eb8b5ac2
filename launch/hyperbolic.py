"""Train a graph network on the Lorentz model: ``python launch/hyperbolic.py FILE.yaml [key=value ...]``."""

from __future__ import annotations

import sys

try:
    from lowrank_train.config import flags_to_keys
    from lowrank_train.errors import UserError
    from lowrank_train.hyperbolic.graph_config import GraphConfig, graph_help_text, load_graph_config
    from lowrank_train.hyperbolic.graph_training import train_graph
    from lowrank_train.signals import resume_command
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or stopped by a signal with a checkpoint, 2 for anything the user must mend."""
    if {"-h", "--help"} & set(arguments):
        print(graph_help_text())
        return 0
    try:
        record = train_graph(load_graph_config(flags_to_keys(arguments, GraphConfig)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first epoch there is nothing to save
        return 130
    if record.status != "finished":
        print(f"stopped at epoch {record.epochs}; resume with: {resume_command()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
