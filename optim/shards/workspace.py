"""What a step needs beyond parameters, gradients and state, in bytes: the terms in which all parts of it are counted.

Each part says what it needs beside its own code: a basis, a residual, the update of a method. ``optim.costs.workspace``
adds up.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowrank_train.optim.shards.blocks import largest_block
from lowrank_train.optim.shards.layout import StateTensor

__all__ = ["Kept", "MatrixShape", "Workspace"]

Kept = Mapping[Hashable, int]
"""Bytes by what they hold: matrices that share a tensor name it alike, and it counts once."""


@dataclass(frozen=True)
class Workspace:
    """Bytes that a step needs."""

    step: int = 0
    """At every step."""
    refresh: int = 0
    """At a step that chooses basis vectors, or at what follows the updates of a step: the larger of the two."""
    kept: Kept = field(default_factory=dict)
    """Between steps, outside of the state."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class MatrixShape:
    """One matrix as a step of this rank sees it: tall (m, d) with m >= d, or as stored where each number is by itself.

    Bytes are those of the arithmetic, which is in float32 or wider.
    """

    name: str
    m: int
    d: int
    rows: int
    """The rows of this rank, of all m."""
    dtype: torch.dtype
    """Type of the weight."""
    group: Mapping[str, Any]
    state: Mapping[str, StateTensor]
    is_turned: bool = False
    """Whether it is sharded along d, so that it is resharded before and after the update."""
    on_cpu: bool = False
    """Whether it is updated on a CPU, where blocks are smaller."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    @property
    def is_narrow(self) -> bool:
        """Whether weight and gradient are in fewer bytes than the arithmetic, and so are converted."""
        return self.dtype.itemsize < self.itemsize

    @property
    def block(self) -> int:
        """Bytes of the largest block of rows (``optim.shards.blocks``)."""
        return self.itemsize * largest_block(self.rows, self.d, on_cpu=self.on_cpu)

    @property
    def whole(self) -> int:
        """Bytes of all rows of this rank."""
        return self.itemsize * self.rows * self.d

    @property
    def is_rounded(self) -> bool:
        """Whether it is rounded stochastically, so that a copy in the arithmetic's type stands for it."""
        return bool(self.group.get("stochastic_rounding")) and self.dtype == torch.bfloat16

    @property
    def converted(self) -> int:
        """Bytes of a block of the weight in the arithmetic's type, to add an update to (``optim.shards.blocks``)."""
        return self.block if self.is_narrow and not self.is_rounded else 0

    @property
    def negated(self) -> int:
        """Bytes of the copy of the gradient that a group with ``maximize`` descends along."""
        return self.dtype.itemsize * self.rows * self.d * bool(self.group.get("maximize"))
