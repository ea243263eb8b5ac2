"""Memory-efficient training: optimizers in ``lowrank_train.optim``, and a trainer around them.

    from lowrank_train import optim, to_spectral, merge

Importing this package needs torch alone; a function below imports its own module when it is first asked for.

How to read it. The training loop: ``train/loop.py``, then ``train/run.py``, then ``plan.py``. Why a run is predicted to
need 22 GiB: ``memory/step.py``, whose docstring is the formula, then ``memory/activations.py`` and ``optim/costs/``.
How to add something: ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_train.layers.lora import add_adapters
    from lowrank_train.layers.low_rank import to_low_rank, train_low_rank_only
    from lowrank_train.layers.plain import merge, merged_state_dict
    from lowrank_train.layers.spectral import to_spectral

__all__ = [
    "add_adapters",
    "merge",
    "merged_state_dict",
    "to_low_rank",
    "to_spectral",
    "train_low_rank_only",
]

_HOMES = {
    "add_adapters": "layers.lora",
    "merge": "layers.plain",
    "merged_state_dict": "layers.plain",
    "to_low_rank": "layers.low_rank",
    "to_spectral": "layers.spectral",
    "train_low_rank_only": "layers.low_rank",
}
"""Public function -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowrank_train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowrank_train.{_HOMES[name]}"), name)
