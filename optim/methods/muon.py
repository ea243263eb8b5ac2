"""Muon: momentum, orthogonalized; the step of a matrix has the same length in every direction.

    M <- mu M + (1 - mu) G
    X  = mu M + (1 - mu) G    (Nesterov; else X = M)
    O  = NewtonSchulz(X)      singular vectors of X, singular values of about 1: see ``optim.orthogonalize``
    W <- (1 - lr wd) W - lr s O,   s = sqrt(max(1, R / C))   ("original", Jordan et al.)
                                   s = 0.2 sqrt(max(R, C))   ("match_rms_adamw", Liu et al.: s O is as long as Adam's)

    W, G, M, X, O (R, C), each worked on tall: (m, d) with m = max(R, C), d = min(R, C).

Sharded, whole matrices are dealt round the ranks: X travels to the owner and O back, 2 m d / P numbers of 2 bytes for
each of P ranks, and no rank repeats another's work. A matrix sharded along d is turned over and back first. A rank on
which a gradient is missing sends zeros and leaves its part of the matrix alone.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(kellerjordan.github.io/posts/muon); Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982), the second
scale. Defaults and order of operations are those of ``torch.optim.Muon``, which cannot work on shards.

We differ: nothing but the ranks. Newton-Schulz runs in bfloat16 (float64 for float64 weights), as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_fraction
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.core.weight_update import decay_of
from lowrank_train.optim.orthogonalize import CHUNK_NUMBERS, newton_schulz
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.blocks import chunks
from lowrank_train.optim.shards.collectives import on_whole_matrices
from lowrank_train.optim.shards.layout import StateTensor, local, matrix_shape, shard_count
from lowrank_train.optim.shards.tall import add_tall, tall, turned_numbers
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace

__all__ = ["Muon"]

_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class MuonUpdate(Update):
    """Muon on all matrices at once."""

    prefers_long_side = True

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return a step count and one average; raises ValueError for hyperparameters out of range."""
        check_fraction(group, "momentum", name)
        if group["adjust_lr"] not in _SCALES:
            raise ValueError(f"adjust_lr={group['adjust_lr']!r} for {name!r}; expected one of {', '.join(_SCALES)}")
        return {
            "step": StateTensor((), torch.float32, "host"),
            "momentum": StateTensor(tuple(param.shape), param.dtype, "parameter"),
        }

    def step(self, slots: list[Slot]) -> None:
        """Update matrices; every rank goes through the same ones, with or without a gradient."""
        for chunk in chunks(slots, [slot.param.numel() // shard_count(slot.param) for slot in slots], CHUNK_NUMBERS):
            params = [slot.param for slot in chunk]
            blocks = [tall(slot.param, _averaged(slot)) for slot in chunk]
            travelling = [block.to(_travelling(block.dtype)) for block in blocks]
            for slot, update in zip(chunk, on_whole_matrices(params, travelling, newton_schulz), strict=True):
                _apply(slot, update)

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of X to its owner and O back; twice if the matrix is sharded along its shorter dimension."""
        d, m = sorted(matrix_shape(shape))
        size = torch.promote_types(dtype, torch.float32)
        there, back = turned_numbers(shape, dim, world_size)
        travelling = 2 * math.ceil(m / world_size) * d * _travelling(size).itemsize
        return Traffic(step_bytes=(there + back) * size.itemsize + travelling)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return X, its copy as it travels and the result, of matrices that are orthogonalized together.

        Of one whole matrix come two iterates Y, and three products Y^T Y.
        """
        together = 0
        for chunk in chunks(list(matrices), [x.rows * x.d for x in matrices], CHUNK_NUMBERS):
            size = max(_travelling(x.dtype).itemsize for x in chunk)
            numbers = sum(x.rows * x.d for x in chunk)
            one = 2 * max(x.m * x.d for x in chunk) + 3 * max(x.d for x in chunk) ** 2
            together = max(together, numbers * (chunk[0].itemsize + 2 * size) + size * one)
        return Workspace(step=together + max((x.converted for x in matrices), default=0))


class Muon(MatrixOptimizer):
    """Muon on matrices, AdamW on embeddings, head, norms and biases.

    Args:
        lr: learning rate of all groups; float or tensor. With ``adjust_lr="original"`` matrices usually want 5 to 20
            times the rate of the rest: give their group its own.
        momentum: decay of the average of gradients.
        nesterov: whether to step with the average as it would be after one more such gradient.
        adjust_lr: how ``lr`` depends on a matrix's shape; with ``"match_rms_adamw"`` a rate tuned for AdamW fits.
        betas: decay of AdamW's moments, for what is not a matrix.
        eps: added to the root of AdamW's second moment.

    State of a matrix: ``momentum``, like the parameter; a step count.
    Communication when sharded over P ranks: a P-th of the matrix, in bfloat16, there and back, at every step.
    """

    published = Published(
        paper="Jordan et al., 2024 (kellerjordan.github.io/posts/muon); Liu et al., arXiv 2502.16982",
        when="memory of one moment is there, and a step may take longer",
    )
    updates: ClassVar = {"matrix": MuonUpdate()}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, arguments(locals()))


def _averaged(slot: Slot) -> Tensor:
    """X, this rank's part of it shaped as the parameter; updates M."""
    dtype = torch.promote_types(slot.param.dtype, torch.float32)
    if slot.grad is None:
        return torch.zeros_like(local(slot.param), dtype=dtype)
    stored, mu = local(slot.state["momentum"]), slot.group["momentum"]
    gradient = local(dense_gradient(slot)).to(dtype)
    average = stored.to(dtype).lerp_(gradient, 1 - mu)
    if average.dtype != stored.dtype:
        stored.copy_(average)
    return gradient.lerp(average, mu) if slot.group["nesterov"] else average


def _apply(slot: Slot, update: Tensor) -> None:
    group = slot.group
    slot.state["step"] += 1
    scale = _SCALES[group["adjust_lr"]](*matrix_shape(slot.param.shape))
    update = update.to(torch.promote_types(slot.param.dtype, torch.float32)) * (-scale * group["lr"])
    add_tall(slot.param, update, decay_of(group) if slot.grad is not None else None)


def _travelling(dtype: torch.dtype) -> torch.dtype:
    """The type Newton-Schulz works in."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16
