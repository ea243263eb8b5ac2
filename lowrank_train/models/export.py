"""The plain Hugging Face folder of a trained model, written from its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.data.export_files import save_tokenizer
from lowrank_train.files.checkpoint_folder import (
    last_good,
)
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.models.compressed_folder import save_model
from lowrank_train.optim.shards.layout import laid_out_as, local
from lowrank_train.optim.storage.int8_weight import Int8Weight

__all__ = ["export_huggingface", "whole_state"]


def export_huggingface(
    model: PreTrainedModel,
    layers: Parametrization,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    ranks: Ranks,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the whole, plain model and its tokenizer as a Hugging Face folder.

    Args:
        model: sharded.
        layers: what was converted of the plain model.
        tokenizer: written beside the model.
        folder: made if absent.
        ranks: of the run; all must call.
        source: folder the model came from, whose settings of generation are taken over.
        dtype: of what is written; None: as it was trained.

    Raises:
        UserError: the folder cannot be written, or a number is too large for ``dtype``.
    """
    whole = whole_state(model)

    def write() -> None:
        try:
            save_model(model, folder, layers.plain_state_dict(whole), source=source, dtype=dtype)
            save_tokenizer(tokenizer, folder)
        except UserError as error:
            raise UserError(f"{error}; {last_good(folder.parent / 'checkpoints')}") from None
        except Exception as error:  # the writers in Rust raise errors of their own
            raise UserError(f"cannot write the Hugging Face folder {folder}: {error}; free space and resume") from None

    ranks.first(write)


def whole_state(model: PreTrainedModel) -> dict[str, Any]:
    """Return the state of all ranks, on the CPU of the first. Matrices kept in int8 are the bfloat16 they stand for."""
    shards: dict[str, Any] = get_model_state_dict(model)
    if not any(isinstance(local(value), Int8Weight) for value in shards.values()):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = {}
    for name, value in shards.items():
        part = local(value)
        wide = laid_out_as(value, part.wide(torch.bfloat16)) if isinstance(part, Int8Weight) else value
        whole[name] = (wide.full_tensor() if isinstance(wide, DTensor) else wide).cpu()
    return whole
