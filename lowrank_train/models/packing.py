"""Attention that sees less than all tokens before: documents that share a row, and sliding windows.

Documents of a row each attend to themselves only, and their positions start at 0: the loss of a document in a row then
equals its loss alone. In a layer with a window of w, a token sees itself and the w - 1 tokens before it. A mask of
T x T numbers per sequence takes the place of the causal flag of torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["attention_inputs", "attention_windows", "block_mask"]


def attention_windows(config: PretrainedConfig, length: int) -> dict[str, int | None]:
    """Return the windows of a model, by kind of layer, that are shorter than a sequence; None: all is seen.

    Args:
        config: of the model; ``layer_types`` names kinds of layers where there may be several.
        length: T, tokens of a sequence.
    """
    window = getattr(config, "sliding_window", None)
    window = None if window is None or window >= length else int(window)
    kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]))
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def attention_inputs(model: PreTrainedModel, input_ids: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """Return what a model is given beside its token ids.

    Args:
        model: its embeddings have the dtype of the arithmetic.
        input_ids: (batch, length).
        positions: (batch, length), 0 where a document starts; None: a row is one document.
    """
    windows = attention_windows(model.config, input_ids.shape[1])
    if positions is None and not any(windows.values()):
        return {}
    places = torch.arange(input_ids.shape[1], device=input_ids.device)[None] if positions is None else positions
    dtype = model.get_input_embeddings().weight.dtype
    masks = {kind: block_mask(places, dtype, window) for kind, window in windows.items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask, **({} if positions is None else {"position_ids": positions})}


def block_mask(positions: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return (batch, 1, length, length): 0 where a token is seen, -inf elsewhere.

    The mask is additive, because torch would otherwise convert a mask of booleans once more in every layer.

    Args:
        positions: (batch, length), 0 where a document starts.
        dtype: of the arithmetic.
        window: tokens that a token sees, itself among them; None: all before it.
    """
    document = (positions == 0).cumsum(1)
    hidden = document[:, None, :, None] != document[:, None, None, :]
    length = positions.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril_()
    hidden |= ~(seen if window is None else seen.triu_(1 - window))
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
