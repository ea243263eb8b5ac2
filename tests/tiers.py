"""Which cases of a test are left to the slow tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["only_first_quick"]


def only_first_quick(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Cases of ``pytest.mark.parametrize``: the first stay in ``make test``, the others are marked slow."""
    return [case if i < quick else _slow(case) for i, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
