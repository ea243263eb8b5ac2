"""The ``data`` section of a configuration: where text comes from, and how text becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_train.common.errors import UserError
from lowrank_train.config.settings import setting

__all__ = ["DataConfig", "check_data"]


@dataclass
class DataConfig:
    """The text of a run, and how it becomes tokens."""

    path: str | None = setting(
        None,
        "parquet, JSON, arrow or text file (.gz, .zst, .bz2, .xz too), a folder of them or of save_to_disk, or a "
        "Hugging Face dataset such as allenai/c4; null: the sources and documentation of the running Python",
        path=True,
    )
    name: str | None = setting(None, "configuration of a Hugging Face dataset, e.g. en")
    text_key: str = setting("text", "column that holds the text")
    prompt_key: str | None = setting(None, "column of prompts, which are read but not learned; null: plain text")
    response_key: str | None = setting(None, "column of responses, which are learned; null: plain text (data.text_key)")
    messages_key: str | None = setting(
        None,
        "column of chats (messages of role and content, or of from and value), of which the assistant's turns are "
        "learned; null: messages or conversations, where a local file has one of them and no data.text_key",
    )
    separate_documents: bool | None = setting(
        None,
        "attend only inside a document, whose positions start at 0; null: true for prompts and responses and for "
        "chats, false for plain text",
    )
    special_tokens: bool | None = setting(
        None,
        "read the names of special tokens in the text, such as <|im_start|>, as these tokens; null: true for prompts "
        "and responses, false for plain text, in which the names are split",
    )
    add_bos: bool | None = setting(
        None, "begin every document with the tokenizer's BOS token; null: as the tokenizer does by itself"
    )
    validation: str | None = setting(
        None,
        "file or folder of held-out text, or a split of the Hugging Face dataset; null: documents held out by hash",
        path=True,
    )
    validation_fraction: float = setting(
        0.02, "share of documents held out when data.validation is null", at_least=0, at_most=1
    )
    tokenizer: str | None = setting(
        None,
        "Hugging Face tokenizer, by name or folder; null: the model folder's, or a BPE trained on the text",
        path=True,
    )
    vocab_size: int = setting(32000, "entries of the trained BPE", at_least=257, at_most=10**7)
    streaming: bool | None = setting(
        None, "tokenize on the fly instead of once into the run folder; null: only for Hugging Face datasets"
    )
    streams: int = setting(
        8, "parallel streams of a streamed dataset; a multiple of the world size", at_least=1, at_most=10**5
    )
    folder: str | None = setting(
        None, "folder of the tokens, which runs on the same text share; null: in the run folder", path=True
    )

    @property
    def is_supervised(self) -> bool:
        """Whether only a part of each document is learned."""
        return self.response_key is not None or self.messages_key is not None

    @property
    def separates(self) -> bool:
        """Whether documents in one row are kept apart by positions and an attention mask."""
        return self.is_supervised if self.separate_documents is None else self.separate_documents

    @property
    def reads_special_tokens(self) -> bool:
        """Whether the names of special tokens in the text stand for these tokens."""
        return self.is_supervised if self.special_tokens is None else self.special_tokens


def check_data(data: DataConfig, seq_len: int, evaluation_tokens: int) -> None:
    """Raise UserError for keys of the section that contradict each other or the lengths of a run."""
    if (data.prompt_key is None) != (data.response_key is None):
        raise UserError(
            f"data.prompt_key={data.prompt_key} with data.response_key={data.response_key}; set both for prompts and "
            "responses, or neither for plain text"
        )
    if data.messages_key is not None:
        _check_chats(data)
    if not data.is_supervised:
        return
    key = "response_key" if data.response_key is not None else "messages_key"
    if data.path is None:
        raise UserError(
            f"data.path=null with data.{key}={getattr(data, key)}: the embedded text has no prompts and "
            "responses; set data.path to data that has, or the keys to null"
        )
    if evaluation_tokens < seq_len:
        raise UserError(
            f"evaluation.tokens={evaluation_tokens} with data.{key}={getattr(data, key)}; expected at "
            f"least one row of seq_len={seq_len} tokens: raise it"
        )


def _check_chats(data: DataConfig) -> None:
    if data.response_key is not None:
        raise UserError(
            f"data.messages_key={data.messages_key} with data.response_key={data.response_key}; set one of them to null"
        )
    for key in ("special_tokens", "add_bos"):
        if getattr(data, key) is not None:
            raise UserError(
                f"data.{key}={getattr(data, key)} with data.messages_key={data.messages_key}: the tokenizer's chat "
                f"template decides; leave data.{key} out"
            )
