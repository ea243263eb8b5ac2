"""Long texts in pieces: a tokenizer needs about 200 bytes of memory for each character that it is given at once.

A text is cut only before a space between two words, and only where the tokenizer splits as well, so that the tokens are
those of the whole text. A text without such a place is left whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

__all__ = ["ids_in_pieces", "pieces"]

_CHARACTERS = 100_000
_AT_ONCE = 2_000_000
_WINDOW = 64
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def pieces(text: str, splits: Callable[[str, str], bool] = lambda before, after: True) -> Iterator[str]:
    """Yield the parts of a text in order, each of about 100,000 characters.

    Args:
        text: of any length; nothing of it is lost.
        splits: whether a cut between two pieces of text may be made; asked with the characters around each place.
    """
    start = 0
    while len(text) - start > _CHARACTERS:
        place = start + _CHARACTERS
        found = _BETWEEN_WORDS.search(text, place)
        while found and not splits(
            text[found.start() - _WINDOW : found.start()], text[found.start() : found.start() + _WINDOW]
        ):
            found = _BETWEEN_WORDS.search(text, found.end() + _CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def ids_in_pieces(encode: Callable[[list[str]], list[list[int]]], texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, of which long ones are given to the tokenizer in pieces.

    Args:
        encode: token ids of texts, to which nothing is added.
        texts: of any length.
    """
    lengths = [len(text) for text in texts]
    if max(lengths, default=0) <= _CHARACTERS and sum(lengths) <= _AT_ONCE:
        return encode(texts)

    def splits(before: str, after: str) -> bool:
        whole, first, second = encode([before + after, before, after])
        return whole == first + second

    made = []
    for text in texts:
        ids: list[int] = []
        for piece in pieces(text, splits):
            ids += encode([piece])[0]
        made.append(ids)
    return made
