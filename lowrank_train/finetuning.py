"""Fine-tuning: the same run as pretraining, from the weights of a folder."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_train.config import Config, complete, load_schema
from lowrank_train.errors import UserError
from lowrank_train.model_folder import model_folder
from lowrank_train.models import SIZES

__all__ = ["load_finetuning"]


def load_finetuning(arguments: Sequence[str]) -> Config:
    """The configuration of a run that starts from a trained model.

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
        config.run_dir = f"runs/{name}-{config.optimizer.get('name')}-finetuned"
    config.model.name = str(model_folder(config.model.name, "model.name="))
    return complete(config)
