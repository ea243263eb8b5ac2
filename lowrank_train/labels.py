"""Which tokens of a block are learned: those of responses, not those of prompts and padding.

A block holds token ids; a token that is an input but not a label is stored as a negative number that no padding
(``IGNORED``) can be taken for:

    stored = id                  it is an input, and the label of the position before it
    stored = IGNORED - 1 - id    it is an input only
    stored = IGNORED             it is neither
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lowrank_train.loss import IGNORED

__all__ = ["count_labels", "lay_out", "split", "unlabelled"]


def unlabelled(token: int) -> int:
    """How a token that is an input only is stored."""
    return IGNORED - 1 - token


def split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of stored blocks.

    Args:
        blocks: (n, length + 1) int64, as stored.

    Returns:
        Inputs (n, length), 0 where there is no token; labels (n, length), ``IGNORED`` where none counts.
    """
    inputs, labels = blocks[:, :-1], blocks[:, 1:]
    inputs = torch.where(inputs < IGNORED, IGNORED - 1 - inputs, inputs).clamp_min(0)
    return inputs, torch.where(labels < 0, IGNORED, labels)


def count_labels(blocks: Tensor) -> int:
    """How many labels of stored blocks (n, length + 1) count."""
    return int((blocks[:, 1:] >= 0).sum())


def lay_out(examples: Iterable[list[int]], seq_len: int, end: int, seen: Counter[str]) -> Iterator[list[int]]:
    """Rows of ``seq_len`` tokens in which no example goes on into the next row, then one token to end the last row.

    The first token of an example is never a label: what stands before it is of another example. An example longer
    than a row is cut, and left out if none of its labels remains.

    Args:
        examples: stored tokens of each.
        seq_len: tokens per row; what is left of one is filled with end-of-text tokens that are not learned.
        end: the end-of-text token.
        seen: "cut" is raised for each example longer than a row.
    """
    row: list[int] = []
    filling = unlabelled(end)
    any_row = False
    for whole in examples:
        seen["cut"] += len(whole) > seq_len
        example = whole[:seq_len]
        if not any(token >= 0 for token in example[1:]):
            continue
        if example[0] >= 0:
            example = [unlabelled(example[0]), *example[1:]]
        if len(row) + len(example) > seq_len:
            yield row + [filling] * (seq_len - len(row))
            row = []
        row += example
        any_row = True
    if any_row:
        yield row + [filling] * (seq_len - len(row))
        yield [filling]
