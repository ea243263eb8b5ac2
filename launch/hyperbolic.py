"""Train graph networks and translators in hyperbolic space: ``python launch/hyperbolic.py FILE.yaml [key=value ...]``

``data.task`` (of the file, or given) says which.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

try:
    from lowrank_train.common.command import run_command
    from lowrank_train.common.errors import UserError
    from lowrank_train.common.signals import resume_command
    from lowrank_train.config.loading import flags_to_keys, given_value
    from lowrank_train.hyperbolic.graphs.config import GraphConfig, graph_help_text, load_graph_config
    from lowrank_train.hyperbolic.graphs.train import train_graph
    from lowrank_train.hyperbolic.translation.config import (
        TranslationConfig,
        load_translation_config,
        translation_help_text,
    )
    from lowrank_train.hyperbolic.translation.train import train_translation
except ModuleNotFoundError as error:
    if error.name not in ("lowrank_train", "optim"):
        raise
    sys.exit("lowrank-train is not installed in this Python: run 'pip install -e .' in its folder")


class Training(NamedTuple):
    """A kind of run."""

    schema: type[Any]
    load: Callable[[list[str]], Any]
    help_text: Callable[[], str]
    train: Callable[[Any], Any]


GRAPH = Training(GraphConfig, load_graph_config, graph_help_text, train_graph)

TRAININGS = {
    "link_prediction": GRAPH,
    "node_classification": GRAPH,
    "translation": Training(TranslationConfig, load_translation_config, translation_help_text, train_translation),
}
"""Value of ``data.task`` -> what is trained; without a task, a graph."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or stopped by a signal with a checkpoint, 2 for anything the user must fix."""
    return run_command(lambda: _train(arguments))


def _train(arguments: list[str]) -> None:
    training = _training(arguments)
    if {"-h", "--help"} & set(arguments):
        more = "" if training is not GRAPH else "\n\ndata.task=translation --help lists the keys of translation"
        print(training.help_text() + more)
        return
    record = training.train(training.load(flags_to_keys(arguments, training.schema)))
    if record.status != "finished":
        print(f"stopped at {record.stopped_at}; resume with: {resume_command()}", file=sys.stderr)


def _training(arguments: list[str]) -> Training:
    words = [word for word in arguments if word not in ("-h", "--help")]
    task = given_value(flags_to_keys(words, GraphConfig), "data.task")
    if task is None:
        return GRAPH
    if task not in TRAININGS:
        raise UserError(f"wrong value for 'data.task': {task!r}; expected one of {', '.join(TRAININGS)}")
    return TRAININGS[task]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
