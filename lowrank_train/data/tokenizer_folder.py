"""Tokenizers of Hugging Face folders, and which package a folder needs to be read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lowrank_train.common.errors import UserError
from lowrank_train.files.pretrained import read_pretrained

__all__ = ["read_tokenizer"]

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE_FILES)
_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Module -> package that has it."""


def read_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder or of a name on the hub.

    Raises:
        UserError: the folder holds a SentencePiece model only, and a package that reads it is not installed; or the
            folder wants code of its own to be run.
        ValueError: the folder holds no file of a tokenizer.
        Exception: whatever the library raises.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it tells of every reader that it tries
    try:
        tokenizer: PreTrainedTokenizerBase = read_pretrained(AutoTokenizer, source)
    except UserError:
        raise
    except Exception:
        missing = _missing_packages(Path(source))
        if not missing:
            _check_holds_one(source)
            raise
        raise UserError(
            f"it has a SentencePiece model and no tokenizer.json, which needs: pip install {' '.join(missing)}"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    return tokenizer


def _missing_packages(folder: Path) -> list[str]:
    is_sentencepiece = any((folder / name).is_file() for name in _SENTENCEPIECE_FILES)
    if not is_sentencepiece or (folder / "tokenizer.json").is_file():
        return []
    return [package for module, package in _PACKAGES.items() if not _is_installed(module)]


def _check_holds_one(source: Path | str) -> None:
    """Say what the library does not: its own first line on an empty folder ends in a colon."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"the folder holds no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}") from None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
