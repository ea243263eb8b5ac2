"""Long texts in pieces: a tokenizer needs about 200 bytes of memory for each character that it is given at once.

A text is cut only before a space, a line end or a punctuation mark, and only where the tokenizer splits as well. The
tokens are therefore those of the whole text. A text without such a place is left whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

__all__ = ["ids_in_pieces", "pieces"]

_CHARACTERS = 100_000
_AT_ONCE = 2_000_000
_WINDOW = 64
_BETWEEN_TRIES = 1_000  # of 0.3 ms each
_BORDER = re.compile(r"(?<=\S)(?=[ \n]\S)|(?<=[^\W_])(?=[^\w\s])")  # a word ends before a mark; _ is a mark


def pieces(text: str, splits: Callable[[str, str, str], bool] = lambda whole, first, second: True) -> Iterator[str]:
    """Yield the parts of a text in order, each of about 100,000 characters.

    A space between two parts is left out where only that gives the tokens of the whole, because some tokenizers begin
    every text with a space.

    Args:
        text: of any length.
        splits: whether a text may be given in two parts; asked with the characters around each place.
    """
    start = 0
    while len(text) - start > _CHARACTERS:
        cut = _next_cut(text, start + _CHARACTERS, splits)
        if cut is None:
            break
        end, following = cut
        yield text[start:end]
        start = following
    yield text[start:]


def _next_cut(text: str, place: int, splits: Callable[[str, str, str], bool]) -> tuple[int, int] | None:
    """Return where a part may end and the next may begin, from a place on."""
    while found := _BORDER.search(text, place):
        end = found.start()
        for following in (end, end + 1) if text[end] == " " else (end,):
            first, second = text[end - _WINDOW : end], text[following : following + _WINDOW]
            if splits(first + text[end:following] + second, first, second):
                return end, following
        place = end + _BETWEEN_TRIES
    return None


def ids_in_pieces(encode: Callable[[list[str]], list[list[int]]], texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, of which long ones are given to the tokenizer in pieces.

    Args:
        encode: token ids of texts, to which nothing is added.
        texts: of any length.
    """
    lengths = [len(text) for text in texts]
    if max(lengths, default=0) <= _CHARACTERS and sum(lengths) <= _AT_ONCE:
        return encode(texts)

    def splits(*parts: str) -> bool:
        whole, first, second = encode(list(parts))
        return whole == first + second

    made = []
    for text in texts:
        ids: list[int] = []
        for piece in pieces(text, splits):
            ids += encode([piece])[0]
        made.append(ids)
    return made
