"""Fine-tuning: the same run as pretraining, from the weights of a folder."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_train.common.errors import UserError
from lowrank_train.config.loading import load_schema
from lowrank_train.config.run_config import complete, help_text
from lowrank_train.config.schema import Config
from lowrank_train.models.build import SIZES
from lowrank_train.models.folders import model_folder
from lowrank_train.peft.names import describe_adapters

__all__ = ["finetuning_help", "load_finetuning"]


def finetuning_help() -> str:
    """Return adapters, optimizers, and every key."""
    adapters = [f"  {line}" for line in describe_adapters()]
    usage, _, rest = help_text("launch/finetune.py").partition("\n")
    return "\n".join([usage, "", "adapters of peft (adapter.name) and their adapter.arguments:", *adapters, rest])


def load_finetuning(arguments: Sequence[str]) -> Config:
    """Load the configuration of a run that starts from a trained model.

    Args:
        arguments: YAML files and ``key=value``; ``model=`` (or ``model.name=``) is a folder: plain, compressed, or of a
            finished run.

    Raises:
        UserError: also for a model that is the name of a size.
    """
    config = load_schema(Config, arguments)
    if config.model.name in SIZES:
        raise UserError(
            f"model.name={config.model.name} is a size to pretrain; fine-tuning starts from a trained model: give "
            "model=FOLDER"
        )
    if config.run_dir is None:
        name = config.model.name.rstrip("/").rpartition("/")[2]
        adapter = "" if config.adapter.name is None else f"-{config.adapter.name}"
        config.run_dir = f"runs/{name}{adapter}-{config.optimizer.get('name')}-finetuned"
    config.model.name = str(model_folder(config.model.name, "model.name="))
    return complete(config)
