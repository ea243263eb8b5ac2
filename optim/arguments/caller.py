"""Warnings that point at the line of the user's own code that caused them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["CoverageWarning", "warn_at_the_caller"]


class CoverageWarning(UserWarning):
    """AdamW updates what one might think that the optimizer's own method does."""


def warn_at_the_caller(text: str) -> None:
    """Issue a ``CoverageWarning`` that points at the first line outside of this package."""
    here, level, frame = str(Path(__file__).parents[1]), 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, CoverageWarning, stacklevel=level)
