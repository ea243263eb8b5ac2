"""Blocks of tokens for training: deterministic, disjoint between ranks, resumable at any position on any ranks.

Step t of a run uses the same blocks whatever the number of ranks; rank r of W takes its share of them.

* ``TokenFile``: text tokenized once; blocks come in a fresh random order every epoch, and the position is one number.
* ``TokenStream``: text tokenized on the fly, for data sets that do not fit. The stream is split into a fixed number of
  sub-streams, dealt to the ranks; the position is that of every sub-stream and what it has read ahead.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import Config
from lowrank_train.data.documents import lot, open_stream, texts
from lowrank_train.data.encoding import Encoder

__all__ = ["TokenFile", "TokenStream", "TrainingBlocks"]


class TrainingBlocks(Protocol):
    """The source of training blocks."""

    def take(self, count: int, rank: int, world_size: int) -> Tensor:
        """Return this rank's share (count / world_size, seq_len + 1) int64 of the next ``count`` blocks of the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values; sub-streams of other ranks are not in it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""


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
        """Return blocks as ``TrainingBlocks.take`` says."""
        share = count // world_size
        first = self.position + rank * share
        self.position += count
        return torch.stack([self._block(k) for k in range(first, first + share)])

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the file."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
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

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, held_out_below: float) -> None:
        self.config, self.tokenizer, self.held_out_below = config, tokenizer, held_out_below
        self.position = 0
        self._share = (0, 1)  # rank and world size of the last take
        self._states: dict[str, str] = {}
        self._streams: dict[int, _SubStream] = {}

    def take(self, count: int, rank: int, world_size: int) -> Tensor:
        """Return blocks as ``TrainingBlocks.take`` says."""
        streams = self.config.data.streams
        mine = [k % streams for k in range(self.position, self.position + count) if k % streams % world_size == rank]
        self.position += count
        self._share = (rank, world_size)
        return torch.stack([self._stream(index).next_block() for index in mine])

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        rank, world_size = self._share
        mine = {f"stream_{i}" for i in range(rank, self.config.data.streams, world_size)}
        unread = {key: value for key, value in self._states.items() if key in mine}  # since the last load
        return {"position": self.position, **unread, **{f"stream_{i}": s.state() for i, s in self._streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self.position = state["position"]
        self._streams = {}
        self._states = {key: value for key, value in state.items() if key.startswith("stream_")}

    def _stream(self, index: int) -> _SubStream:
        if index not in self._streams:
            saved = self._states.get(f"stream_{index}")
            self._streams[index] = _SubStream(self.config, self.tokenizer, self.held_out_below, index, saved)
        return self._streams[index]


class _SubStream:
    """One part of a streamed dataset and the tokens read ahead of its last block."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, held_out_below: float, index: int, saved: str | None
    ) -> None:
        self.config, self.tokenizer, self.held_out_below, self.index = config, tokenizer, held_out_below, index
        state = {"rows": None, "ahead": []} if saved is None else json.loads(saved)
        self.ahead: list[int] = state["ahead"]
        self.revision: str | None = state.get("revision")
        self.encoder = Encoder(config.data, tokenizer)
        self._open(state["rows"])

    def next_block(self) -> Tensor:
        size = self.config.seq_len
        while len(self.ahead) < size + 1:
            self.ahead += self.encoder([self._next_document()])[0]
        block, self.ahead = self.ahead[: size + 1], self.ahead[size:]
        return torch.tensor(block)

    def state(self) -> str:
        # rows that were not read yet do not know where they will start
        rows = self.rows.state_dict() if self.reading else self.start
        return json.dumps({"rows": rows, "ahead": self.ahead, "revision": self.revision})

    def _open(self, start: dict[str, Any] | None) -> None:
        from datasets.distributed import split_dataset_by_node

        data = self.config.data
        stream = open_stream(data, "train", self.revision)
        self.revision = stream.revision
        self.rows = split_dataset_by_node(stream.rows, rank=self.index, world_size=data.streams)
        if start is not None:
            by_tables = ['"ArrowExamplesIterable"' in json.dumps(state) for state in (start, self.rows.state_dict())]
            if by_tables == [True, False]:
                raise UserError(
                    f"the position in data.path={data.path} was written by an earlier version, which counted rows of "
                    "streamed files in another way; resume with that version, or start in another run_dir"
                )
            self.rows.load_state_dict(start)
        self.start, self.reading = start, False
        self.documents = texts(self.rows, data.text_key, f"data.path={data.path}")

    def _next_document(self) -> str:
        for _ in range(2):  # to the end, then once from the start
            for text in self.documents:
                self.reading = True
                if lot(text) >= self.held_out_below:
                    return text
            self._open(None)  # rows that were given a position start there again, not at the beginning
        raise UserError(
            f"one of data.streams={self.config.data.streams} parts of data.path={self.config.data.path} has no "
            "document; lower data.streams"
        )
