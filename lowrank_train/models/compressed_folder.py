"""Compressed models on disk: a Hugging Face folder whose configuration has the ranks, in ``low_rank.ranks``.

The weights lie in a file of another name than transformers looks for: it would take a compressed folder for an
incomplete one and draw the missing matrices at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.data.export_files import cast_state, complete_folder, keep_generation_config
from lowrank_train.files.finite import name_not_finite
from lowrank_train.layers.low_rank import shape_low_rank
from lowrank_train.models.values import read_config

__all__ = ["compressed_ranks", "is_compressed", "read_compressed", "save_model", "shaped"]

_WEIGHTS = "low_rank.safetensors"
_ONE_FILE = "1000TB"


def compressed_ranks(config: PreTrainedConfig) -> dict[str, int]:
    """Return module name -> rank of what is stored as factors; empty for a plain model."""
    record = getattr(config, "low_rank", None)
    return dict(record["ranks"]) if record else {}


def is_compressed(folder: Path | str) -> bool:
    """Return whether a folder holds a compressed model."""
    return Path(folder, _WEIGHTS).is_file()


def shaped(model: PreTrainedModel) -> PreTrainedModel:
    """Put (empty) low-rank layers where the configuration of a model says so, in place.

    Raises UserError for misfits.
    """
    try:
        shape_low_rank(model, compressed_ranks(model.config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"low_rank.ranks in the model's config.json do not fit it: {error}") from None
    return model


def read_compressed(folder: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Read the model of a compressed folder, on the CPU, in evaluation mode.

    Args:
        folder: with config.json and weights.
        dtype: None for the one it was saved in.

    Raises:
        UserError: it cannot be read, or the weights do not fit the configuration.
    """
    config = read_config(folder, str(folder))
    try:
        state = load_file(Path(folder, _WEIGHTS))
        stored = dtype or config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=stored)
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = first_line(error)
        raise UserError(f"cannot load the model in {folder}: {reason}") from None
    shaped(model)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for module in model.modules():
            if module._buffers and not module._parameters:  # computed from the configuration, not stored
                model._init_weights(module)
    everywhere = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    expected = {name: everywhere[name] for name in model.state_dict()}
    filled = {everywhere[name] for name in state if name in everywhere}
    for name in sorted(expected.keys() | state.keys()):
        got = tuple(state[name].shape) if name in state else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        tied = name not in state and expected[name] in filled
        if got != wanted and not tied:
            raise UserError(f"{folder} has {got} for {name!r}; expected {wanted}: its weights and ranks do not fit")
    with torch.no_grad():
        for name, value in state.items():
            expected[name].copy_(value)
    return model.eval()


def save_model(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a (plain or compressed) model as a folder that ``load_model`` reads.

    Args:
        model: its configuration says which it is.
        folder: made if absent.
        state: its whole state dict; None for the model's own.
        source: folder whose ``generation_config.json`` is taken over, if it has one.
        dtype: of the tensors that are written; None: as they are.

    Raises:
        UserError: a number is not finite, or too large for ``dtype``; nothing is written.
        Exception: whatever the writers raise.
    """
    bad = name_not_finite(model.state_dict() if state is None else state)
    if bad is not None:
        raise UserError(f"{bad!r} holds a number that is not finite; no model is written to {folder}")
    arguments: dict[str, Any] = {}
    if state is not None or dtype is not None:
        arguments["state_dict"] = cast_state(model.state_dict() if state is None else state, dtype)
    disable_progress_bar()  # of the library's own writer: one file is written
    keep_generation_config(model, source)
    if compressed_ranks(model.config):
        model.save_pretrained(folder, max_shard_size=_ONE_FILE, **arguments)
        (folder / "model.safetensors").rename(folder / _WEIGHTS)
    else:
        model.save_pretrained(folder, **arguments)
    complete_folder(folder, dtype, source)
