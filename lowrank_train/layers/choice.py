"""Which linear layers of a model are meant by a regular expression, and whether they can be replaced."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_train.models.families import block_matrices
from lowrank_train.optim.shards.layout import is_sharded

__all__ = [
    "freeze_vocabulary",
    "linear_layers",
    "replace_module",
    "replaceable_layers",
    "trained_layers",
]


def linear_layers(model: nn.Module, layers: str | None = None) -> dict[str, nn.Linear]:
    """Return the ``nn.Linear`` modules whose name matches.

    Args:
        model: any module.
        layers: regular expression (``re.search``) on module names; ``""`` for all; None: attention and feed-forward
            matrices of the model's family, or of any family if it has none.

    Raises:
        ValueError: the expression cannot be read, or matches none.
    """
    layers = _block_matrices(model) if layers is None else layers
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    try:
        found = {name: linear for name, linear in linears.items() if re.search(layers, name)}
    except (re.error, TypeError) as error:
        raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from None
    if not found:
        names = ", ".join(repr(name) for name in list(linears)[:3]) or "none at all"
        raise ValueError(f"layers={layers!r} matches no nn.Linear of the model; it has {names}")
    return found


def replaceable_layers(model: nn.Module, layers: str | None = None) -> dict[str, nn.Linear]:
    """Return the layers of ``linear_layers``, each of which can be replaced by a layer of another kind.

    Raises:
        ValueError: also if the model is sharded or in DistributedDataParallel, or a matched weight is tied to another
            module or takes no gradient.
    """
    if is_sharded(model):
        raise ValueError("the model is sharded already; convert the model before fully_shard")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("the model is in DistributedDataParallel, which knows its parameters; convert it before")
    found = linear_layers(model, layers)
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None:
                owners.setdefault(param, []).append(f"{name}.{key}")
    for name, linear in found.items():
        others = [owner for owner in owners[linear.weight] if owner != f"{name}.weight"]
        if others:
            raise ValueError(f"the weight of {name!r} is tied to {others[0]!r}; leave it out with layers=...")
        if not linear.weight.requires_grad:
            raise ValueError(f"the weight of {name!r} takes no gradient; leave it out with layers=...")
    return found


def trained_layers(model: nn.Module, layers: str | None) -> str:
    """Return a regular expression for ``replaceable_layers``: the given one, or that of the trained block matrices."""
    if layers is not None:
        return layers
    linears = [name for name, linear in linear_layers(model).items() if linear.weight.requires_grad]
    return "^(" + "|".join(map(re.escape, linears)) + ")$" if linears else _block_matrices(model)


def _block_matrices(model: nn.Module) -> str:
    return block_matrices(getattr(getattr(model, "config", None), "model_type", None))


def freeze_vocabulary(model: nn.Module) -> nn.Module:
    """Take the gradient from embeddings and output head, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.requires_grad_(False)  # whole: it may be two factors
    return model


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put another module wherever a module is, perhaps under several names; returns the model, which may be that module
    itself.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would give a module used twice only once
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model
