"""The configuration of a run as it is given: YAML files merged left to right, then ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.chat_columns import find_messages_key
from lowrank_train.config.data import check_data
from lowrank_train.config.loading import load_schema
from lowrank_train.config.schema import Config
from lowrank_train.config.settings import key_help, settle

__all__ = ["complete", "help_text", "load_config"]


def load_config(arguments: Sequence[str]) -> Config:
    """Build a configuration from YAML files and ``key=value`` overrides.

    Args:
        arguments: files (``*.yaml``) and overrides, in any order; files are merged left to right, then overrides.

    Raises:
        UserError: unreadable file, unknown key (with the closest match), value of the wrong type or out of range.
    """
    return complete(load_schema(Config, arguments))


def complete(config: Config) -> Config:
    """Fill in what follows from other values, and check all. Raises UserError for a value out of range."""
    if config.run_dir is None:
        config.run_dir = f"runs/{Path(config.model.name).name}-{config.optimizer.get('name')}"
    if config.data.tokenizer is None and Path(config.model.name, "config.json").is_file():
        config.data.tokenizer = config.model.name  # a model to continue from knows only its own tokens
    config.data.messages_key = config.data.messages_key or find_messages_key(config.data, config.run_dir)
    _check(config)
    return config


def help_text(program: str = "launch/pretrain.py") -> str:
    """Return every key with its default and meaning."""
    lines = [f"usage: {program} [FILE.yaml ...] [key=value ...]", "", "optimizers:"]
    lines += [f"  {methods.describe(name)}" for name in methods.names()]
    return "\n".join([*lines, "", *key_help(Config)])


def _check(config: Config) -> None:
    settle(config)
    if config.weights != "full" and config.precision != "bfloat16":
        raise UserError(
            f"weights={config.weights} with precision={config.precision}: nothing would be computed more exactly than "
            "it is kept; set precision=bfloat16, or weights=full"
        )
    if config.model.checkpointed_layers is not None and config.model.checkpointing == "none":
        raise UserError(
            f"model.checkpointed_layers={config.model.checkpointed_layers} with model.checkpointing=none; set that to "
            "full or selective"
        )
    check_data(config.data, config.seq_len, config.evaluation.tokens)
    if config.adapter.name is None and (config.adapter.rank is not None or config.adapter.arguments):
        raise UserError("adapter.rank or adapter.arguments without adapter.name; give that, e.g. adapter.name=lora")
    methods.check(config.optimizer, ("other_lr",), ("other_state_dtype",))
