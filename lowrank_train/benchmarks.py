"""The benchmarks by name: what ``launch/benchmark.py COMMAND`` and ``lowrank-train benchmark COMMAND`` do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lowrank_train.bench import compression, digits, graphs, quality, translation, tree
from lowrank_train.bench.steps import cost, optimizer_step, training_step
from lowrank_train.common.command import asks_for_help
from lowrank_train.common.errors import UserError
from lowrank_train.optim.__main__ import main as list_optimizers
from lowrank_train.optim.arguments.suggestion import suggestion

__all__ = ["COMMANDS", "answer"]


def answer(words: list[str]) -> str:
    """Run a benchmark and return its table; without one, return what there is.

    Raises:
        UserError: an unknown benchmark, or arguments that it does not take.
    """
    name, *rest = words or ["--help"]
    if name == "--list":
        code = list_optimizers(rest, "launch/benchmark.py --list")
        return sys.exit(code) if code else ""  # it has printed its table, or its error
    if asks_for_help([name]):
        return _help_text()
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {suggestion(name, COMMANDS)}")
    return COMMANDS[name][1](rest)


def _help_text() -> str:
    lines = [f"  {name}: {about}" for name, (about, _) in COMMANDS.items()]
    usage = "usage: launch/benchmark.py COMMAND [ARGUMENT ...]; COMMAND --help lists its arguments"
    table = "  --list: All optimizers on one matrix, as python -m lowrank_train.optim."
    return "\n".join([usage, "", "commands:", *lines, table])


def _configured(benchmark: Any) -> Callable[[list[str]], str]:
    """Return the command of a benchmark whose settings are YAML files and ``key=value`` overrides."""

    def measure(arguments: list[str]) -> str:
        if asks_for_help(arguments):
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
"""Name -> what it does, and the function that does it and returns a table."""
