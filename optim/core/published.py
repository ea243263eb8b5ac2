"""What a method says about itself: where it is published, when to take it, and what its arguments mean.

A class documents only the arguments that are special to it. The text of all others is written here, once, and put into
the docstring when the class is made, in the order of the signature. So ``help`` and the pages of docs/ show all.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Published", "arguments", "introduce"]


class Published(NamedTuple):
    """The source of a method, and the reason to choose it."""

    paper: str
    """Authors and arXiv number."""
    when: str
    """The situation in which it is the right choice, as the end of the sentence "take it when"."""


_ARGUMENTS = {
    "params": "groups from ``optim.param_groups(model)``, before or after ``fully_shard``.",
    "lr": "learning rate of all groups, a step of about ``lr`` per coordinate; float or tensor.",
    "rank": "basis vectors kept per matrix, 1 .. min(m, n); None keeps a quarter of them (at least 1).",
    "basis": "how basis vectors are chosen, a name of ``optim.low_rank.bases.BASES``.",
    "residual": "what becomes of the gradient outside the basis, a name of ``optim.low_rank.residuals.RESIDUALS``.",
    "moments": "what becomes of Adam's moments when the basis changes: keep, reset or rotate.",
    "refresh_interval": "steps between two choices of basis vectors.",
    "scale": "factor of the update inside the basis.",
    "residual_scale": "factor of the update outside the basis, where the treatment has one (sign, normalized).",
    "seed": "seed of all random draws.",
    "betas": "decay of the first and second moment.",
    "eps": "added to the root of the second moment.",
    "weight_decay": "decoupled weight decay, per unit of ``lr``.",
    "state_dtype": 'type of the moments, those of embeddings and head included: None (the parameter\'s), "float32", '
    '"bfloat16", "8bit" or "4bit" (``optim.storage.quantization``).',
}

_RAISES = "ValueError: at construction, for settings that are out of range or do not fit a parameter (named)"


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings a constructor was called with, from its ``locals()`` before it binds any other name."""
    return {key: value for key, value in scope.items() if key not in ("self", "params", "__class__")}


def introduce(cls: type, *, needs_roles: bool) -> None:
    """Give a new class its name, that of its file, and complete its docstring, each unless the class has it.

    The docstring gets every argument of the constructor, and what the constructor raises. ``Args:`` takes the place it
    has in the docstring, or follows the first paragraph.
    """
    if "name" not in vars(cls):
        cls.name = cls.__module__.rpartition(".")[2]  # type: ignore[attr-defined]
    if not cls.__doc__ or "__init__" not in vars(cls):
        return
    doc = inspect.cleandoc(cls.__doc__)
    before, given, after = doc.partition("\n\nArgs:\n")
    if not given:
        before, _, after = doc.partition("\n\n")
    special, after = _entries(after) if given else ({}, after)
    lines = ["Args:"]
    for key in list(inspect.signature(cls).parameters):
        if key in special:
            lines += special[key]
        elif key in _ARGUMENTS:
            lines += _wrapped(f"{key}: {_ARGUMENTS[key]}")
    paragraphs = [before, "\n".join(lines)]
    if "Raises:\n" not in after:
        paragraphs.append(
            "\n".join(["Raises:", *_wrapped(_RAISES + (", and for groups without roles." * needs_roles or "."))])
        )
    cls.__doc__ = "\n\n".join([*paragraphs, after] if after else paragraphs)


def _entries(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each argument, and the text that follows them."""
    section, _, after = text.partition("\n\n")
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in section.splitlines():
        started = re.match(r" {4}(\w+): ", line)
        if started:
            lines = found[started[1]] = []
        lines.append(line)
    return found, after


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
