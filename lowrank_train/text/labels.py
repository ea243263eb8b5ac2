"""Which tokens of a block are learned, and where a document starts.

A block holds token ids. A token that is an input but not a label, such as those of prompts, is stored as a negative
number that differs from padding (``IGNORED``):

    stored = id                  it is an input, and the label of the position before it
    stored = IGNORED - 1 - id    it is an input only
    stored = -2^30 - id          it is an input only, and the first token of a document
    stored = IGNORED             it is neither
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "IGNORED",
    "count_labels",
    "largest_id",
    "lay_out",
    "marked_positions",
    "positions",
    "split",
    "starting",
    "unlabelled",
]

IGNORED = -100
"""Label of a position that does not count, as in torch and transformers."""

_START = -(2**30)


def unlabelled(token: int) -> int:
    """Return how a token that is an input only is stored."""
    return IGNORED - 1 - token


def starting(stored: int) -> int:
    """Return how the first token of a document is stored.

    Args:
        stored: the token as it is stored elsewhere.
    """
    return stored if stored <= _START else _START - (stored if stored >= 0 else IGNORED - 1 - stored)


def largest_id(stored: np.ndarray[Any, Any], rows: int = 2**22) -> int:
    """Return the largest id of stored tokens (tokens,), ``rows`` of which are read at a time; -1 if there is none."""
    largest = -1
    for start in range(0, len(stored), rows):
        part = stored[start : start + rows].astype(np.int64)
        inputs_only = np.where(part <= _START, _START - part, IGNORED - 1 - part)
        largest = max(largest, int(np.where(part >= 0, part, inputs_only).max()))
    return largest


def split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of stored blocks.

    Args:
        blocks: (n, length + 1) int64, as stored.

    Returns:
        Inputs (n, length), 0 where there is no token; labels (n, length), ``IGNORED`` where none counts.
    """
    inputs, labels = blocks[:, :-1], blocks[:, 1:]
    inputs = torch.where(inputs < IGNORED, torch.where(inputs <= _START, _START, IGNORED - 1) - inputs, inputs)
    return inputs.clamp_min(0), torch.where(labels < 0, IGNORED, labels)


def positions(blocks: Tensor) -> Tensor:
    """Return position of every input in its document.

    Args:
        blocks: (n, length + 1) int64, as stored.

    Returns:
        (n, length) int64, 0 at the first input of a row and of a document.
    """
    starts = blocks[:, :-1] <= _START
    places = torch.arange(starts.shape[1], device=blocks.device).expand(starts.shape)
    return places - torch.where(starts, places, 0).cummax(1).values


def marked_positions(blocks: Tensor) -> Tensor | None:
    """Return ``positions``, or None if no document is marked as starting, so that each row is one document."""
    return positions(blocks) if bool((blocks <= _START).any()) else None


def count_labels(blocks: Tensor) -> int:
    """Return how many labels of stored blocks (n, length + 1) count."""
    return int((blocks[:, 1:] >= 0).sum())


def lay_out(examples: Iterable[list[int]], seq_len: int, end: int, seen: Counter[str]) -> Iterator[list[int]]:
    """Lay out rows of ``seq_len`` tokens in which no example goes on into the next row; one more token ends the last
    row.

    The first token of an example is never a label, because the token before it is of another example. An example
    longer than a row is cut. An example is left out if none of its labels remains.

    Args:
        examples: stored tokens of each.
        seq_len: tokens per row; what is left of one is filled with end-of-text tokens that are not learned.
        end: the end-of-text token.
        seen: "cut" is raised for each example longer than a row, "left_out" for each that is left out.
    """
    row: list[int] = []
    filling = unlabelled(end)
    any_row = False
    for whole in examples:
        seen["cut"] += len(whole) > seq_len
        example = whole[:seq_len]
        if not any(token >= 0 for token in example[1:]):
            seen["left_out"] += 1
            continue
        if len(row) + len(example) > seq_len:
            yield row + [filling] * (seq_len - len(row))
            row = []
        row += [example[0] if example[0] < 0 else unlabelled(example[0]), *example[1:]]
        any_row = True
    if any_row:
        yield row + [filling] * (seq_len - len(row))
        yield [filling]
