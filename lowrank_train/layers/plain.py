"""Back to plain layers: what stands for a matrix becomes ``nn.Linear`` again, in a model or in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.layers import low_rank, spectral
from lowrank_train.layers.choice import replace_module
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.optim.shards.layout import is_sharded

__all__ = ["merge", "merged_state_dict"]


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Replace every spectral and low-rank layer by a plain ``nn.Linear`` with the same outputs, in place.

    Returns:
        The model itself; the plain layer, where the model was one layer.

    Raises:
        ValueError: there is no such layer, or the model is sharded.
    """
    found = [module for module in model.modules() if isinstance(module, SpectralLinear | LowRankLinear)]
    if not found:
        raise ValueError("the model has no spectral or low-rank layer to merge; it is plain already")
    if is_sharded(model):
        raise ValueError(
            "the model is sharded; gather its state first (get_model_state_dict with full_state_dict=True) and pass "
            "that to merged_state_dict"
        )
    for layer in found:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight)
        if layer.bias is not None:
            linear.bias = layer.bias
        linear.train(layer.training)
        model = replace_module(model, layer, linear)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "low_rank"):
        del config.low_rank
    return model


@torch.no_grad()
def merged_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole (unsharded) state dict of a model with such layers as that of the plain model."""
    return low_rank.plain_state(spectral.plain_state(state))
