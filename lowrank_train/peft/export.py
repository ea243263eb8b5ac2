"""The way out of an adapted model: peft's own folder, and the plain Hugging Face folder where it can be merged."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.common.ranks import Ranks
from lowrank_train.data.export_files import save_tokenizer
from lowrank_train.files.finite import name_not_finite
from lowrank_train.models.compressed_folder import save_model
from lowrank_train.models.export import whole_state
from lowrank_train.peft.model import AdaptedModel, changes_frozen_weights

__all__ = ["export_adapter"]


def export_adapter(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_folder: Path,
    ranks: Ranks,
    *,
    source: Path,
    dtype: torch.dtype | None,
) -> str | None:
    """Write ``adapter`` and, merged, ``huggingface`` into the folder of a run.

    Where the initialisation changed the frozen weights (PiSSA, OLoRA, CorDA, LoRA-GA), ``adapter`` is peft's LoRA of
    twice the rank that stands for the difference from the original model, and so fits that.

    Args:
        adapted: its model sharded, trained.
        tokenizer: written beside the merged model.
        run_folder: of the run.
        ranks: of the run; all must call.
        source: folder the model came from, whose settings of generation are taken over.
        dtype: of the merged model; None: as it was trained.

    Returns:
        Why there is no merged folder; None if there is one.

    Raises:
        UserError: a folder cannot be written.
    """
    whole = whole_state(adapted.model)

    def write() -> str | None:
        bad = name_not_finite(whole)
        if bad is not None:
            raise UserError(f"{bad!r} holds a number that is not finite; no adapter is written to {run_folder}")
        trained = next(iter(adapted.model.parameters())).dtype
        wrapper = adapted.with_values(whole)
        wrapper.peft_config.update(adapted.wrapper.peft_config)  # AdaLoRA's ranks are known only after training
        wrapper.eval()
        try:
            with warnings.catch_warnings(action="ignore"):  # that the base is to be given along: it is converted
                _save_adapter(wrapper, run_folder)
                try:
                    merged = wrapper.merge_and_unload(safe_merge=True)
                except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
                    return first_line(error)
            save_model(merged.to(trained), run_folder / "huggingface", source=source, dtype=dtype)
            save_tokenizer(tokenizer, run_folder / "huggingface")
        except UserError:  # says itself what to do
            raise
        except Exception as error:  # the writers in Rust raise errors of their own
            raise UserError(f"cannot write the model to {run_folder}: {error!r}; free space and resume") from None
        return None

    with torch.no_grad():
        return ranks.first(write)


def _save_adapter(wrapper: object, run_folder: Path) -> None:
    config = wrapper.peft_config["default"]  # type: ignore[attr-defined]
    converted = {}
    if changes_frozen_weights(config):
        converted["path_initial_model_for_weight_conversion"] = str(run_folder / "adapter_initial")
    wrapper.save_pretrained(  # type: ignore[attr-defined]
        run_folder / "adapter", save_embedding_layers=False, **converted
    )
