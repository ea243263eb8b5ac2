"""One update of one matrix: decayed, added to, and rounded to the type it is stored in once.

A bfloat16 weight that is decayed in place and added to afterwards is rounded twice, and what a step adds in several
parts is rounded again with every part. So rows of such a weight are worked on in float32, a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.shards.blocks import widened
from lowrank_train.optim.shards.tall import accumulator, add_tall, tall_weight

__all__ = ["WeightUpdate", "decay_of"]


def decay_of(group: Mapping[str, Any]) -> float | Tensor | None:
    """Return the factor of decoupled weight decay in one step; None where there is none."""
    return 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None


class WeightUpdate:
    """An update that is added block by block to the tall (m_local, d) form of a parameter, or of a tensor like it.

    ``finish`` must follow the last block, and is a collective where ``sharding.tall`` is.
    """

    def __init__(self, param: Tensor, dtype: torch.dtype, decay: float | Tensor | None = None) -> None:
        self._param, self._dtype, self._decay = param, dtype, decay
        self._weight = tall_weight(param)
        self._sum = accumulator(param, dtype) if self._weight is None else None

    @property
    def shape(self) -> torch.Size:
        """(m_local, d)."""
        target = self._weight if self._sum is None else self._sum
        assert target is not None
        return target.shape

    @contextmanager
    def rows(self, rows: slice) -> Iterator[Tensor]:
        """Yield a block (b, d) in the type of the arithmetic, to add to; every block is to be entered once."""
        if self._weight is None:
            assert self._sum is not None
            yield self._sum[rows]
            return
        with widened(self._weight[rows], self._dtype, self._decay) as block:
            yield block

    def finish(self) -> None:
        """Bring what was added into the weight, if it is not there yet."""
        if self._sum is not None:
            add_tall(self._param, self._sum, self._decay)
