"""The commands: each imports what it needs when it is called, so that one works without the packages of the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lowrank_train.common.command import Command, Work, command
from lowrank_train.common.errors import UserError

__all__ = ["COMMANDS", "benchmark", "compress", "finetune", "hyperbolic", "memory_budget", "pretrain", "spectrum"]


@command("train")
def pretrain(words: list[str]) -> Work:
    """Pretrain a model; the same command resumes it."""
    from lowrank_train.config.run_config import help_text, load_config
    from lowrank_train.train.loop import train

    return Work(help_text, lambda: train(load_config(words)))


@command("train,peft")
def finetune(words: list[str]) -> Work:
    """Fine-tune a model, as a whole or with an adapter of peft."""
    from lowrank_train.train.finetune import finetuning_help, load_finetuning
    from lowrank_train.train.loop import train

    return Work(finetuning_help, lambda: train(load_finetuning(words)))


@command("train")
def compress(words: list[str]) -> Work:
    """Compress a model to low-rank factors."""
    from lowrank_train.compress.command import compress_folder, help_text, load_settings

    def do() -> None:
        table = compress_folder(*load_settings(words))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(table)

    return Work(help_text, do)


@command("train")
def spectrum(words: list[str]) -> Work:
    """Measure the singular values of a model's matrices."""
    from lowrank_train.spectra.command import help_text, load_settings, measure

    def do() -> None:
        folders, settings = load_settings(words)
        print(measure(folders, settings))
        print(f"\nplots, CSV and JSON: {settings.out}", file=sys.stderr)

    return Work(help_text, do)


@command("train")
def memory_budget(words: list[str]) -> Work:
    """List what fits a memory budget, by formulas."""
    from lowrank_train.memory.budget import measured_against, solve
    from lowrank_train.memory.question import help_text, load_budget
    from lowrank_train.memory.report import check_budget, table, write_budget

    def do() -> None:
        config = load_budget(words)
        outcome = solve(config)
        write_budget(outcome, Path(config.out))
        measured = measured_against(config, outcome.fits[0]) if config.measure else ""
        print(table(outcome))
        if measured:
            print(f"\n{measured}")
        check_budget(outcome)

    return Work(help_text, do)


@command("train,hyperbolic")
def hyperbolic(words: list[str]) -> Work:
    """Train a graph network or a translator in hyperbolic space; ``data.task`` says which."""
    from lowrank_train.config.loading import flags_to_keys, given_value
    from lowrank_train.hyperbolic.graphs.config import GraphConfig
    from lowrank_train.hyperbolic.graphs.train import train_graph
    from lowrank_train.hyperbolic.recipes import load_recipe, recipe_help
    from lowrank_train.hyperbolic.translation.config import TranslationConfig
    from lowrank_train.hyperbolic.translation.train import train_translation

    given = [word for word in words if word not in ("-h", "--help")]
    task = given_value(flags_to_keys(given, GraphConfig), "data.task")
    tasks = ("link_prediction", "node_classification", "translation")
    if task not in (None, *tasks):
        raise UserError(f"wrong value for 'data.task': {task!r}; expected one of {', '.join(tasks)}")

    def do() -> None:
        if task == "translation":
            train_translation(load_recipe(TranslationConfig, flags_to_keys(words, TranslationConfig)))
        else:
            train_graph(load_recipe(GraphConfig, flags_to_keys(words, GraphConfig)))

    if task == "translation":
        return Work(lambda: recipe_help(TranslationConfig, "data.task=translation "), do)
    more = "\n\ndata.task=translation --help lists the keys of translation"
    return Work(lambda: recipe_help(GraphConfig, "") + more, do)


@command(
    "all",
    stopped="stopped; the same command goes on from here ('optimizer-step' and 'training-step' start again)",
)
def benchmark(words: list[str]) -> Work:
    """Compare methods: quality, time, memory, communication."""
    from lowrank_train.benchmarks import answer

    def do() -> None:
        text = answer(words)
        if text:
            print(text)

    return Work(lambda: answer(words), do)


COMMANDS: dict[str, Command] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "compress": compress,
    "spectrum": spectrum,
    "memory-budget": memory_budget,
    "hyperbolic": hyperbolic,
    "benchmark": benchmark,
}
"""Name on the command line -> command."""
