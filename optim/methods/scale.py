"""SCALE: stochastic gradient descent on normalized gradients, with momentum in the last layer only.

    m <- beta m + (1 - beta) G  for the head;   m = G  for matrices and embeddings, which have no state
    n_i = rms(m_i)              for each output i of the layer
    W <- (1 - lr wd) W - lr m_i / max(n_i, 1e-8)

An output is a row of an nn.Linear's weight (out, in), and a column of an embedding's table (V, h): its rows are the
inputs. rms is over all elements that feed the output. Norms and biases get AdamW.

Sharded along the first dimension, as FSDP2 does by default, rows are whole and only embeddings need a sum over the
ranks, of h numbers; any tensor that is sharded along the dimension its outputs run over joins in the same sum. A rank
on which its gradient is missing adds zeros, and leaves its part of the parameter alone.

Source: Glentis, Li, Han, Hong, "A Minimalist Optimizer Design for LLM Pretraining" (arXiv 2506.16659), Algorithm 1.

We differ:
  * as the released code, and unlike the paper, we divide by the root mean square and not by the l2 norm, so that
    ``lr`` is a step per coordinate, as in Adam; of n elements the two differ by the constant sqrt(n);
  * a table tied between embedding and head counts as an embedding, so nothing has momentum then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_fraction
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.core.weight_update import decay_of
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.blocks import row_blocks, widened
from lowrank_train.optim.shards.collectives import sum_over_shards
from lowrank_train.optim.shards.layout import StateTensor, local, sharded_dim
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace

__all__ = ["SCALE"]

_SMALLEST_RMS = 1e-8  # as the released code; makes 0 of 0


class SCALEUpdate(Update):
    """Normalized gradient descent on all matrices, embeddings and heads at once."""

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return a step count, and the average of a head.

        Raises ValueError for a momentum out of range or a shape without outputs.
        """
        check_fraction(group, "momentum", name)
        if param.ndim < 2:
            raise ValueError(
                f"{name!r} has role {group['role']!r} and shape {tuple(param.shape)}; expected two dimensions or more, "
                "for inputs and outputs: give it role 'vector' with rules={...} in optim.param_groups"
            )
        step = {"step": StateTensor((), torch.float32, "host")}
        if group["role"] != "head":
            return step
        return {**step, "momentum": StateTensor(tuple(param.shape), param.dtype, "parameter")}

    def step(self, slots: list[Slot]) -> None:
        """Update parameters, with all sums over the ranks in one."""
        directions = [_direction(slot) for slot in slots]
        squares = [_sum_of_squares(slot, direction) for slot, direction in zip(slots, directions, strict=True)]
        split = [i for i, slot in enumerate(slots) if _inputs_are_split(slot)]
        totals = sum_over_shards([slots[i].param for i in split], [squares[i] for i in split])
        for i, total in zip(split, totals, strict=True):
            squares[i] = total
        for slot, direction, square in zip(slots, directions, squares, strict=True):
            slot.state["step"] += 1
            if slot.grad is not None:
                _apply(slot, direction, square)

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of a sum for each output whose inputs are split: of an embedding, along dimension 0."""
        inputs = _inputs(group, len(shape))
        if dim not in inputs:
            return Traffic()
        outputs = math.prod(size for i, size in enumerate(shape) if i not in inputs)
        return Traffic(step_bytes=outputs * torch.promote_types(dtype, torch.float32).itemsize)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return the head's average, where it has another type than the gradient, and a block of a converted weight."""
        heads = max((x.whole for x in matrices if x.group["role"] == "head" and x.is_rounded), default=0)
        converted = max((x.converted for x in matrices), default=0)
        return Workspace(step=heads + converted + sum(x.negated for x in matrices))


class SCALE(MatrixOptimizer):
    """Normalized gradient descent on matrices and embeddings, with momentum on the head; AdamW on norms and biases.

    Args:
        momentum: decay of the head's average of gradients.
        betas: decay of AdamW's moments, for norms and biases.
        eps: added to the root of AdamW's second moment.

    State: a step count; for the head also ``momentum``, like the parameter.
    Communication when sharded: one sum of h numbers per embedding and step.
    """

    published = Published(
        paper="Glentis, Li, Han, Hong, arXiv 2506.16659", when="no state at all for matrices and embeddings"
    )
    updates: ClassVar = dict.fromkeys(("matrix", "embedding", "head"), SCALEUpdate())

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, arguments(locals()))


def _inputs(group: dict[str, Any], ndim: int) -> tuple[int, ...]:
    """The dimensions that feed one output."""
    return (0,) if group["role"] == "embedding" else tuple(range(1, ndim))


def _inputs_are_split(slot: Slot) -> bool:
    return sharded_dim(slot.param) in _inputs(slot.group, slot.param.ndim)


def _direction(slot: Slot) -> Tensor:
    """m, this rank's part of it; updates the head's."""
    if slot.grad is None:
        return torch.zeros((), dtype=slot.param.dtype, device=slot.param.device).expand(local(slot.param).shape)
    gradient = local(dense_gradient(slot))
    if "momentum" not in slot.state:
        return gradient
    average = local(slot.state["momentum"])
    return average.lerp_(gradient.to(average.dtype), 1 - slot.group["momentum"])


def _sum_of_squares(slot: Slot, direction: Tensor) -> Tensor:
    """Of each output, over this rank's inputs; its dimensions are kept."""
    dims, dtype = _inputs(slot.group, slot.param.ndim), torch.promote_types(direction.dtype, torch.float32)
    return torch.linalg.vector_norm(direction, dim=dims, keepdim=True, dtype=dtype).square()


def _apply(slot: Slot, direction: Tensor, square: Tensor) -> None:
    group, weight = slot.group, local(slot.param)
    inputs = _inputs(group, slot.param.ndim)
    rms = (square / math.prod(slot.param.shape[dim] for dim in inputs)).sqrt().clamp_(min=_SMALLEST_RMS)
    rate, dtype = -group["lr"] / rms, torch.promote_types(weight.dtype, torch.float32)
    for rows in row_blocks(weight.shape[0], math.prod(weight.shape[1:]), weight.device):
        with widened(weight[rows], dtype, decay_of(group)) as block:
            block.addcmul_(direction[rows], rate if 0 in inputs else rate[rows])
