"""Activation checkpointing: what the forward pass of a layer does not keep for backward, backward computes again.

    none        everything is kept
    selective   outputs of matrix products and of attention are kept; the rest, which costs little time, is computed
                again (the idea is that of Korthikanti et al., arXiv 2205.05198)
    full        only the layer's input is kept (Chen et al., arXiv 1604.06174): a second forward pass

Any number of the layers may be checkpointed, from the first on: their activations are those that wait longest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.spectral import SpectralLinear

__all__ = ["checkpoint_layers", "checkpointed_layers"]

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
}
"""Operators whose outputs selective checkpointing keeps."""


def checkpointed_layers(model: PreTrainedModel, config: ModelConfig) -> int:
    """Return how many of the decoder layers are checkpointed. Raises UserError for more than there are."""
    layers = len(model.get_decoder().layers)
    if config.checkpointing == "none":
        return 0
    if config.checkpointed_layers is None:
        return layers
    if not 0 <= config.checkpointed_layers <= layers:
        raise UserError(
            f"model.checkpointed_layers={config.checkpointed_layers}; {config.name} has {layers} decoder layers: use a "
            "number up to that, or null for all"
        )
    return config.checkpointed_layers


def checkpoint_layers(model: PreTrainedModel, config: ModelConfig) -> None:
    """Checkpoint decoder layers of a model, in place. Raises UserError for settings that do not fit it."""
    count = checkpointed_layers(model, config)
    selective = config.checkpointing == "selective"
    if selective and any(isinstance(module, SpectralLinear) for module in model.modules()):
        raise UserError(
            "model.checkpointing=selective keeps outputs of matrix products, and a spectral layer makes its weights by "
            "such: use full or none"
        )
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    for layer in model.get_decoder().layers[:count]:
        layer.forward = _recomputing(layer, contexts)


def _recomputing(layer: nn.Module, contexts: dict[str, Any]) -> Callable[..., Any]:
    # inside of FSDP2's hooks: in backward the layer's parameters are gathered already when it is computed again
    forward = layer.forward

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return recomputing_forward


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
