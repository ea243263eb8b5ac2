"""Documents that share a row: each attends to itself only, and its positions start at 0.

The loss of a document in a row then equals its loss alone. A mask of T x T numbers per sequence takes the place of the
causal flag of torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["block_mask", "document_inputs"]


def document_inputs(model: PreTrainedModel, positions: Tensor | None) -> dict[str, Any]:
    """Return what a model is given beside its token ids.

    Args:
        model: its embeddings have the dtype of the arithmetic.
        positions: (batch, length), 0 where a document starts; None: a row is one document.
    """
    if positions is None:
        return {}
    mask = block_mask(positions, model.get_input_embeddings().weight.dtype)
    return {"position_ids": positions, "attention_mask": mask}


def block_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (batch, 1, length, length): 0 where a token is seen, -inf elsewhere.

    The mask is additive, because torch would otherwise convert a mask of booleans once more in every layer.

    Args:
        positions: (batch, length), 0 where a document starts.
        dtype: of the arithmetic.
    """
    document = (positions == 0).cumsum(1)
    hidden = document[:, None, :, None] != document[:, None, None, :]
    length = positions.shape[1]
    hidden |= torch.ones(length, length, dtype=torch.bool, device=positions.device).triu_(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
