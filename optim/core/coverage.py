"""What an optimizer updates by its method and what by AdamW: shown in ``repr``, and warned of where it is little.

Embeddings and heads get AdamW by design and do not count. Neither do optimizers that treat all parameters alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from lowrank_train.optim.arguments.caller import CoverageWarning, warn_at_the_caller
from lowrank_train.optim.core.common_updates import ADAMW
from lowrank_train.optim.core.update import UpdateOf
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.layout import matrix_shape
from lowrank_train.optim.storage.quantization import BITS, MOMENTS

__all__ = ["summary", "unwarned", "warn"]

_LEAST = 0.5

_ASIDE = frozenset({"embedding", "head"})


@contextmanager
def unwarned() -> Iterator[None]:
    """Suppress the warning for optimizers that only count bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        yield


def warn(method: str, slots: list[Slot], update_of: UpdateOf, layers: str | None, modules: Mapping[str, str]) -> None:
    """Warn of matrices that get AdamW, and where the method updates less than half of what is no embedding or head.

    Args:
        method: the optimizer's class.
        slots: all parameters of the optimizer.
        update_of: what updates the parameters of a group.
        layers: what the method trains in place of matrices; None: matrices.
        modules: class of the module that owns a parameter, by the parameter's name, where that is known.
    """
    covered = [slot for slot in slots if update_of(slot.group) is not ADAMW]
    left = [slot for slot in slots if update_of(slot.group) is ADAMW and slot.group["role"] not in _ASIDE]
    of_method, rest = _numbers(slot for slot in covered if slot.group["role"] not in _ASIDE), _numbers(left)
    matrices = [slot for slot in left if slot.group["role"] == "matrix"]
    if rest and of_method < _LEAST * (of_method + rest):
        warn_at_the_caller(
            f"{method} updates {of_method:,} of the {of_method + rest:,} numbers outside of embeddings and heads "
            f"({of_method / (of_method + rest):.0%}) by its method; AdamW updates the others, with AdamW's state: "
            f"{'; '.join(_described(left, modules))}. If they are matrices, say so: "
            f"optim.param_groups(model, rules={{{_rule(left, slots)!r}: {{'role': 'matrix'}}}})"
        )
    elif matrices:
        warn_at_the_caller(
            f"AdamW, and not the method of {method}, updates {len(matrices)} matrices of {_numbers(matrices):,} "
            f"numbers: {'; '.join(_described(matrices, modules))}. "
            f"It trains {layers} layers, which these were not converted to"
        )


def summary(slots: list[Slot], told: Callable[[Slot], str], update_of: UpdateOf) -> str:
    """Return a line for every role and kind of update: how many tensors and numbers.

    Args:
        slots: all parameters of an optimizer.
        told: what updates a parameter, in words.
        update_of: what updates the parameters of a group.
    """
    kinds: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        kinds.setdefault((slot.group["role"], told(slot)), []).append(slot)
    lines = []
    for (role, update), members in kinds.items():
        line = f"    {role}: {_tensors(len(members))} of {_numbers(members):,} numbers by {update}"
        apart = [slot for slot in members if update_of(slot.group).takes_apart(slot.param, slot.group)]
        stacks = [slot for slot in apart if slot.param.ndim > 2]
        if stacks:
            matrices = sum(slot.param.shape[:-2].numel() for slot in stacks)
            line += f"; {len(stacks)} of them are stacks, of {matrices:,} matrices"
        wide = [slot for slot in members if role == "vector" and slot.param.ndim > 1]
        if wide:
            line += f"; {len(wide)} of them, {_numbers(wide):,} numbers, have two dimensions or more"
        whole = [slot for slot in members if _is_kept_whole(slot)]
        if whole:
            line += (
                f"; {len(whole)} of them, {_numbers(whole):,} numbers, keep their moments in full precision: they are "
                f"too small for {whole[0].group['state_dtype']}, or have not two dimensions"
            )
        lines.append(line)
    return "\n".join(lines)


def _is_kept_whole(slot: Slot) -> bool:
    """Return whether the moments of a parameter are kept in full precision although the group asks for fewer bits."""
    wanted = slot.group["state_dtype"] in BITS and any(key in MOMENTS for key in slot.state)
    return wanted and not any(key.endswith("_scale") for key in slot.state)


class _Kind(NamedTuple):
    module: str
    slots: list[Slot]


def _numbers(slots: Iterator[Slot] | list[Slot]) -> int:
    return sum(slot.param.numel() for slot in slots)


def _tensors(count: int) -> str:
    return f"{count} tensor" + "s" * (count != 1)


def _kinds(slots: list[Slot], modules: Mapping[str, str]) -> list[_Kind]:
    """Return the slots by module type, those with the most numbers first."""
    kinds: dict[str, list[Slot]] = {}
    for slot in slots:
        kinds.setdefault(modules.get(slot.name, "modules not known"), []).append(slot)
    return sorted((_Kind(*each) for each in kinds.items()), key=lambda kind: -_numbers(kind.slots))


def _described(slots: list[Slot], modules: Mapping[str, str], most: int = 4) -> list[str]:
    kinds = _kinds(slots, modules)
    told = []
    for module, members in kinds[:most]:
        largest = max(members, key=lambda slot: slot.param.numel())
        shape = " x ".join(map(str, largest.param.shape)) or "one number"
        told.append(
            f"{module}, {_tensors(len(members))} of {_numbers(members):,} numbers, such as {largest.name!r} ({shape})"
        )
    if len(kinds) > most:
        told.append(f"and {len(kinds) - most} more kinds")
    return told


def _rule(left: list[Slot], slots: list[Slot]) -> str:
    """Return a pattern that matches the largest weights of two dimensions or more, in all layers, and nothing else."""
    numbers: dict[str, int] = {}
    vectors = [slot.name for slot in slots if slot.param.ndim < 2]
    for slot in left:
        if slot.param.ndim > 1 and min(matrix_shape(slot.param.shape)) > 1:
            exact = f"^{re.escape(slot.name)}$"
            general = re.sub(r"\d+", r"\\d+", exact)
            pattern = exact if any(re.search(general, name) for name in vectors) else general
            numbers[pattern] = numbers.get(pattern, 0) + slot.param.numel()
    largest = sorted(numbers, key=lambda pattern: -numbers[pattern])[:4]
    return "|".join(largest) or "PATTERN OF NAMES"
