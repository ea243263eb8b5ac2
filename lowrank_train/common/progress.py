"""Progress bars for long work, in one style: nothing for what is quick, few lines where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["bar_style", "show_progress"]

T = TypeVar("T")


def bar_style() -> dict[str, Any]:
    """Return the refresh rates of a progress bar for a terminal, or for a log file."""
    live = sys.stderr.isatty()
    return {"dynamic_ncols": live, "mininterval": 0.2 if live else 10}


def show_progress(items: Iterable[T], what: str, unit: str, *, active: bool = True) -> Iterator[T]:
    """Yield the items, with a bar that appears when they take more than a few seconds and goes when they are done."""
    yield from tqdm(items, desc=what, unit=f" {unit}", delay=3, leave=False, disable=not active, **bar_style())
