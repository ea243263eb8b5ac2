"""One parameter with all that belongs to it, as the steps of this package see it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["COUNTER", "Promotion", "Slot", "dense_gradient", "stored_gradient"]

COUNTER = "times_rounded"
"""State of what is rounded stochastically: () int32."""


class Slot(NamedTuple):
    """One parameter with all that belongs to it."""

    name: str
    param: Tensor  # sharded or not; shape is global
    state: dict[str, Tensor]
    group: dict[str, Any]
    stands_for: Tensor | None = None  # the model's own parameter, where ``param`` is a copy to work on
    moved: Tensor | None = None  # its gradient with the placements of ``param``, where backward left it with others

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the model's own parameter, in that parameter's dtype."""
        if self.moved is not None:
            return self.moved
        return (self.param if self.stands_for is None else self.stands_for).grad


class Promotion(NamedTuple):
    """What a step converts to float32 or wider, for an update that does not read and store it by itself."""

    rounded: bool
    """What is rounded stochastically: the weight and its moments."""
    moments: bool
    """Moments of another type than the weight's."""


def dense_gradient(slot: Slot) -> Tensor:
    """Return the gradient to descend along, which must exist. Raises ValueError if it is sparse.

    This is the parameter's own gradient, or a negated copy where the group is to ``maximize``.
    """
    grad = stored_gradient(slot)
    return grad.neg() if slot.group.get("maximize") else grad


def stored_gradient(slot: Slot) -> Tensor:
    """Return the gradient of the parameter itself, which must exist. Raises ValueError if it is sparse."""
    grad = slot.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(f"the gradient of {slot.name!r} is sparse; expected a dense one: build it with sparse=False")
    return grad
