"""Benchmarks: ``python launch/benchmark.py COMMAND [ARGUMENT ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

try:
    from lowrank_train.bench import (
        compression,
        digits,
        graphs,
        quality,
        translation,
        tree,
    )
    from lowrank_train.bench.steps import cost, optimizer_step, training_step
    from lowrank_train.common.command import run_command
    from lowrank_train.common.errors import UserError
    from lowrank_train.optim.__main__ import main as list_optimizers
    from lowrank_train.optim.arguments.suggestion import suggestion
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .[all]' in its folder")


def _configured(benchmark: Any) -> Callable[[list[str]], str]:
    """A benchmark whose settings are YAML files and ``key=value`` overrides."""

    def measure(arguments: list[str]) -> str:
        if {"-h", "--help"} & set(arguments):
            return benchmark.help_text()
        return benchmark.measure(benchmark.load(arguments))

    return measure


COMMANDS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "quality": (
        "Train the same model on the same tokens with each optimizer, and compare perplexity, state and time.",
        _configured(quality),
    ),
    "optimizer-step": (
        "Time one step of each optimizer on the matrices of a model, interleaved with torch's AdamW.",
        optimizer_step.measure,
    ),
    "step-cost": ("Count kernels and bytes of every optimizer's step, and predict its time on GPUs.", cost.measure),
    "training-step": ("Time whole training steps of methods against dense AdamW, interleaved.", training_step.measure),
    "compression": (
        "Compress one model in several ways to equal ranks or bytes, and compare perplexity.",
        _configured(compression),
    ),
    "hyperbolic": (
        "Train graph networks in hyperbolic space by both protocols: full, SST, LoRA, ReLoRA*, and Euclidean twins.",
        _configured(graphs),
    ),
    "translation": (
        "Train a small translator in hyperbolic and in Euclidean space: full, LoRA, ReLoRA* and SST.",
        _configured(translation),
    ),
    "digits": ("Train a small perceptron on handwritten digits: full, LoRA, ReLoRA* and SST.", digits.measure),
    "tree": (
        "Embed a tree in hyperbolic space: Riemannian AdamW with whole and low-rank moments, and geoopt's.",
        tree.measure,
    ),
    "communication": (
        "Predict the bytes each optimizer sends per step when a model is sharded.",
        optimizer_step.communication,
    ),
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 2 for anything the user must fix, 130 stopped."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(help_text())
        return 0
    if command == "--list":
        return list_optimizers(rest, "launch/benchmark.py --list")
    return run_command(
        lambda: print(_find(command)(rest)),
        stopped="stopped; the same command goes on from here ('optimizer-step' and 'training-step' start again)",
    )


def help_text() -> str:
    """Every command and what it does."""
    lines = [f"  {name}: {about}" for name, (about, _) in COMMANDS.items()]
    usage = "usage: launch/benchmark.py COMMAND [ARGUMENT ...]; COMMAND --help lists its arguments"
    table = "  --list: All optimizers on one matrix, as python -m lowrank_train.optim."
    return "\n".join([usage, "", "commands:", *lines, table])


def _find(command: str) -> Callable[[list[str]], str]:
    if command in COMMANDS:
        return COMMANDS[command][1]
    raise UserError(f"unknown command {command!r}; {suggestion(command, COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
