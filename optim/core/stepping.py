"""One step of many parameters: each as its update takes it, and all of a role together.

Stacks are taken apart into matrices. What several mesh axes shard is gathered, and what is kept in another type or in
host memory is copied (``optim.core.working_copies``). Then every update gets its matrices at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_train.optim.core.update import Update, UpdateOf
from lowrank_train.optim.core.working_copies import chunked, copied, gathered, is_copied, settled
from lowrank_train.optim.parameters import stacks
from lowrank_train.optim.parameters.slot import Slot

__all__ = ["at_work", "matrices", "parts", "step_slots"]


def step_slots(slots: list[Slot], update_of: UpdateOf) -> None:
    """Update parameters from their gradients."""
    shared, own, apart = list[Slot](), list[Slot](), list[Slot]()
    for slot in slots:
        (apart if update_of(slot.group).takes_apart(slot.param, slot.group) else shared).append(slot)
    for slot in apart:
        if update_of(slot.group).is_gathered(slot):
            with matrices(slot, update_of) as gathered_matrices:
                _step(gathered_matrices, update_of)
        else:
            (own if stacks.has_own_matrices(slot) else shared).extend(parts(settled(slot), update_of))
    # Matrices of this rank alone go by themselves: collectives need the same matrices on every rank.
    _step(shared, update_of)
    _step(own, update_of)


def parts(slot: Slot, update_of: UpdateOf) -> list[Slot]:
    """Return the matrices of a weight, as its update takes them; the weight itself where it is taken as it is."""
    return list(stacks.parts(slot)) if update_of(slot.group).takes_apart(slot.param, slot.group) else [slot]


@contextmanager
def matrices(slot: Slot, update_of: UpdateOf) -> Iterator[list[Slot]]:
    """Yield the matrices of a weight, gathered over all mesh axes but one; stored again on leaving."""
    with gathered([slot], update_of(slot.group).is_gathered) as (ready,):
        yield parts(ready, update_of)


@contextmanager
def at_work(slots: list[Slot], update_of: UpdateOf) -> Iterator[list[Slot]]:
    """Yield parameters as their updates work on them; stored again on leaving."""
    with gathered(slots, lambda slot: update_of(slot.group).is_gathered(slot)) as ready:
        updates = [update_of(slot.group) for slot in ready]
        layouts = [u.matrix_layout(slot.name, slot.param, slot.group) for u, slot in zip(updates, ready, strict=True)]
        promotions = [update.promotes(slot) for update, slot in zip(updates, ready, strict=True)]
        with copied(ready, layouts, promotions) as copies:
            yield copies


def _step(slots: list[Slot], update_of: UpdateOf) -> None:
    as_they_are, as_copies = list[Slot](), list[Slot]()
    for slot in slots:
        update = update_of(slot.group)
        needs_copy = update.is_gathered(slot) or is_copied(slot, update.promotes(slot))
        (as_copies if needs_copy else as_they_are).append(slot)
    _step_as_they_are([settled(slot) for slot in as_they_are], update_of)
    for chunk in chunked(as_copies):
        with at_work(chunk, update_of) as copies:
            _step_as_they_are(copies, update_of)


def _step_as_they_are(slots: list[Slot], update_of: UpdateOf) -> None:
    members: dict[Update, list[Slot]] = {}
    for slot in slots:
        members.setdefault(update_of(slot.group), []).append(slot)
    for update, own in members.items():
        update.step(own)
