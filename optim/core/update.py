"""How the parameters of one role are updated: the contract between the optimizers and their methods.

A method supplies an ``Update`` for each role that it is about (``MatrixOptimizer.updates``). Every other role gets one
of the updates that all optimizers have (``optim.core.common_updates``). The optimizer asks the update of a parameter
for its state, its step and its costs, and knows no method by name.

An update is shared by all optimizers of its class and holds no data: what it remembers is the state of a parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lowrank_train.optim.parameters import stacks
from lowrank_train.optim.parameters.slot import COUNTER, Promotion, Slot
from lowrank_train.optim.shards.layout import StateTensor, preferred_shard_dim
from lowrank_train.optim.shards.placements import is_scattered
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace
from lowrank_train.optim.storage.quantization import BITS, as_stored

__all__ = ["Group", "Traffic", "Update", "UpdateOf"]

Group = dict[str, Any]


class Traffic(NamedTuple):
    """Bytes that one matrix makes a rank hand to collectives."""

    step_bytes: int = 0
    """Bytes at every step."""
    refresh_bytes: int = 0
    """More bytes at a step that chooses a new basis."""


class Update(ABC):
    """The update of all parameters of a role, and what it costs."""

    structural_settings: tuple[str, ...] = ()
    """Hyperparameters that say what the state means; a checkpoint must have been written with the same values."""

    retired_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters that no longer exist, each with the only value that a checkpoint may have."""

    interval_setting: str | None = None
    """The hyperparameter that says after how many steps ``Traffic.refresh_bytes`` are due again."""

    takes: Literal["as stored", "moments as stored", "float32"] = "float32"
    """The types in which ``step`` takes its tensors: everything as it is stored; moments as they are stored, and
    what is rounded stochastically in float32; or weights and moments in float32 or wider."""

    is_element_wise = False
    """Whether each number is updated by itself, so that any piece of a parameter will do."""

    prefers_long_side = False
    """Whether a matrix is best sharded along its longer dimension, where it is worked on as (m, d), m >= d."""

    works_between_steps = False
    """Whether the optimizer reads the state between steps too. It must then lie whole and unconverted on the device."""

    words: str | None = None
    """What ``repr(optimizer)`` calls the update; None: the name of the optimizer's class."""

    @abstractmethod
    def state(self, name: str, param: Tensor, group: Group) -> dict[str, StateTensor]:
        """Return the state tensors of one matrix, or of one parameter of another role.

        Raises ValueError for hyperparameters out of range or that do not fit the shape.
        """

    @abstractmethod
    def step(self, slots: list[Slot]) -> None:
        """Update all parameters of the role in place, from ``slot.grad``, which may be None and is never written.

        A matrix is (out, in). Every rank calls this with the same matrices in the same order.
        """

    # --------------------------------------------------------------------------------------------------------- costs

    def shard_dim(self, shape: Sequence[int], world_size: int) -> int:
        """Return the dimension to shard a parameter along for the least communication; advice, never required."""
        return preferred_shard_dim(shape, world_size) if self.prefers_long_side else 0

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return what one matrix costs in communication, if it is sharded along ``dim`` over two ranks or more."""
        return Traffic()

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return what a step of these matrices, or parameters of other roles, needs beyond their state.

        By default that is nothing: numbers are updated one by one, in place.
        """
        return Workspace()

    def interval(self, group: Mapping[str, Any]) -> int | None:
        """Return the number of steps between two refreshes; None for an update without them."""
        return None if self.interval_setting is None else group.get(self.interval_setting)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def objection(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
        """Return why state that was saved with these settings means something else here; None if it does not."""
        shape = ("weight_layout",) if group["role"] == "matrix" else ()
        for key in (*self.structural_settings, *shape):
            if saved.get(key, group[key]) != group[key]:
                return (
                    f"the checkpoint was written with {key}={saved[key]!r} and this optimizer has "
                    f"{key}={group[key]!r}, so its state means something else; load it with the same"
                )
        return None

    # ---------------------------------------------------------------------------------------------------- in backward

    def coordinates_suffice(self, slot: Slot) -> bool:
        """Return whether the update needs no more of a gradient than ``project_gradient`` returns."""
        return False

    def summed_gradient(self, slot: Slot) -> StateTensor:
        """Return the tensor in which gradients of several micro-batches are summed, until the update."""
        return StateTensor(tuple(slot.param.shape), slot.param.dtype, "parameter")

    def project_gradient(self, slot: Slot, *, refresh: bool) -> Tensor | None:
        """Return coordinates of the present gradient, linear in it; a collective where ``step`` is.

        ``refresh``: choose directions first if due. None if there are no directions yet and this gradient gave none.
        """
        raise NotImplementedError

    def step_coordinates(self, slot: Slot, coordinates: Tensor) -> None:
        """Update one parameter from (sums of) what ``project_gradient`` returned."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- what follows from the properties

    def layout(self, name: str, param: Tensor, group: Group) -> dict[str, StateTensor]:
        """Return the state tensors of one parameter as they are kept; of a stack those of all its matrices."""
        if not self.takes_apart(param, group):
            return self.matrix_layout(name, param, group)
        one = self.matrix_layout(name, stacks.matrix_like(param, group), group)
        return stacks.stacked(one, param, group)

    def matrix_layout(self, name: str, param: Tensor, group: Group) -> dict[str, StateTensor]:
        """Return the state tensors of a parameter that is no stack, or of one matrix, as they are kept."""
        layout = as_stored(self.state(name, param, group), group["state_dtype"])
        if layout and group["stochastic_rounding"] and param.dtype == torch.bfloat16:
            layout[COUNTER] = StateTensor((), torch.int32, "replicated")
        return layout

    def promotes(self, slot: Slot) -> Promotion:
        """Return what a step converts to float32 or wider before the update takes it."""
        return Promotion(rounded=self.takes != "as stored" and COUNTER in slot.state, moments=self.takes == "float32")

    def is_gathered(self, slot: Slot) -> bool:
        """Return whether a step needs more of a parameter than the pieces that several mesh axes leave a rank.

        What works number by number needs more only if moments share scales or rounding depends on the place.
        """
        if not is_scattered(slot.param):
            return False
        group = slot.group
        is_rounded = group["stochastic_rounding"] and slot.param.dtype == torch.bfloat16
        return not self.is_element_wise or is_rounded or group["state_dtype"] in BITS

    def takes_apart(self, param: Tensor, group: Group) -> bool:
        """Return whether each matrix of a stack is updated by itself: where more than single numbers count."""
        needed = not self.is_element_wise or group["state_dtype"] in BITS  # whose blocks lie in rows of a matrix
        return needed and stacks.is_taken_apart(param.shape, group)


UpdateOf = Callable[[Mapping[str, Any]], Update]
"""Parameter group -> its update."""
