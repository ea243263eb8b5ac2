"""Documents: where text comes from, before tokens."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lowrank_train.config import DataConfig
from lowrank_train.errors import UserError

__all__ = ["embedded_documents", "is_held_out", "local_documents", "open_stream", "texts"]

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

_NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip"}


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out text, decided by its content: equal documents are never split."""
    digest = hashlib.sha1(document.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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


def local_documents(path: str, text_key: str) -> Iterator[str]:
    """Documents of a file, or of all readable files in a folder, in the order of their names.

    Raises:
        UserError: nothing readable, mixed kinds, a file that cannot be parsed, or no such column.
    """
    yield from texts(_load_local(path), text_key, path)


def open_stream(config: DataConfig, split: str) -> Any:
    """A streaming ``datasets.IterableDataset``: of local files, or a split of a Hugging Face dataset by name.

    Raises:
        UserError: the dataset, its configuration or its split cannot be opened.
    """
    assert config.path is not None
    if Path(config.path).exists():
        return _load_local(config.path)
    return _opened(
        lambda datasets: datasets.load_dataset(config.path, config.name, split=split, streaming=True),
        f"data.path={config.path}" + (f" data.name={config.name}" if config.name else "") + f" (split {split})",
        "it is neither a local path nor a Hugging Face dataset that can be reached",
    )


def _load_local(path: str) -> Any:
    files = _files(path)
    kinds = {_READERS[f.suffix.lower()][0] for f in files}
    if len(kinds) > 1:
        raise UserError(f"data.path={path} mixes files of kinds {', '.join(sorted(kinds))}; keep one kind in a folder")
    builder, arguments = _READERS[files[0].suffix.lower()]
    names = [str(f) for f in files]
    return _opened(
        lambda datasets: datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **arguments),
        f"data.path={path}",
        "a file cannot be read",
    )


def _files(path: str) -> list[Path]:
    root = Path(path)
    if root.is_file():
        if root.suffix.lower() not in _READERS:
            raise UserError(
                f"data.path={path} is a {root.suffix or 'nameless'} file; expected one of {', '.join(_READERS)}"
            )
        return [root]
    files = sorted(f for f in root.rglob("*") if f.is_file() and f.suffix.lower() in _READERS)
    if not files:
        raise UserError(f"data.path={path} has no file to read; expected {', '.join(_READERS)}")
    return files


def _opened(load: Callable[[Any], Any], what: str, reason: str) -> Any:
    import datasets  # slow to import, and not needed for the embedded text

    datasets.disable_progress_bars()
    try:
        return load(datasets)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise UserError(f"cannot open {what}: {reason} ({_first_line(error)})") from None


def texts(rows: Iterable[dict[str, Any]], key: str, where: str) -> Iterator[str]:
    """The column ``key`` of each row; raises UserError for rows that cannot be read or have no such column."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above: a damaged file is noticed while reading
            raise UserError(f"cannot read data.path={where}: {_first_line(error)}") from None
        yield _text_of(row, key, where)


def _text_of(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        got = "nothing" if key not in row else type(row[key]).__name__
        raise UserError(f"data.path={where}: column {key!r} holds {got}; set data.text_key to one of {', '.join(row)}")
    return str(row[key])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
