"""Trained models on disk: Hugging Face folders, and the one in a run folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.config.settings import path_of
from lowrank_train.files.pretrained import read_pretrained
from lowrank_train.models.compressed_folder import is_compressed, read_compressed
from lowrank_train.models.values import check_weights_used, read_config

__all__ = ["is_export_of_run", "load_model", "model_folder", "model_label"]


def model_folder(word: str, key: str = "") -> Path:
    """Return the Hugging Face folder a word stands for: the word itself, or the folder of a run.

    Args:
        word: as typed.
        key: put before it in messages, e.g. ``before=``.

    Raises:
        UserError: there is no such folder, or no model in it.
    """
    folder = Path(path_of(key.rstrip("=") or "model", word))
    if (folder / "config.json").is_file():
        return folder
    if (folder / "huggingface" / "config.json").is_file():
        return folder / "huggingface"
    if not folder.is_dir():
        raise UserError(f"{key}{word} is not a folder; expected a local Hugging Face folder or a run folder")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{key}{word} is a run without huggingface/, which its end writes; let it finish")
    raise UserError(f"{key}{word} has no config.json; expected a Hugging Face folder or the folder of a finished run")


def is_export_of_run(folder: Path) -> bool:
    """Return whether a folder is the ``huggingface`` of a run folder."""
    return folder.resolve().name == "huggingface" and (folder.resolve().parent / "config.yaml").is_file()


def model_label(folder: Path) -> str:
    """Return what to call the model of a folder: the name of the run, or of the folder."""
    return folder.resolve().parent.name if is_export_of_run(folder) else folder.resolve().name


def load_model(folder: Path) -> PreTrainedModel:
    """Load a causal language model of a Hugging Face folder, compressed or not, in float32 or wider, on the CPU.

    Raises:
        UserError: it cannot be read, or lacks weights (transformers would draw random ones).
    """
    if is_compressed(folder):
        compressed = read_compressed(folder)
        return compressed if compressed.dtype == torch.float64 else compressed.float()
    read_config(folder, str(folder))  # before anything of its size is built
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, found = read_pretrained(AutoModelForCausalLM, folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = first_line(error)
        raise UserError(f"cannot load the model in {folder}: {reason}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weight(s) of its model, {missing[0]!r} for one; fetch it anew")
    check_weights_used(found["unexpected_keys"], folder)
    loaded: PreTrainedModel = model if model.dtype == torch.float64 else model.float()
    return loaded.eval()
