"""What frameworks put around a model, an optimizer or a parameter's name, and how this package sees through it.

DistributedDataParallel, torch.compile, activation checkpointing and Lightning keep the parameters they are given: only
names get longer. FSDP1 and DeepSpeed replace them by flat buffers, in which a matrix is no longer a matrix.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["WRAPPERS", "bare_model", "bare_optimizer", "is_replicated", "plain_name"]

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What torch.compile and activation checkpointing insert into a name."""

_HOLDERS = frozenset({"DistributedDataParallel", "DataParallel", "OptimizedModule"})

_FLATTENING = {
    "FullyShardedDataParallel": "FSDP1 flattens them: shard with fully_shard (FSDP2; Accelerate: fsdp_version=2)",
    "DeepSpeedEngine": "DeepSpeed partitions them into flat buffers: train with FSDP2 (fully_shard) or "
    "DistributedDataParallel",
}
"""Known by name: neither need be installed."""


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model without what wraps all of it and keeps its parameters (DistributedDataParallel, torch.compile).

    Raises ValueError if FSDP1 or DeepSpeed holds it, or a part of it.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _FLATTENING:
                raise ValueError(
                    f"the model is in a {cls.__name__}, whose parameters are not the model's matrices; "
                    f"{_FLATTENING[cls.__name__]}"
                )
    while type(model).__name__ in _HOLDERS:
        model = model._orig_mod if type(model).__name__ == "OptimizedModule" else model.module  # type: ignore[assignment]
    return model


def is_replicated(model: nn.Module) -> bool:
    """Return whether DistributedDataParallel holds parameters of a model, also where it was put around the model
    handed in.

    Nothing about a model says so, and Hugging Face's Trainer hands out the bare one: all living objects are looked
    through, some 0.1 s.
    """
    own = set(model.parameters())
    if not _has_wrapper_of(own):
        return False
    gc.collect()  # one that nobody uses any more is no objection
    return _has_wrapper_of(own)


def _has_wrapper_of(params: set[nn.Parameter]) -> bool:
    # by type: isinstance would ask proxies for their class, which may import what they stand for
    kinds = set(_with_subclasses(DistributedDataParallel))
    wrappers = [each for each in gc.get_objects() if type(each) in kinds]
    return any(not params.isdisjoint(wrapper.parameters()) for wrapper in wrappers)


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = cls.__subclasses__()
    for below in subclasses:
        yield from _with_subclasses(below)


def bare_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside the wrapper of Accelerate or Lightning, which have it as ``optimizer``."""
    # Lightning's wrapper is an instance of what it wraps, so the innermost is found by what it holds, not by its class
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def plain_name(name: str) -> str:
    """Return the name of a parameter without what torch.compile and activation checkpointing insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
