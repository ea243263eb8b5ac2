"""Pairs of sentences: read from parquet files, made into tokens of one vocabulary, dealt into batches by length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.tokenizer import encode, prepare_tokenizer, read_own_tokenizer
from lowrank_train.text.labels import IGNORED

__all__ = ["PARTS", "Batch", "Pairs", "TranslationData", "batches", "load_translation_data", "padded"]

PARTS = ("train", "validation", "test")

_POOL = 50
"""Batches that are sorted by length together; more would make the order less random, and save little padding."""


class Pairs(NamedTuple):
    """One part: texts, and tokens with the end token at the end."""

    source_text: list[str]
    target_text: list[str]
    source: list[list[int]]
    target: list[list[int]]


class Batch(NamedTuple):
    """Sentences b, padded to m and n tokens."""

    source: Tensor
    """(b, m)."""
    lengths: Tensor
    """(b,), of the sources."""
    read: Tensor
    """(b, n), what the decoder reads: the end token, then the target without its end token."""
    labels: Tensor
    """(b, n), the target; -100 beyond its end."""


@dataclass
class TranslationData:
    """Three parts and the tokenizer of both languages."""

    parts: dict[str, Pairs]
    tokenizer: PreTrainedTokenizerBase
    sha1: str
    """The hash of all texts."""

    @property
    def end(self) -> int:
        """The token that begins and ends a sentence."""
        return int(self.tokenizer.eos_token_id)

    def text(self, tokens: list[list[int]]) -> list[str]:
        """Return the text of translations."""
        return [self.tokenizer.decode(words, clean_up_tokenization_spaces=False).strip() for words in tokens]

    def facts(self) -> dict[str, int]:
        """Return the sizes of the data."""
        counts = {f"{part}_sentences": len(pairs.source) for part, pairs in self.parts.items()}
        tokens = sum(len(target) for target in self.parts["train"].target)
        return {**counts, "train_target_tokens": tokens, "vocabulary": len(self.tokenizer)}


def load_translation_data(
    folder: str, source: str, target: str, *, vocab_size: int, places: int, tokenizer_folder: Path
) -> TranslationData:
    """Read ``train.parquet``, ``validation.parquet`` and ``test.parquet``.

    Args:
        folder: of the files.
        source: column of the language that is translated from.
        target: column of the other.
        vocab_size: of the byte-level BPE that is trained on both languages of the training part.
        places: the longest sentence that fits, in tokens.
        tokenizer_folder: where the tokenizer is, or is put.

    Raises:
        UserError: a file or column is missing, a part is empty or has empty sentences; a sentence does not fit.
    """
    texts = {part: _read(Path(folder) / f"{part}.parquet", source, target) for part in PARTS}
    sides = texts["train"]
    prepare_tokenizer(
        DataConfig(tokenizer=None, vocab_size=vocab_size),
        lambda: (f" {s}" for side in sides for s in side),
        tokenizer_folder,
    )
    tokenizer = read_own_tokenizer(tokenizer_folder, f"delete {tokenizer_folder}, and it is trained again")
    digest, parts = hashlib.sha1(), {}
    for part, (sources, targets) in texts.items():
        for text in (*sources, *targets):
            digest.update(text.encode() + b"\n")
        # a leading space, so that the first word is the same token as elsewhere
        ids = [encode(tokenizer, [f" {text}" for text in side]) for side in (sources, targets)]
        longest = max(len(sentence) for side in ids for sentence in side)
        if longest > places:
            raise UserError(f"model.places={places}: a sentence of {part}.parquet has {longest} tokens; raise it")
        parts[part] = Pairs(sources, targets, *ids)
    return TranslationData(parts, tokenizer, digest.hexdigest())


def batches(pairs: Pairs, *, tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Return indices of the pairs of each batch of an epoch: a function of the arguments, nothing else.

    Pairs are shuffled, sorted by length in pools, cut where sources and targets, padded, come to ``tokens``, and the
    batches shuffled. Every pair is in one batch; one that is longer than ``tokens`` is alone.
    """
    draw = np.random.default_rng((seed, epoch))
    lengths = np.array([(len(t), len(s)) for s, t in zip(pairs.source, pairs.target, strict=True)])
    order = draw.permutation(len(lengths))
    mean = max(1.0, float(lengths.sum(1).mean()))
    pool = max(1, int(_POOL * tokens / mean))
    found: list[list[int]] = []
    for start in range(0, len(order), pool):
        chosen = order[start : start + pool]
        chosen = chosen[np.lexsort((lengths[chosen, 1], lengths[chosen, 0]))]
        batch: list[int] = []
        longest = np.zeros(2, dtype=np.int64)
        for index in chosen.tolist():
            grown = np.maximum(longest, lengths[index])
            if batch and grown.sum() * (len(batch) + 1) > tokens:
                found.append(batch)
                batch, grown = [], lengths[index]
            batch.append(index)
            longest = grown
        found.append(batch)
    return [found[i] for i in draw.permutation(len(found))]


def padded(pairs: Pairs, indices: list[int], end: int) -> Batch:
    """Return the tensors of a batch."""
    source, target = [pairs.source[i] for i in indices], [pairs.target[i] for i in indices]
    read = [[end, *sentence[:-1]] for sentence in target]
    lengths = torch.tensor([len(sentence) for sentence in source])
    return Batch(_stack(source, end), lengths, _stack(read, end), _stack(target, IGNORED))


def _stack(sentences: list[list[int]], fill: int) -> Tensor:
    out = torch.full((len(sentences), max(map(len, sentences))), fill)
    for row, sentence in zip(out, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return out


def _read(file: Path, source: str, target: str) -> tuple[list[str], list[str]]:
    if not file.is_file():
        raise UserError(
            f"there is no {file}; expected train.parquet, validation.parquet and test.parquet in data.folder="
        )
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for key, column in (("source", source), ("target", target)):
        if column not in table.column_names:
            raise UserError(f"{file} has no column {column!r}; it has {', '.join(table.column_names)}: set data.{key}=")
    sides = [[(text or "").strip() for text in table.column(column).to_pylist()] for column in (source, target)]
    if not sides[0]:
        raise UserError(f"{file} is empty; expected pairs of sentences")
    for column, side in zip((source, target), sides, strict=True):
        if "" in side:
            raise UserError(f"{file}: row {side.index('')} of column {column!r} is empty; expected a sentence")
    return sides[0], sides[1]
