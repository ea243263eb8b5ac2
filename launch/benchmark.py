"""Benchmarks: ``python launch/benchmark.py COMMAND [ARGUMENT ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable

try:
    from lowrank_train.bench import compression as compression_benchmark
    from lowrank_train.bench import graphs as graph_benchmark
    from lowrank_train.bench import optimizer_step as step_benchmark
    from lowrank_train.bench import quality
    from lowrank_train.bench import training_step as training_benchmark
    from lowrank_train.bench import translation as translation_benchmark
    from lowrank_train.bench.digits import measure_digits
    from lowrank_train.bench.tree import measure_tree
    from lowrank_train.common.command import run_command
    from lowrank_train.common.errors import UserError
    from lowrank_train.optim.__main__ import main as list_optimizers
    from lowrank_train.optim.arguments.suggestion import suggestion
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .[all]' in its folder")


def measure_quality(arguments: list[str]) -> None:
    """Train the same model on the same tokens with each optimizer, and compare perplexity, state and time."""
    if {"-h", "--help"} & set(arguments):
        print(quality.help_text())
        return
    settings = quality.load_quality(arguments)
    print(quality.measure_quality(settings))
    print(f"\n{settings.output}/quality.md, .json, .png", file=sys.stderr)


def measure_steps(arguments: list[str]) -> None:
    """Time one step of each optimizer on the matrices of a model, interleaved with torch's AdamW."""
    print(step_benchmark.measure_steps(arguments))


def measure_training(arguments: list[str]) -> None:
    """Time whole training steps of methods against dense AdamW, interleaved."""
    print(training_benchmark.measure_training(arguments))


def measure_compression(arguments: list[str]) -> None:
    """Compress one model in several ways to equal ranks or bytes, and compare perplexity."""
    if {"-h", "--help"} & set(arguments):
        print(compression_benchmark.help_text())
        return
    print(compression_benchmark.measure_compression(compression_benchmark.load_settings(arguments)))


def measure_hyperbolic(arguments: list[str]) -> None:
    """Train graph networks in hyperbolic space by both protocols: full, SST, LoRA, ReLoRA*, and Euclidean twins."""
    if {"-h", "--help"} & set(arguments):
        print(graph_benchmark.help_text())
        return
    print(graph_benchmark.measure_graphs(graph_benchmark.load_benchmark(arguments)))


def measure_translation(arguments: list[str]) -> None:
    """Train a small translator in hyperbolic and in Euclidean space: full, LoRA, ReLoRA* and SST."""
    if {"-h", "--help"} & set(arguments):
        print(translation_benchmark.help_text())
        return
    print(translation_benchmark.measure_translation(translation_benchmark.load_benchmark(arguments)))


def digits(arguments: list[str]) -> None:
    """Train a small perceptron on handwritten digits: full, LoRA, ReLoRA* and SST."""
    print(measure_digits(arguments))


def tree(arguments: list[str]) -> None:
    """Embed a tree in hyperbolic space: Riemannian AdamW with whole and low-rank moments, and geoopt's."""
    print(measure_tree(arguments))


def communication(arguments: list[str]) -> None:
    """Predict the bytes each optimizer sends per step when a model is sharded."""
    print(step_benchmark.communication(arguments))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quality": measure_quality,
    "optimizer-step": measure_steps,
    "training-step": measure_training,
    "compression": measure_compression,
    "hyperbolic": measure_hyperbolic,
    "translation": measure_translation,
    "digits": digits,
    "tree": tree,
    "communication": communication,
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
        lambda: _find(command)(rest),
        stopped="stopped; 'quality', 'hyperbolic' and 'translation' go on from here when started again; the others "
        "start from the beginning",
    )


def help_text() -> str:
    """Every command and what it does."""
    lines = [f"  {name}: {command.__doc__}" for name, command in COMMANDS.items()]
    usage = "usage: launch/benchmark.py COMMAND [ARGUMENT ...]; COMMAND --help lists its arguments"
    table = "  --list: All optimizers on one matrix, as python -m lowrank_train.optim."
    return "\n".join([usage, "", "commands:", *lines, table])


def _find(command: str) -> Callable[[list[str]], None]:
    if command in COMMANDS:
        return COMMANDS[command]
    raise UserError(f"unknown command {command!r}; {suggestion(command, COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
