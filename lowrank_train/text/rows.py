"""Rows of one file of text: only the columns that are asked for are read.

A reader of whole tables would infer one schema for all columns of all files. Columns that nobody asked for would then
stop a data set, because they are null, change their type, or exist in one file only.

A file lies at a ``Path`` of this machine, or at a URL that fsspec opens, such as hf://datasets/OWNER/NAME/FILE.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from lowrank_train.common.errors import UserError, type_and_line

__all__ = ["PLACE", "SUFFIXES", "kind_of", "rows"]

PLACE = ""
"""Key of a row that says where the row stands: file and line, or file and row."""

_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}


def _zst(stream: IO[bytes]) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))


_COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".zst": _zst,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}

SUFFIXES = f"{', '.join(_KINDS)} (JSON and text also with {', '.join(sorted(_COMPRESSED))})"
"""The kinds of files that can be read, for messages."""

_SPACE = re.compile(r"\s*")
_ROWS_AT_ONCE = 128  # of a table; long documents make even these large
_ROWS_UNTIL_MISSING = 10_000  # of JSON, which says which columns it has row by row


def kind_of(file: Path | str) -> str | None:
    """Return json, parquet, arrow or text, by the suffix of a file; None for a file that is not text."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    kind = _KINDS.get((suffixes[:-1] if compressed else suffixes or [""])[-1]) if suffixes[compressed:] else None
    return None if compressed and kind in ("parquet", "arrow") else kind


def rows(file: Path | str, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a dict for each row of a file, in the order of the file.

    Args:
        file: of a kind that ``kind_of`` knows.
        columns: column to read -> key of the configuration that names the column, for messages. The values are
            plain Python objects, nested ones included. A text file has one row, and its one column is the first.

    Returns:
        Rows with the columns (None where a row has no value) and ``PLACE``. A file without rows has no columns.

    Raises:
        UserError: the file is damaged, or has none of a column; the message names the file and the line or row.
    """
    reader = _ROWS[kind_of(file) or "text"]
    place = _Place(file)
    try:
        yield from reader(place, columns)
    except UserError:
        raise
    except Exception as error:  # each library raises kinds of its own for damaged files
        raise UserError(f"cannot read {place}: {type_and_line(error)}") from None


class _Place:
    """Where a reader is at work."""

    def __init__(self, file: Path | str) -> None:
        self.file, self.number, self.unit = file, 0, "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}" if self.number else str(self.file)


def _json_rows(place: _Place, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    missing = dict(columns)
    count, row = 0, {}
    for row in _json_objects(place):
        if not isinstance(row, dict):
            raise UserError(f"{place} holds a JSON {type(row).__name__}; expected an object with columns")
        missing = {column: key for column, key in missing.items() if column not in row} if missing else missing
        count += 1
        if missing and count == _ROWS_UNTIL_MISSING:
            break
        yield {PLACE: str(place), **{column: row.get(column) for column in columns}}
    if missing and count:
        raise _no_column(place.file, missing, list(row))


def _json_objects(place: _Place) -> Iterator[Any]:
    """Values of a file with one on each line, of one array, or of objects over several lines."""
    with _opened(place.file) as stream:
        for place.number, line in enumerate(stream, 1):
            if place.number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            content = line.decode("utf-8")
            if not content.strip():
                continue
            break
        else:
            return
        try:
            first = None if content.lstrip().startswith("[") else json.loads(content)
        except ValueError:
            first = None
        if first is None:  # not one value a line: the whole file is needed
            yield from _json_values(place, content + stream.read().decode("utf-8"))
            return
        yield first
        for line in stream:
            place.number += 1
            if line.strip():
                yield json.loads(line.decode("utf-8"))


def _json_values(place: _Place, content: str) -> Iterator[Any]:
    decoder, start = json.JSONDecoder(), place.number
    position = _after_space(content, 0)
    while position < len(content):
        place.number = start + content.count("\n", 0, position)
        try:
            value, end = decoder.raw_decode(content, position)
        except json.JSONDecodeError as error:
            place.number = start + error.lineno - 1
            raise
        position = _after_space(content, end)
        if isinstance(value, list):
            place.unit = "item"
            for place.number, item in enumerate(value, 1):
                yield {"text": item} if isinstance(item, str) else item
        else:
            yield value


def _after_space(content: str, position: int) -> int:
    found = _SPACE.match(content, position)
    return found.end() if found else position


def _parquet_rows(place: _Place, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with _stored(place.file) as stream, parquet.ParquetFile(stream) as table:
        if table.metadata.num_rows:
            _check_columns(place.file, columns, table.schema_arrow.names)
            yield from _of_batches(place, table.iter_batches(_ROWS_AT_ONCE, columns=list(columns)), columns)


def _arrow_rows(place: _Place, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    local = isinstance(place.file, Path)
    with pyarrow.memory_map(str(place.file)) if local else _stored(place.file) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches: Iterator[Any] = iter(reader)
        except pyarrow.ArrowInvalid:  # the other format of the same name
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in batches:
            if batch.num_rows:
                _check_columns(place.file, columns, batch.schema.names)
                chosen = batch.select(list(columns))
                parts = (chosen.slice(start, _ROWS_AT_ONCE) for start in range(0, batch.num_rows, _ROWS_AT_ONCE))
                yield from _of_batches(place, parts, columns)


def _of_batches(place: _Place, batches: Iterator[Any], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    place.unit = "row"
    for batch in batches:
        for row in batch.to_pylist():
            place.number += 1
            yield {PLACE: str(place), **{column: row[column] for column in columns}}


def _text_rows(place: _Place, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    if len(columns) > 1:
        key = list(columns.values())[-1]
        raise UserError(f"{place} is plain text and has no columns; {key} needs JSON, parquet or arrow files")
    with _opened(place.file) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place.number = data.count(b"\n", 0, error.start) + 1
        raise
    if "\r" in text:  # as a file opened as text reads its line ends
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield {PLACE: str(place), next(iter(columns)): text}


_ROWS: dict[str, Callable[[_Place, Mapping[str, str]], Iterator[dict[str, Any]]]] = {
    "json": _json_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "text": _text_rows,
}


def _stored(file: Path | str) -> IO[bytes]:
    """Open the bytes of a file."""
    return file.open("rb") if isinstance(file, Path) else fsspec.open(file).open()


@contextmanager
def _opened(file: Path | str) -> Iterator[IO[bytes]]:
    """Open the content of a file that may be compressed."""
    with _stored(file) as stream:
        expand = _COMPRESSED.get(Path(file).suffix.lower())
        yield expand(stream) if expand else stream


def _check_columns(file: Path | str, columns: Mapping[str, str], names: list[str]) -> None:
    missing = {column: key for column, key in columns.items() if column not in names}
    if missing:
        raise _no_column(file, missing, names)


def _no_column(file: Path | str, missing: Mapping[str, str], names: list[str]) -> UserError:
    column, key = next(iter(missing.items()))
    return UserError(f"{file}: column {column!r} holds nothing; set {key} to one of {', '.join(map(str, names))}")
