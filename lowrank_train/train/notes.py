"""What a run says about its data and its model before the first step: everything that was cut, split or added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowrank_train.config.schema import Config
from lowrank_train.data.export_files import export_dtype, source_folder
from lowrank_train.files.json_files import mapping_or_empty

__all__ = ["data_notes", "model_notes"]


def data_notes(config: Config, found: Mapping[str, Any]) -> list[str]:
    """Return sentences about the text of a run.

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


def model_notes(config: Config, model: PreTrainedModel) -> list[str]:
    """Return sentences about the model of a run, where it differs from the folder it was read from.

    Args:
        config: of the run.
        model: that is trained.
    """
    folder = source_folder(config.model.name)
    if folder is None:
        return []
    notes = []
    dtype, trained = export_dtype(config.model.name, config.export.dtype), next(iter(model.parameters())).dtype
    if dtype is not None and dtype != trained:
        reason = f", as in {folder}" if config.export.dtype == "source" else ""
        short, long = (str(kind).removeprefix("torch.") for kind in (dtype, trained))
        notes.append(
            f"huggingface/ will be written in {short}{reason}; the weights are trained in {long}, which "
            f"export.dtype={long} keeps"
        )
    rows, needed = _rows(folder), model.config.vocab_size
    if rows is not None and rows != needed:
        notes.append(
            f"the tokenizer has {needed - rows} added token(s) for which model.name={folder} has no row: embedding and "
            f"head grow from {rows} to {needed} rows, the new ones as the mean of the others"
        )
    return notes


def _rows(folder: Path) -> int | None:
    rows = mapping_or_empty(folder / "config.json").get("vocab_size")
    return rows if isinstance(rows, int) else None
