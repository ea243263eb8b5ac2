"""Tokens for training: packed, deterministic, disjoint between ranks, and resumable at any position on any ranks.

Text is a stream of documents, each closed by the end-of-text token, cut into blocks of ``seq_len + 1`` tokens (the
last one is only a label). Step t of a run uses the same blocks whatever the number of ranks; rank r of W takes its
share of them. Two sources give blocks:

* ``TokenFile``: text tokenized once into the run folder; blocks come in a fresh random order every epoch, and the
  position is one number.
* ``TokenStream``: text tokenized on the fly, for data sets that do not fit. The stream is split into a fixed number of
  sub-streams, dealt to the ranks; the position is that of every sub-stream and what it has read ahead.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_train.config import Config, DataConfig
from lowrank_train.errors import UserError
from lowrank_train.loss import IGNORED
from lowrank_train.parallel import Ranks
from lowrank_train.text import embedded_documents, is_held_out, local_documents, open_stream, texts
from lowrank_train.tokenizer import encode, prepare_tokenizer

__all__ = ["Data", "TokenFile", "TokenStream", "TrainingBlocks", "prepare_data"]

_BATCH_OF_DOCUMENTS = 64  # tokenized at one time; larger batches only hold more memory


class TrainingBlocks(Protocol):
    """Where training blocks come from."""

    def take(self, count: int, rank: int, world_size: int) -> Tensor:
        """This rank's share (count / world_size, seq_len + 1) int64 of the next ``count`` blocks of the run."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values; sub-streams of other ranks are not in it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""


@dataclass(frozen=True)
class Data:
    """All a run reads."""

    tokenizer: PreTrainedTokenizerBase
    train: TrainingBlocks
    validation: Tensor
    """Blocks (n, seq_len + 1) int64; a last block that is not full is padded with ``IGNORED``."""
    description: dict[str, Any]
    """What the text is and how it is cut: equal for runs that read the same data, kept in checkpoints."""


def prepare_data(config: Config, ranks: Ranks, folder: Path) -> Data:
    """Tokenize on the first rank into ``folder`` (once), then open on all.

    Raises:
        UserError: text that cannot be read, is empty or too short; ``folder`` holds other data; streams that do not
            divide by the ranks.
    """
    streaming = _is_streamed(config.data)
    description: dict[str, Any] = {
        "path": _absolute(config.data.path) or "embedded",
        "name": config.data.name,
        "validation": _absolute(config.data.validation),
        "tokenizer": _absolute(config.data.tokenizer) or f"bpe-{config.data.vocab_size}",
        "seq_len": config.seq_len,
        "evaluation_tokens": config.evaluation.tokens,
        "seed": config.seed,
        "streams": config.data.streams if streaming else None,
    }

    def write() -> dict[str, Any]:
        try:
            return _write_tokens(config, folder, description, streaming)
        except OSError as error:
            raise UserError(f"cannot write tokens to {folder}: {error}; free space, or set run_dir elsewhere") from None

    found = ranks.first(write)
    description.update(found)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train: TrainingBlocks
    if streaming:
        if config.data.streams % ranks.world_size:
            raise UserError(
                f"data.streams={config.data.streams} does not divide by the world size {ranks.world_size}; "
                f"set it to a multiple, e.g. {ranks.world_size * max(1, round(8 / ranks.world_size))}"
            )
        train = TokenStream(config, tokenizer, _held_out_fraction(config.data))
    else:
        train = TokenFile(_open(folder / "train.bin", description["dtype"]), config.seq_len, config.seed)
    held_out = _open(folder / "validation.bin", description["dtype"])
    return Data(tokenizer, train, _validation_blocks(held_out, config), description)


class TokenFile:
    """Blocks of a token array, in a random order that is new every epoch and the same on every rank.

    Args:
        tokens: (n,) token ids.
        seq_len: tokens per block, its last label aside.
        seed: of the order.

    Raises:
        UserError: fewer tokens than one block.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.blocks = (len(tokens) - 1) // seq_len
        if self.blocks < 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens; expected at least seq_len + 1 = {seq_len + 1}: give more "
                "text with data.path, or a smaller seq_len"
            )
        self.position = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, count: int, rank: int, world_size: int) -> Tensor:
        """See ``TrainingBlocks``."""
        share = count // world_size
        first = self.position + rank * share
        self.position += count
        return torch.stack([self._block(k) for k in range(first, first + share)])

    def state_dict(self) -> dict[str, Any]:
        """See ``TrainingBlocks``."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``TrainingBlocks``."""
        self.position = state["position"]

    def _block(self, k: int) -> Tensor:
        epoch, index = divmod(k, self.blocks)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.blocks, generator=generator)
        start = int(self._order[index]) * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))


class TokenStream:
    """Blocks of a streamed dataset: block k of the run comes from sub-stream k modulo ``data.streams``.

    Each sub-stream reads its own files where there are enough of them, else its own documents, and starts again at
    the end. A rank opens only the sub-streams it is asked for.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, held_out_fraction: float) -> None:
        self.config, self.tokenizer, self.held_out_fraction = config, tokenizer, held_out_fraction
        self.position = 0
        self._share = (0, 1)  # rank and world size of the last take
        self._states: dict[str, str] = {}
        self._streams: dict[int, _SubStream] = {}

    def take(self, count: int, rank: int, world_size: int) -> Tensor:
        """See ``TrainingBlocks``."""
        streams = self.config.data.streams
        mine = [k % streams for k in range(self.position, self.position + count) if k % streams % world_size == rank]
        if len(mine) != count // world_size:
            raise UserError(
                f"a step of {count} sequences does not divide over data.streams={streams}; "
                "set data.streams to a divisor of tokens_per_step / seq_len"
            )
        self.position += count
        self._share = (rank, world_size)
        return torch.stack([self._stream(index).next_block() for index in mine])

    def state_dict(self) -> dict[str, Any]:
        """See ``TrainingBlocks``."""
        rank, world_size = self._share
        mine = {f"stream_{i}" for i in range(rank, self.config.data.streams, world_size)}
        unread = {key: value for key, value in self._states.items() if key in mine}  # since the last load
        return {"position": self.position, **unread, **{f"stream_{i}": s.state() for i, s in self._streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``TrainingBlocks``."""
        self.position = state["position"]
        self._streams = {}
        self._states = {key: value for key, value in state.items() if key.startswith("stream_")}

    def _stream(self, index: int) -> _SubStream:
        if index not in self._streams:
            saved = self._states.get(f"stream_{index}")
            self._streams[index] = _SubStream(self.config, self.tokenizer, self.held_out_fraction, index, saved)
        return self._streams[index]


class _SubStream:
    """One part of a streamed dataset and the tokens read ahead of its last block."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, held_out: float, index: int, saved: str | None
    ) -> None:
        self.config, self.tokenizer, self.held_out, self.index = config, tokenizer, held_out, index
        state = {"rows": None, "ahead": []} if saved is None else json.loads(saved)
        self.ahead: list[int] = state["ahead"]
        self._open(state["rows"])

    def next_block(self) -> Tensor:
        size = self.config.seq_len
        while len(self.ahead) < size + 1:
            self.ahead += encode(self.tokenizer, [self._next_document()])[0]
        block, self.ahead = self.ahead[: size + 1], self.ahead[size:]
        return torch.tensor(block)

    def state(self) -> str:
        # rows that were not read yet do not know where they will start
        return json.dumps({"rows": self.rows.state_dict() if self.reading else self.start, "ahead": self.ahead})

    def _open(self, start: dict[str, Any] | None) -> None:
        from datasets.distributed import split_dataset_by_node

        data = self.config.data
        self.rows = split_dataset_by_node(open_stream(data, "train"), rank=self.index, world_size=data.streams)
        if start is not None:
            self.rows.load_state_dict(start)
        self.start, self.reading = start, False
        self.documents = texts(self.rows, data.text_key, str(data.path))

    def _next_document(self) -> str:
        for _ in range(2):  # to the end, then once from the start
            for text in self.documents:
                self.reading = True
                if text and not is_held_out(text, self.held_out):
                    return text
            self._open(None)  # rows that were given a position start there again, not at the beginning
        raise UserError(
            f"one of data.streams={self.config.data.streams} parts of data.path={self.config.data.path} has no "
            "document; lower data.streams"
        )


# ------------------------------------------------------------------------------------------------- writing token files


def _write_tokens(config: Config, folder: Path, description: dict[str, Any], streaming: bool) -> dict[str, Any]:
    """Make ``folder`` (tokenizer, token files, data.json) unless it is there; returns what was found in the text."""
    record = folder / "data.json"
    if record.exists():
        saved: dict[str, Any] = json.loads(record.read_text())
        other = [key for key, value in description.items() if saved["settings"].get(key) != value]
        if other:
            raise UserError(
                f"{folder.parent} holds a run on other data: {other[0]} was {saved['settings'].get(other[0])!r}, is "
                f"{description[other[0]]!r}; set run_dir to another folder"
            )
        return dict(saved["found"])
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    training, validation = _documents(config.data, streaming)
    prepare_tokenizer(config.data, training, scratch / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(scratch / "tokenizer")
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    hasher = hashlib.sha1(usedforsecurity=False)
    wanted = config.evaluation.tokens + 1
    found: dict[str, Any] = {"dtype": dtype, "vocab_size": len(tokenizer)}
    found["validation_tokens"] = _write(scratch / "validation.bin", tokenizer, validation(), dtype, hasher, wanted)
    if not streaming:
        found["train_tokens"] = _write(scratch / "train.bin", tokenizer, training(), dtype, hasher)
    found["sha1"] = hasher.hexdigest()
    if found["validation_tokens"] < 2:
        raise UserError(
            "there is no held-out text; give some with data.validation, or raise "
            f"data.validation_fraction={config.data.validation_fraction}"
        )
    (scratch / "data.json").write_text(json.dumps({"settings": description, "found": found}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return found


def _documents(config: DataConfig, streaming: bool) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
    """Openers of the training and of the held-out text."""
    fraction = _held_out_fraction(config)

    def everything() -> Iterator[str]:
        if config.path is None:
            return embedded_documents()
        if not streaming:
            return local_documents(config.path, config.text_key)
        return texts(open_stream(config, "train"), config.text_key, str(config.path))

    def training() -> Iterator[str]:
        return (text for text in everything() if text and not is_held_out(text, fraction))

    def validation() -> Iterator[str]:
        if config.validation is None:
            return (text for text in everything() if text and is_held_out(text, fraction))
        if Path(config.validation).exists():
            return local_documents(config.validation, config.text_key)
        if config.path is None or Path(config.path).exists():
            raise UserError(f"data.validation={config.validation} does not exist; expected a file or folder of text")
        return texts(open_stream(config, config.validation), config.text_key, str(config.path))

    return training, validation


def _held_out_fraction(config: DataConfig) -> float:
    return config.validation_fraction if config.validation is None else 0.0


def _absolute(path: str | None) -> str | None:
    """The same name for the same place, from whichever folder the run is resumed."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _is_streamed(config: DataConfig) -> bool:
    if config.streaming is not None and config.path is not None:
        return config.streaming
    return config.path is not None and not Path(config.path).exists()


def _write(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    dtype: str,
    hasher: Any,
    limit: int | None = None,
) -> int:
    """Append token ids of all documents (or until ``limit`` tokens) to a file; returns how many."""
    total = 0
    with file.open("wb") as out:
        for batch in _batched(documents):
            for ids in encode(tokenizer, batch):
                data = np.asarray(ids if limit is None else ids[: limit - total], dtype=dtype).tobytes()
                out.write(data)
                hasher.update(data)
                total += len(data) // np.dtype(dtype).itemsize
            if limit is not None and total >= limit:
                break
    return total


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_OF_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _open(file: Path, dtype: str) -> np.ndarray[Any, Any]:
    if file.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r")


def _validation_blocks(tokens: np.ndarray[Any, Any], config: Config) -> Tensor:
    """The first ``evaluation.tokens`` held-out tokens as labels of packed blocks (n, seq_len + 1)."""
    count = min(config.evaluation.tokens, len(tokens) - 1)
    rows = -(-count // config.seq_len)
    flat = torch.full((rows * config.seq_len + 1,), IGNORED, dtype=torch.int64)
    flat[: count + 1] = torch.from_numpy(tokens[: count + 1].astype(np.int64))
    return flat.unfold(0, config.seq_len + 1, config.seq_len).clone()
