"""One field of a configuration, with the sentence that ``--help`` shows for it."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any

__all__ = ["setting"]


def setting(default: Any, meaning: str) -> Any:
    """A field with its meaning, shown by ``--help``."""
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})
