"""What an exported Hugging Face folder takes over from the folder that the model came from.

The dtype of the weights, ``generation_config.json`` (several end-of-text tokens, sampling settings), the chat template
and the files of the tokenizer: a trained model is used with the same settings as the model it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError
from lowrank_train.files.json_files import mapping_or_empty

__all__ = [
    "cast_state",
    "complete_folder",
    "export_dtype",
    "keep_generation_config",
    "save_tokenizer",
    "source_dtype",
    "source_folder",
    "take_tokenizer_files",
]

_GENERATION = "generation_config.json"

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)

_TEMPLATES = "additional_chat_templates"

_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def source_folder(model: str) -> Path | None:
    """Return the folder that a model came from by its ``model.name``; None for one that is trained from scratch."""
    return Path(model) if Path(model, "config.json").is_file() else None


def export_dtype(model: str, dtype: str) -> torch.dtype | None:
    """Return the dtype in which a run writes its model; None: that of the weights as they are trained.

    Args:
        model: ``model.name``.
        dtype: ``export.dtype``.
    """
    if dtype != "source":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    source = source_folder(model)
    return None if source is None else source_dtype(source)


def source_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype in which a folder keeps its model: its configuration's word, else that of its first tensor."""
    config = mapping_or_empty(folder / "config.json")
    if not config:
        return None
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        name = next((found for file in sorted(folder.glob("*.safetensors")) if (found := _first_dtype(file))), None)
    return getattr(torch, str(name)) if name in _OF_SAFETENSORS.values() else None


def cast_state(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state dict in another dtype, one copy of tensors that are shared.

    Raises:
        UserError: a number is too large for the dtype.
    """
    if dtype is None:
        return dict(state)
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape)
        if key in made or not value.is_floating_point():
            continue
        made[key] = value.to(dtype)
        if made[key].isinf().any() and not value.isinf().any():
            raise UserError(
                f"{name!r} has a number of size {value.abs().max():.3g}, too large for export.dtype={dtype}; set "
                "export.dtype=float32 and resume"
            )
    return {name: made.get((value.data_ptr(), value.shape), value) for name, value in state.items()}


def keep_generation_config(model: PreTrainedModel, source: Path | None) -> None:
    """Let a model be written although its settings of generation are invalid, if the source's file takes their place.

    transformers reads such settings (a temperature without sampling) from a folder, and refuses to write them.
    """
    if source is not None and (source / _GENERATION).is_file():
        model.generation_config = GenerationConfig()


def complete_folder(folder: Path, dtype: torch.dtype | None, source: Path | None) -> None:
    """Complete a folder that transformers wrote: the dtype of its tensors, and the source's settings of generation."""
    if dtype is not None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if source is not None and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer; a file that the folder it was read from has takes the place of the one that is written."""
    tokenizer.save_pretrained(folder)
    take_tokenizer_files(Path(tokenizer.name_or_path), folder)


def take_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer from a folder, if it is one."""
    if not source.is_dir():
        return
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)


def _first_dtype(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as tensors:
            found = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118  no mapping
            return next((_OF_SAFETENSORS[kind] for kind in found if kind in _OF_SAFETENSORS), None)
    except Exception:  # a damaged file is noticed by the reader of the weights
        return None
