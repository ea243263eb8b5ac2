"""Cross-entropy of a causal language model without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank_train.models.packing import attention_inputs
from lowrank_train.text.labels import IGNORED

__all__ = ["chunked_cross_entropy", "token_loss"]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; both gradients are made chunk by chunk in forward, so backward only scales them.

    Peak: chunk x vocabulary logits (twice, in float32 or wider) and one gradient like the head's weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """Hidden (n, h), weight (v, h), labels (n,) -> () in float32 or wider."""
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.mT).to(exact)
            target = labels[part]
            total += functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
            if not (needs_hidden or needs_weight):
                continue
            counted = target != IGNORED
            grad = torch.softmax(logits, dim=-1)  # d loss / d logits = softmax - one-hot
            grad[torch.arange(len(target), device=target.device), target.where(counted, 0)] -= 1
            grad = (grad * counted.unsqueeze(-1)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.mT @ hidden[part]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        """Scale what forward made."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_total.to(grad_weight.dtype),
            None,
            None,
        )


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum over positions of -log softmax(hidden weight^T)[label]; positions labelled ``IGNORED`` do not count.

    Args:
        hidden: (..., h), the last hidden states.
        weight: (v, h), the output head.
        labels: (...), token ids.
        chunk: positions whose logits exist at one time.

    Returns:
        (), in float32 or wider. Equal to ``cross_entropy`` of all logits up to the order of summation.
    """
    return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), chunk)


def token_loss(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, chunk: int, positions: Tensor | None = None
) -> Tensor:
    """Return the summed cross-entropy of a Hugging Face causal model. Labels are given per position, already shifted.

    Args:
        model: with an output head.
        input_ids: (batch, length).
        labels: (batch, length), the token that follows each position, or ``IGNORED``.
        chunk: positions whose logits exist at one time.
        positions: (batch, length), 0 where a document starts, which then attends to itself only; None: a row is one
            document.
    """
    inputs = attention_inputs(model, input_ids, positions)
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    return chunked_cross_entropy(hidden, model.get_output_embeddings().weight, labels, chunk)
