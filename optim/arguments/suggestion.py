"""What an error says about a name that is not known: the nearest known name, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["suggestion"]


def suggestion(got: str, valid: Iterable[str], others: str = "") -> str:
    """Return the end of a message on an unknown name.

    Args:
        got: the unknown name.
        valid: the known names.
        others: what is accepted beside them, such as ", or a folder".
    """
    valid = list(valid)
    close = difflib.get_close_matches(got, valid, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"expected one of {', '.join(valid)}{others}"
