"""Numbers that are not finite (nan, inf), found in nested dicts of tensors with one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.shards.layout import local
from lowrank_train.optim.storage.int8_weight import Int8Weight

__all__ = ["name_not_finite"]


@torch.no_grad()
def name_not_finite(tensors: Mapping[str, Any]) -> str | None:
    """Return the dotted name of the first tensor that holds nan or inf on this rank; None if all are finite.

    A sum of each tensor shows it: nan and inf survive every sum. A finite tensor whose sum overflows is looked at
    again, number by number. Waits for a device once per kind of tensor.

    Args:
        tensors: perhaps sharded, perhaps nested; whatever else is in it is left out.
    """
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    order: list[str] = []
    for name, value in _floating(tensors, ""):
        order.append(name)
        kinds.setdefault((value.device, value.dtype), {})[name] = value
    bad: set[str] = set()
    for alike in kinds.values():
        sums = torch.stack([value.sum() for value in alike.values()]).tolist()
        suspects = [name for name, total in zip(alike, sums, strict=True) if not math.isfinite(total)]
        bad.update(name for name in suspects if not alike[name].isfinite().all())
    return next((name for name in order if name in bad), None)


def _floating(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _floating(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            part = local(value)
            part = part.scale if isinstance(part, Int8Weight) else part
            if part.is_floating_point() and part.numel() and not part.is_meta:
                yield prefix + name, part.detach()
