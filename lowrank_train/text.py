"""Documents: where text comes from, before tokens."""

from __future__ import annotations

import glob
import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_train.config import DataConfig
from lowrank_train.errors import UserError

__all__ = [
    "Example",
    "check_exists",
    "embedded_documents",
    "examples",
    "local_documents",
    "local_examples",
    "lot",
    "open_stream",
    "texts",
]

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
    ".rst": ("text", {"sample_by": "document"}),
    ".py": ("text", {"sample_by": "document"}),
}
"""File suffix -> builder of ``datasets`` and its arguments."""

_PIECE_CHARACTERS = 20_000

_NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip"}


class Example(NamedTuple):
    """A document of which only a part is to be learned."""

    prompt: str
    """May be empty."""
    response: str


def lot(document: str | Example) -> float:
    """A number in [0, 1) drawn from a document's content: equal documents draw the same."""
    content = document if isinstance(document, str) else document.prompt + document.response
    digest = hashlib.sha1(content.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def embedded_documents() -> Iterator[str]:
    """Real text found on any machine: the standard library's sources and the documentation topics of Python.

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


def local_documents(path: str, text_key: str, key: str = "data.path", without: str | None = None) -> Iterator[str]:
    """Documents of a file, or of all readable files in a folder, in the order of their names.

    Args:
        path: a file or folder; what lies in hidden files and folders is left out.
        text_key: column that holds the text.
        key: of the configuration that gave the path, for messages.
        without: a file or folder (of held-out text) whose files are left out.

    Raises:
        UserError: nothing readable, mixed kinds, a file that cannot be parsed, or no such column.
    """
    whole_files = _READERS[_files(path, key, without)[0].suffix.lower()][0] == "text"
    for text in texts(_load_local(path, key, without), text_key, f"{key}={path}"):
        yield from _pieces(text) if whole_files else [text]


def local_examples(
    path: str, prompt_key: str, response_key: str, key: str = "data.path", without: str | None = None
) -> Iterator[Example]:
    """As ``local_documents``, of two columns."""
    return examples(_load_local(path, key, without), prompt_key, response_key, f"{key}={path}")


def open_stream(config: DataConfig, split: str) -> Any:
    """A streaming ``datasets.IterableDataset``: of local files, or a split of a Hugging Face dataset by name.

    Raises:
        UserError: the dataset, its configuration or its split cannot be opened.
    """
    assert config.path is not None
    if Path(config.path).exists():
        return _load_local(config.path, "data.path", config.validation)
    check_exists(config.path, "data.path")
    return _opened(
        lambda datasets: datasets.load_dataset(config.path, config.name, split=split, streaming=True),
        f"data.path={config.path}" + (f" data.name={config.name}" if config.name else "") + f" (split {split})",
        "it is neither a local path nor a Hugging Face dataset that can be reached",
    )


def check_exists(name: str, key: str) -> None:
    """Raise UserError for a name that was meant as a path and leads nowhere, before a hub is asked for it."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in _READERS
    if is_path and not Path(name).exists():
        raise UserError(f"{key}={name} does not exist; expected a file, a folder, or a name on the Hugging Face hub")


def _load_local(path: str, key: str, without: str | None) -> Any:
    files = _files(path, key, without)
    builder, arguments = _READERS[files[0].suffix.lower()]
    names = [glob.escape(str(f)) for f in files]
    return _opened(
        lambda datasets: datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **arguments),
        f"{key}={path}",
        "a file cannot be read",
    )


def _files(path: str, key: str, without: str | None = None) -> list[Path]:
    root = Path(path)
    held_out = (
        {f.resolve() for f in _files(without, "data.validation")} if without and Path(without).exists() else set()
    )
    if root.is_file():
        if root.suffix.lower() not in _READERS:
            raise UserError(
                f"{key}={path} is a {root.suffix or 'nameless'} file; expected one of {', '.join(_READERS)}"
            )
        files = [root]
    else:
        found = sorted(f for f in root.rglob("*") if f.is_file() and f.suffix.lower() in _READERS)
        files = [f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts)]
        records = [f for f in files if _READERS[f.suffix.lower()][0] != "text"]
        files = records or files  # a README beside data files is about them
    if not files:
        raise UserError(f"{key}={path} has no file to read; expected {', '.join(_READERS)}")
    kinds = {_READERS[f.suffix.lower()][0] for f in files}
    if len(kinds) > 1:
        raise UserError(f"{key}={path} mixes files of kinds {', '.join(sorted(kinds))}; keep one kind in a folder")
    files = [f for f in files if f.resolve() not in held_out]
    if not files:
        raise UserError(f"every file of {key}={path} is also in data.validation={without}; give different text")
    return files


def _pieces(text: str) -> Iterator[str]:
    """A long text cut at line ends, so that a part of a single file can be held out."""
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


def _opened(load: Callable[[Any], Any], what: str, reason: str) -> Any:
    import datasets  # slow to import, and not needed for the embedded text

    datasets.disable_progress_bars()
    try:
        return load(datasets)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise UserError(f"cannot open {what}: {reason} ({_first_line(error)})") from None


def texts(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[str]:
    """The text of each row, rows without any left out; raises UserError for rows that cannot be read."""
    for row in _read(rows, where):
        text = _text(row, column, where, "data.text_key")
        if text:
            yield text


def examples(rows: Iterable[dict[str, Any]], prompt_column: str, response_column: str, where: str) -> Iterator[Example]:
    """The example of each row, rows without a response left out; raises UserError for rows that cannot be read."""
    for row in _read(rows, where):
        prompt = _text(row, prompt_column, where, "data.prompt_key")
        response = _text(row, response_column, where, "data.response_key")
        if response:
            yield Example(prompt, response)


def _read(rows: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above: a damaged file is noticed while reading
            raise UserError(f"cannot read {where}: {_first_line(error)}") from None
        yield row


def _text(row: dict[str, Any], column: str, where: str, key: str) -> str:
    """What a row holds in a column, "" for null."""
    text = row.get(column, "")
    if column not in row or not isinstance(text, str | None):
        got = "nothing" if column not in row else type(text).__name__
        raise UserError(f"{where}: column {column!r} holds {got}; set {key} to one of {', '.join(row)}")
    return text or ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
