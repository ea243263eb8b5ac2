"""Tokenizers: any of Hugging Face's, or a byte-level BPE trained once on the run's own text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.common.progress import show_progress
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.documents import check_exists
from lowrank_train.data.export_files import save_tokenizer
from lowrank_train.data.tokenizer_folder import read_tokenizer
from lowrank_train.files.json_files import read_mapping
from lowrank_train.text.long import ids_in_pieces, pieces

__all__ = ["bos_ids", "encode", "plain_ids", "prepare_tokenizer", "read_own_tokenizer"]

_END = "<|endoftext|>"
_TRAINING_CHARACTERS = 100_000_000  # enough for merges to settle; more only takes longer


def read_own_tokenizer(folder: Path, remedy: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer that ``prepare_tokenizer`` wrote.

    Args:
        folder: of the tokenizer.
        remedy: what to do about a damaged one, in the imperative.

    Raises:
        UserError: a file of it is gone, cut or empty, or it has no end-of-text token.
    """
    try:
        for name in ("tokenizer.json", "tokenizer_config.json"):  # of the latter, transformers would make one up
            if (folder / "tokenizer.json").exists() or name == "tokenizer_config.json":
                read_mapping(folder / name, remedy)
        tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder)
        readable = tokenizer.eos_token_id is not None and len(tokenizer) > 0
    except UserError:
        raise
    except Exception as error:  # the readers, some of them in Rust, raise many kinds
        reason = first_line(error)[:200]
        raise UserError(f"the tokenizer in {folder} is damaged ({reason}); {remedy}") from None
    if not readable:
        raise UserError(f"the tokenizer in {folder} is damaged (it has no end-of-text token); {remedy}")
    return tokenizer


def prepare_tokenizer(config: DataConfig, documents: Callable[[], Iterator[str]], folder: Path) -> None:
    """Write the run's tokenizer to ``folder``, unless it is there.

    Args:
        config: data.tokenizer names one; otherwise a BPE of data.vocab_size entries is trained.
        documents: training text (never held-out text).
        folder: of the run, so that a resumed run reads the same tokens.

    Raises:
        UserError: a tokenizer that cannot be loaded or has no end-of-text token; no text to train on; a full disk.
    """
    if folder.exists():
        return
    if config.tokenizer is None:
        tokenizer: PreTrainedTokenizerBase = _train_bpe(documents(), config.vocab_size)
    else:
        check_exists(config.tokenizer, "data.tokenizer")
        try:
            tokenizer = read_tokenizer(config.tokenizer)
        except Exception as error:  # the hub client and the readers raise many kinds
            reason = first_line(error)
            raise UserError(f"cannot load data.tokenizer={config.tokenizer}: {reason}") from None
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"data.tokenizer={config.tokenizer} has no end-of-text token; documents could not be told apart"
            )
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        save_tokenizer(tokenizer, scratch)
    except Exception as error:  # the writer in Rust raises an error of its own
        raise UserError(f"cannot write {folder}: {error}; free space, or set run_dir to another folder") from None
    scratch.rename(folder)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    *,
    special_tokens: bool = False,
    bos: bool | None = None,
) -> list[list[int]]:
    """Return the token ids of each document, closed by the end-of-text token.

    Args:
        tokenizer: with an end-of-text token.
        documents: plain text.
        special_tokens: whether names of special tokens in the text stand for these tokens; otherwise they are split, so
            that text can never produce the end of a document.
        bos: whether each document begins with the BOS token; None: as the tokenizer does by itself.
    """
    first = bos_ids(tokenizer, bos)
    return [[*first, *_closed(ids, tokenizer)] for ids in plain_ids(tokenizer, documents, special_tokens)]


def bos_ids(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> list[int]:
    """Return the BOS token in a list if every document begins with it, else an empty list.

    Args:
        tokenizer: asked what it does by itself.
        wanted: None: as the tokenizer does.

    Raises:
        UserError: it is wanted, and the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if wanted and bos is None:
        raise UserError("data.add_bos=true, but the tokenizer has no BOS token; leave data.add_bos out")
    if wanted is None and bos is not None:
        ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        wanted = ids[:1] == [bos] != plain[:1]
    return [bos] if wanted else []


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: bool) -> list[list[int]]:
    """Return the token ids of texts, to which nothing is added; arguments as for ``encode``.

    Long texts are read in pieces.
    """

    def encode_all(some: list[str]) -> list[list[int]]:
        batch = tokenizer(
            some,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=not special_tokens,
        )
        ids: list[list[int]] = batch["input_ids"]
        return ids

    return ids_in_pieces(encode_all, texts)


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _train_bpe(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    first = next(documents, None)
    if first is None:
        raise UserError("there is no training text for the tokenizer; check data.path")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        show_progress(
            _up_to(itertools.chain([first], documents), _TRAINING_CHARACTERS), "training the tokenizer", "documents"
        ),
        vocab_size=vocab_size,
        special_tokens=[_END],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=_END, bos_token=_END)


def _up_to(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield from pieces(document)  # byte-level BPE begins a new word at each cut
        characters -= len(document)
        if characters <= 0:
            return
