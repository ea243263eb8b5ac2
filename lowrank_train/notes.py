"""What a run says about its data and its model before the first step: everything that was cut, split or added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lowrank_train.config import Config

__all__ = ["data_notes", "model_notes"]


def data_notes(config: Config, found: Mapping[str, Any]) -> list[str]:
    """Sentences about the text of a run.

    Args:
        config: of the run.
        found: ``Data.description``.
    """
    notes = []
    if config.data.messages_key is not None:
        notes.append(
            f"chats: column {config.data.messages_key!r} goes through the chat template of data.tokenizer="
            f"{config.data.tokenizer}; only what the assistant says is learned"
        )
    if found.get("examples_cut"):
        notes.append(f"{found['examples_cut']} examples are longer than seq_len={config.seq_len} tokens and were cut")
    if found.get("examples_left_out"):
        notes.append(
            f"{found['examples_left_out']} examples have nothing to learn within seq_len={config.seq_len} tokens and "
            "were left out"
        )
    if found.get("documents_with_split_names"):
        notes.append(
            f"{found['documents_with_split_names']} documents hold names of special tokens, such as <|im_start|>, "
            "which were split as any other text; data.special_tokens=true reads them as these tokens"
        )
    if found.get("adds_bos"):
        notes.append("every document begins with the tokenizer's BOS token; data.add_bos=false leaves it out")
    return notes


def model_notes(config: Config, model: PretrainedConfig) -> list[str]:
    """Sentences about the model of a run, where it differs from the folder it was read from.

    Args:
        config: of the run.
        model: the configuration of the model that is trained.
    """
    try:
        folder = json.loads(Path(config.model.name, "config.json").read_text())
    except (OSError, ValueError):
        return []
    rows = folder.get("vocab_size", model.vocab_size)
    if rows == model.vocab_size:
        return []
    return [
        f"the tokenizer has {model.vocab_size - rows} added token(s) for which model.name={config.model.name} has no "
        f"row: embedding and head grow from {rows} to {model.vocab_size} rows, the new ones as the mean of the others"
    ]
