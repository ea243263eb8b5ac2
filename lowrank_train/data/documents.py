"""Documents: where text comes from, before tokens."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_train.common.errors import UserError, type_and_line
from lowrank_train.config.schema import DataConfig
from lowrank_train.files.pretrained import hub_answers
from lowrank_train.text.chat import COLUMNS, Chat, chats_of
from lowrank_train.text.files import find_files
from lowrank_train.text.rows import PLACE, kind_of, rows

__all__ = [
    "Document",
    "Example",
    "Stream",
    "chats",
    "check_exists",
    "columns_of",
    "embedded_documents",
    "examples",
    "local_documents",
    "local_rows",
    "lot",
    "open_stream",
    "texts",
]

_PIECE_CHARACTERS = 20_000

_NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip"}


class Example(NamedTuple):
    """A document of which only a part is to be learned."""

    prompt: str
    """May be empty."""
    response: str

    @property
    def content(self) -> str:
        """All of its text."""
        return self.prompt + self.response


Document = str | Example | Chat
"""Plain text, or text of which only a part is to be learned; of one kind in a run."""


class Stream(NamedTuple):
    """Rows that are read while training."""

    rows: Any
    """A ``datasets.IterableDataset``."""
    revision: str | None
    """Commit of a dataset on the hub; None for local files."""


def lot(document: Document) -> float:
    """Hash the content of a document to a number in [0, 1): equal documents have equal numbers."""
    content = document if isinstance(document, str) else document.content
    digest = hashlib.sha1(content.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def embedded_documents() -> Iterator[str]:
    """Return real text found on any machine: the sources and the documentation topics of Python's standard library.

    Its content depends on the Python version. Raises UserError where the sources were stripped from the installation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not _NOT_PROSE.intersection(f.relative_to(root).parts))
    if len(files) < 100:
        raise UserError(f"this Python has no library sources under {root}; set data.path to text of your own")
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    yield from (topics[key] for key in sorted(topics))


def columns_of(config: DataConfig) -> dict[str, str]:
    """Return the columns that are read -> the key of the configuration that names each."""
    if config.prompt_key is not None and config.response_key is not None:
        return {config.prompt_key: "data.prompt_key", config.response_key: "data.response_key"}
    if config.messages_key is not None:
        return {config.messages_key: "data.messages_key"}
    return {config.text_key: "data.text_key"}


def local_documents(
    path: str, text_key: str, key: str = "data.path", without: str | None = None, *, training: bool = False
) -> Iterator[str]:
    """Yield the documents of a file, or of all readable files in a folder, in the order of their names.

    Args:
        path: a file or folder; see ``find_files``.
        text_key: column that holds the text.
        key: of the configuration that gave the path, for messages.
        without: a file or folder (of held-out text) whose files are not read.
        training: leave out files whose names say that they are held-out text.

    Raises:
        UserError: there is nothing readable, mixed kinds, a file that cannot be parsed, or no such column.
    """
    files = find_files(path, key, without=without, training=training).files
    whole_files = kind_of(files[0]) == "text"
    for text in texts(_rows_of_files(files, {text_key: "data.text_key"}), text_key, f"{key}={path}"):
        yield from _pieces(text) if whole_files else [text]


def local_rows(
    path: str, columns: Mapping[str, str], key: str = "data.path", without: str | None = None, *, training: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows of files as ``local_documents`` finds them, with the chosen columns; see ``text_rows.rows``."""
    return _rows_of_files(find_files(path, key, without=without, training=training).files, columns)


def open_stream(config: DataConfig, split: str, revision: str | None = None) -> Stream:
    """Open local files, or a split of a Hugging Face dataset by name, without reading them.

    Args:
        config: where text comes from.
        split: of a dataset on the hub, e.g. train, or test+validation.
        revision: commit of the dataset on the hub; None: the newest.

    Raises:
        UserError: the dataset, its configuration or its split cannot be opened.
    """
    assert config.path is not None
    columns = columns_of(config)
    if Path(config.path).exists():
        found = find_files(config.path, "data.path", without=config.validation, training=True)
        return Stream(_streamed(found.files, columns), None)
    check_exists(config.path, "data.path")
    import datasets  # slow to import, and not needed for the embedded text

    datasets.disable_progress_bars()
    if not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
    try:
        builder = datasets.load_dataset_builder(config.path, config.name, revision=revision)
        files = _files_of_split(builder.config, split)
        rows = _streamed(files, columns) if files else builder.as_streaming_dataset(split=split)
        return Stream(rows, builder.hash)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        name = f" data.name={config.name}" if config.name else ""
        raise UserError(
            f"cannot open data.path={config.path}{name} (split {split}): it is neither a local path nor a Hugging Face "
            f"dataset that can be reached ({type_and_line(error)})"
        ) from None


def check_exists(name: str, key: str) -> None:
    """Raise UserError for a name that was meant as a path and leads nowhere, before a hub is asked for it."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or kind_of(Path(name)) is not None
    if is_path and not Path(name).exists():
        raise UserError(f"{key}={name} does not exist; expected a file, a folder, or a name on the Hugging Face hub")


def _files_of_split(config: Any, split: str) -> list[str]:
    """Return the URLs of a dataset's files if ``text_rows.rows`` reads them as the dataset's configuration says.

    The list is empty for other kinds of files, for plain text, of which ``datasets`` makes a row of each line, and for
    settings such as ``field``, which only ``datasets`` knows.
    """
    import datasets  # as above

    usual = type(config)(**{field.name: getattr(config, field.name) for field in fields(datasets.BuilderConfig)})
    splits = {str(name): list(files) for name, files in (config.data_files or {}).items()}
    names = split.split("+")
    if config != usual or not splits.keys() >= set(names):
        return []
    found = [file for name in names for file in splits[name]]
    return found if all(kind_of(file) in ("json", "parquet", "arrow") for file in found) else []


def _streamed(files: Sequence[Path | str], columns: Mapping[str, str]) -> Any:
    import datasets  # as above

    return datasets.IterableDataset.from_generator(
        _rows_of_files, gen_kwargs={"files": list(files), "columns": dict(columns)}
    )


def _rows_of_files(files: Sequence[Path | str], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from rows(file, columns)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at line ends, so that a part of a single file can be held out."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def texts(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[str]:
    """Yield the text of each row, without rows that have none. Raises UserError for rows that cannot be read."""
    for row in _read(rows, where):
        text = _text(row, column, where, "data.text_key")
        if text:
            yield text


def examples(rows: Iterable[dict[str, Any]], prompt_column: str, response_column: str, where: str) -> Iterator[Example]:
    """Yield the example of each row, without rows that have no response.

    Raises UserError for rows that cannot be read.
    """
    for row in _read(rows, where):
        prompt = _text(row, prompt_column, where, "data.prompt_key")
        response = _text(row, response_column, where, "data.response_key")
        if response:
            yield Example(prompt, response)


def chats(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[Chat]:
    """Yield the chat of each row, without rows that have no messages. Raises UserError for rows that cannot be read."""
    return chats_of(_read(rows, where), column, where)


def _read(rows: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except UserError as error:  # of our own readers, which say where in a file
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # of the readers of datasets, and of the network
            raise UserError(f"cannot read {where}: {type_and_line(error)}") from None
        yield row


def _text(row: dict[str, Any], column: str, where: str, key: str) -> str:
    """Return what a row holds in a column, "" for null."""
    place = f"{where}: {row[PLACE]}" if PLACE in row else where
    text = row.get(column, "")
    if column not in row or not isinstance(text, str | None):
        got = "nothing" if column not in row else type(text).__name__
        others = ", ".join(name for name in row if name != PLACE)
        hint = f"set {key} to a column of text" if PLACE in row else f"set {key} to one of {others}"
        found = next((name for name in COLUMNS if isinstance(row.get(name), list)), None)
        hint = f"for chats set data.messages_key={found} data.streaming=false" if found else hint
        raise UserError(f"{place}: column {column!r} holds {got}; {hint}")
    if text and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: column {column!r} holds half a character at position {error.start} (a surrogate without "
                "its pair); repair the row or leave it out"
            ) from None
    return text or ""
