"""The text of a run as tokens: split into training and held-out documents, tokenized once, opened on every rank.

Text is a stream of documents, each closed by the end-of-text token, cut into blocks of ``seq_len + 1`` tokens (the
last one is only a label). Prompts with responses are laid into rows of ``seq_len`` tokens instead (``labels.py``).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import Config, DataConfig
from lowrank_train.data.blocks import TokenFile, TokenStream, TrainingBlocks
from lowrank_train.data.documents import (
    Document,
    chats,
    check_exists,
    columns_of,
    embedded_documents,
    examples,
    local_documents,
    local_rows,
    lot,
    open_stream,
    texts,
)
from lowrank_train.data.encoding import Encoder
from lowrank_train.data.sources import KEYS, describe_source, difference, sources
from lowrank_train.data.token_folder import REMEDY, TokenRecord, is_gone, locked, read_record, still_valid
from lowrank_train.data.tokenizer import prepare_tokenizer, read_own_tokenizer
from lowrank_train.files.checksums import damage_in, has_checksums, unverified, write_checksums
from lowrank_train.files.pretrained import read_pretrained
from lowrank_train.text.chat import Chat
from lowrank_train.text.labels import IGNORED, largest_id, lay_out

__all__ = ["Data", "prepare_data"]

_BATCH_OF_DOCUMENTS = 64  # tokenized at one time; larger batches only hold more memory

T = TypeVar("T")
_Opener = Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Data:
    """All a run reads."""

    tokenizer: PreTrainedTokenizerBase
    train: TrainingBlocks
    validation: Tensor
    """Blocks (n, seq_len + 1) int64, as stored; a last block that is not full is padded with ``IGNORED``."""
    description: dict[str, Any]
    """What the text is and how it is cut, for the record of the run."""
    identity: dict[str, Any]
    """The part of the description that is equal for runs that read the same data; checkpoints keep it."""
    notes: list[str]
    """What the user must know about the text, on the first rank and all others."""


def prepare_data(config: Config, ranks: Ranks, folder: Path) -> Data:
    """Tokenize on the first rank into ``folder`` (once), then open on all.

    If it is ``data.folder``, other runs may be about to do the same: the first tokenizes, the others wait for it.

    Raises:
        UserError: text that cannot be read, is empty or too short; ``folder`` holds other data; streams that do not
            divide by the ranks; prompts and responses that would be streamed.
    """

    def write() -> TokenRecord:
        shared = config.data.folder is not None
        try:
            with locked(folder) if shared else nullcontext():
                return _write_tokens(config, folder)
        except OSError as error:
            key = "data.folder" if shared else "run_dir"
            raise UserError(f"cannot write tokens to {folder}: {error}; free space, or set {key} elsewhere") from None

    record = ranks.first(write)
    found = record.found
    ranks.each(lambda: _verify(folder, ranks))
    notes = [*record.notes, *unverified(folder)]
    tokenizer = read_own_tokenizer(folder / "tokenizer", REMEDY.format(folder=folder))
    train: TrainingBlocks
    if record.streaming:
        if config.data.streams % ranks.world_size:
            raise UserError(
                f"data.streams={config.data.streams} does not divide by the world size {ranks.world_size}; "
                f"set it to a multiple, e.g. {ranks.world_size * max(1, round(8 / ranks.world_size))}"
            )
        train = TokenStream(config, tokenizer, found["held_out_below"])
    else:
        tokens = _open(folder / "train.bin", found["dtype"], found["train_tokens"], len(tokenizer))
        train = TokenFile(tokens, config.seq_len, config.seed)
    held_out = _open(folder / "validation.bin", found["dtype"], found["validation_tokens"], len(tokenizer))
    validation = _validation_blocks(held_out, config)
    return Data(tokenizer, train, validation, record.description, record.identity, notes)


def _settings(config: Config, streaming: bool) -> dict[str, Any]:
    """What the tokens of a run depend on, beside the content of its text."""
    return {
        "data.path": _absolute(config.data.path) or "embedded",
        "data.name": config.data.name,
        "data.text_key": config.data.text_key,
        "data.prompt_key": config.data.prompt_key,
        "data.response_key": config.data.response_key,
        "data.messages_key": config.data.messages_key,
        "data.separate_documents": config.data.separates or None,
        "data.special_tokens": config.data.special_tokens,
        "data.add_bos": config.data.add_bos,
        "data.validation": _absolute(config.data.validation),
        "data.validation_fraction": config.data.validation_fraction,
        "data.tokenizer": _absolute(config.data.tokenizer) or f"bpe-{config.data.vocab_size}",
        "data.streams": config.data.streams if streaming else None,
        "evaluation.tokens": config.evaluation.tokens,
        "seq_len": config.seq_len,
        "seed": config.seed,
    }


def _verify(folder: Path, ranks: Ranks) -> None:
    """Raise UserError if a file of this rank's share is not as it was written; earlier versions wrote no checksums."""
    if has_checksums(folder):
        damage = damage_in(folder, rank=ranks.rank, world_size=ranks.world_size)
        if damage is not None:
            raise UserError(f"{folder} is damaged ({damage}); {REMEDY.format(folder=folder)}")


def _write_tokens(config: Config, folder: Path) -> TokenRecord:
    """Make ``folder`` (tokenizer, token files, data.json) unless it is there; returns what was found in the text."""
    saved = read_record(folder)
    streaming = _is_streamed(config.data, saved)
    if streaming and config.data.is_supervised:
        check_exists(str(config.data.path), "data.path")
        key = "response_key" if config.data.messages_key is None else "messages_key"
        raise UserError(
            f"data.{key}={getattr(config.data, key)} with streamed data.path={config.data.path}; supervised data "
            "is not streamed: set data.streaming=false"
        )
    settings = _settings(config, streaming)
    notes: list[str] = []
    if saved is not None:
        valid, notes = still_valid(config, folder, saved, settings)
        if valid:
            places = {key: saved.settings.get(key) for key in KEYS}
            return TokenRecord({**settings, **places}, saved.found, saved.text, [*_reads(saved.text), *notes])
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    training, validation, held_out_below = _documents(config.data, streaming)
    text = sources(config.data, {}, sampled=streaming)
    prepare_tokenizer(config.data, lambda: _texts_of(training()), scratch / "tokenizer")
    tokenizer = read_pretrained(AutoTokenizer, scratch / "tokenizer")
    encoder = Encoder(config.data, tokenizer)
    supervised = config.data.is_supervised
    dtype = "int32" if supervised or config.data.separates else "uint16" if len(tokenizer) <= 2**16 else "uint32"
    hasher = hashlib.sha1(usedforsecurity=False)
    seen: Counter[str] = Counter()

    def write(name: str, documents: Iterator[Document], limit: int | None = None) -> int:
        sequences = _encoded(encoder, show_progress(documents, f"tokenizing {name} text", "documents"))
        if supervised:
            sequences = lay_out(sequences, config.seq_len, tokenizer.eos_token_id, seen)
        return _write(scratch / f"{name}.bin", sequences, dtype, hasher, limit)

    wanted = config.evaluation.tokens
    if supervised:
        wanted -= wanted % config.seq_len  # whole rows
    found: dict[str, Any] = {"dtype": dtype, "vocab_size": len(tokenizer), "held_out_below": held_out_below}
    found["adds_bos"] = encoder.adds_bos
    found["validation_tokens"] = write("validation", validation(), wanted + 1)
    if not streaming:
        found["train_tokens"] = write("train", training())
    found["sha1"] = hasher.hexdigest()
    if supervised:
        found["examples_cut"], found["examples_left_out"] = seen["cut"], seen["left_out"]
    found["documents_with_split_names"] = encoder.seen["split"]
    _check_found(config, found)
    for key, source in sources(config.data, text, sampled=streaming).items():
        if difference(text[key], source):
            raise UserError(f"{key} changed while it was tokenized; run again when it is complete")
    record = TokenRecord(settings, found, text)
    record.write(scratch)
    write_checksums(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return replace(record, notes=[*_reads(text), *notes])


def _reads(text: dict[str, Any]) -> list[str]:
    return [line for key in ("data.path", "data.validation") for line in describe_source(key, text.get(key, {}))]


def _check_found(config: Config, found: dict[str, Any]) -> None:
    fraction = config.data.validation_fraction
    held_out = f"give some with data.validation, or raise data.validation_fraction={fraction}"
    if config.data.is_supervised:
        for name, more in (("train", "give more data with data.path"), ("validation", held_out)):
            if found[f"{name}_tokens"] == 0:
                raise UserError(
                    f"there is no {name} example whose response starts within seq_len={config.seq_len} tokens; raise "
                    f"seq_len, {more}"
                )
    if found["validation_tokens"] < 2:
        raise UserError(f"there is no held-out text; {held_out}")


def _documents(config: DataConfig, streaming: bool) -> tuple[_Opener, _Opener, float]:
    """Openers of the training and of the held-out text, and the lot below which a document is held out."""

    def everything() -> Iterator[Document]:
        if config.path is None:
            return embedded_documents()
        if streaming or not Path(config.path).exists():
            return _of_rows(config, open_stream(config, "train").rows, f"data.path={config.path}")
        return _local(config, config.path, "data.path", without=config.validation, training=True)

    if config.validation is None:
        limit = _held_out_below(config, everything, streaming)
        return (
            lambda: (text for text in everything() if lot(text) >= limit),
            lambda: (text for text in everything() if lot(text) < limit),
            limit,
        )

    def validation() -> Iterator[Document]:
        assert config.validation is not None
        if config.path is None or Path(config.path).exists() or Path(config.validation).exists():
            if not Path(config.validation).exists():
                raise UserError(
                    f"data.validation={config.validation} does not exist; expected a file or folder of text"
                )
            return _local(config, config.validation, "data.validation")
        return _of_rows(config, open_stream(config, config.validation).rows, f"data.validation={config.validation}")

    def training() -> Iterator[Document]:
        copies = set() if streaming else {lot(text) for text in validation()}
        return (text for text in everything() if lot(text) not in copies)

    return training, validation, 0.0


def _local(config: DataConfig, path: str, key: str, **which: Any) -> Iterator[Document]:
    if config.is_supervised:
        return _of_rows(config, local_rows(path, columns_of(config), key, **which), f"{key}={path}")
    return local_documents(path, config.text_key, key, **which)


def _of_rows(config: DataConfig, rows: Any, where: str) -> Iterator[Document]:
    if config.prompt_key is not None and config.response_key is not None:
        return examples(rows, config.prompt_key, config.response_key, where)
    if config.messages_key is not None:
        return chats(rows, config.messages_key, where)
    return texts(rows, config.text_key, where)


def _texts_of(documents: Iterable[Document]) -> Iterator[str]:
    """All that a tokenizer must know."""
    for document in documents:
        if isinstance(document, Chat):
            yield from (message["content"] for message in document.messages)
        else:
            yield from [document] if isinstance(document, str) else document


def _held_out_below(config: DataConfig, everything: _Opener, streaming: bool) -> float:
    """The share of documents to hold out, raised where it would hold out none of a small text."""
    share = config.validation_fraction
    if streaming or share == 0:
        return share
    smallest, documents = 1.0, 0
    for text in everything():
        smallest, documents = min(smallest, lot(text)), documents + 1
        if smallest < share:
            return share
    if documents < 2:
        raise UserError(
            f"data.path={config.path} has {documents} document(s), of which none can be held out; give more text, or "
            "held-out text with data.validation"
        )
    return math.nextafter(smallest, 1.0)


def _absolute(path: str | None) -> str | None:
    """The same name for the same place, from whichever folder the run is resumed."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _is_streamed(config: DataConfig, saved: TokenRecord | None) -> bool:
    if config.streaming is not None and config.path is not None:
        return config.streaming
    if saved is not None and is_gone("data.path", config, saved):
        return saved.streaming
    return config.path is not None and not Path(config.path).exists()


def _write(file: Path, sequences: Iterable[list[int]], dtype: str, hasher: Any, limit: int | None = None) -> int:
    """Write all tokens (or ``limit`` of them) into a new file; returns how many."""
    total = 0
    with file.open("wb") as out:
        for ids in sequences:
            data = np.asarray(ids if limit is None else ids[: limit - total], dtype=dtype).tobytes()
            out.write(data)
            hasher.update(data)
            total += len(data) // np.dtype(dtype).itemsize
            if limit is not None and total >= limit:
                break
    return total


def _encoded(encoder: Encoder, documents: Iterable[Document]) -> Iterator[list[int]]:
    """Stored tokens of each document."""
    for batch in _batched(documents):
        yield from encoder(batch)


def _batched(documents: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_OF_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _open(file: Path, dtype: str, tokens: int, vocabulary: int) -> np.ndarray[Any, Any]:
    """The token file (tokens,); raises UserError if it is not as it was written, or not for this many tokens."""
    expected = tokens * np.dtype(dtype).itemsize
    size = file.stat().st_size if file.exists() else 0
    remedy = REMEDY.format(folder=file.parent)
    if size != expected:
        raise UserError(f"{file} is damaged: it has {size} bytes; expected {expected}; {remedy}")
    stored = np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
    if not has_checksums(file.parent) and (largest := largest_id(stored)) >= vocabulary:
        raise UserError(
            f"{file} is damaged: it holds the token {largest}; expected less than the {vocabulary} entries of its "
            f"tokenizer; {remedy}"
        )
    return stored


def _validation_blocks(tokens: np.ndarray[Any, Any], config: Config) -> Tensor:
    """The first ``evaluation.tokens`` held-out tokens as labels of packed blocks (n, seq_len + 1)."""
    count = min(config.evaluation.tokens, len(tokens) - 1)
    rows = -(-count // config.seq_len)
    flat = torch.full((rows * config.seq_len + 1,), IGNORED, dtype=torch.int64)
    flat[: count + 1] = torch.from_numpy(tokens[: count + 1].astype(np.int64))
    return flat.unfold(0, config.seq_len + 1, config.seq_len).clone()
