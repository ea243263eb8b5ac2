"""Rows of files: only the columns asked for, compressed or not, and errors that name the file and the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.data.documents import Example, lot
from lowrank_train.data.tokens import Data
from tests.data.test_data import documents_of, error, prepare, tokens_of
from tests.runs import documents, write_jsonl

TEXTS = documents(60)
HALVES = TEXTS[:30], TEXTS[30:]

UNUSED: dict[str, tuple[list[Any], list[Any]]] = {
    "null": ([None] * 30, [None] * 30),
    "null, then a struct": ([None] * 30, [{"a": 1}] * 30),
    "a number, then a text": ([1] * 30, ["one"] * 30),
    "another type in one file": ([*[1] * 15, *["one"] * 15], [1] * 30),
    "empty lists, then structs": ([[]] * 30, [[{"name": "x", "deep": {"y": [1]}}]] * 30),
    "other structs": ([{"a": 1}] * 30, [{"b": {"c": "d"}}] * 30),
    "in the first file only": ([1] * 30, []),
    "in the second file only": ([], [{"a": []}] * 30),
}
"""Values of a column that nobody asked for, in two files."""


def rows_of(texts: list[str], half: int, *, one_type: bool) -> list[dict[str, Any]]:
    """Rows with all those columns that can be in a file, of which each has one type in a parquet file."""
    unused = {label: halves[half] for label, halves in UNUSED.items() if halves[half]}
    if one_type:
        unused.pop("another type in one file")
    return [
        {"text": t, "prompt": t[:9], **{label: values[i] for label, values in unused.items()}}
        for i, t in enumerate(texts)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_lines,
    "json": write_array,
    "parquet": write_parquet,
}


def read_by(data: Data, folder: Path, streaming: bool) -> list[str]:
    """Training documents, of the token file or of one turn of the stream."""
    if not streaming:
        return documents_of(data, tokens_of(data, folder, "train"))
    expected = {text for text in TEXTS if lot(text) >= 0.1}
    tokens = data.train.take(700, 0, 1)[:, :-1].flatten().tolist()
    read = documents_of(data, tokens)
    assert len(read) >= len(expected)
    return read[: len(expected)]


def write_halves(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for half, texts in enumerate(HALVES):
        WRITERS[kind](folder / f"{half}.{kind}", rows_of(texts, half, one_type=kind == "parquet"))
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["once", "streamed"])
@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_nobody_asked_for_stop_nothing(tmp_path: Path, kind: str, streaming: bool) -> None:
    words = (f"data.streaming={str(streaming).lower()}", "data.streams=1")
    data = prepare(write_halves(tmp_path / "text", kind), tmp_path, *words)
    assert read_by(data, tmp_path, streaming) == [t for t in TEXTS if lot(t) >= 0.1]


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_nobody_asked_for_do_not_stop_prompts_and_responses(tmp_path: Path, kind: str) -> None:
    words = ("data.prompt_key=prompt", "data.response_key=text", "seq_len=400", "evaluation.tokens=4000")
    data = prepare(write_halves(tmp_path / "text", kind), tmp_path, *words)
    trained = [t for t in TEXTS if lot(Example(t[:9], t)) >= 0.1]
    labels = [token for token in tokens_of(data, tmp_path, "train") if token >= 0]
    assert documents_of(data, labels) == trained


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_shard_without_rows_counts_as_nothing(tmp_path: Path, streaming: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    table = pyarrow.table({"text": HALVES[0]})
    pyarrow.parquet.write_table(table.slice(0, 0), folder / "a.parquet")
    pyarrow.parquet.write_table(table, folder / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({}), folder / "c.parquet")
    with pyarrow.parquet.ParquetWriter(folder / "d.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))  # a row group of no rows
        writer.write_table(pyarrow.table({"text": HALVES[1]}))
    data = prepare(folder, tmp_path, f"data.streaming={streaming}", "data.streams=1")
    assert read_by(data, tmp_path, streaming == "true") == [t for t in TEXTS if lot(t) >= 0.1]


def several_frames(content: bytes) -> bytes:
    """As tools that compress in parallel write a file: pieces after each other."""
    middle = len(content) // 2
    return b"".join(
        pyarrow.compress(part, "zstd", asbytes=True) if part else b"" for part in (content[:middle], content[middle:])
    )


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": several_frames,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_is_read(tmp_path: Path, suffix: str) -> None:
    """C4 is distributed as .json.gz with one object a line."""
    write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    content = (tmp_path / "plain.jsonl").read_bytes()
    expected = [t for t in TEXTS if lot(t) >= 0.1]
    for name, streaming in ((f"c4.json{suffix}", False), (f"c4.jsonl{suffix}", False), (f"c4.json{suffix}", True)):
        where = tmp_path / f"{name}-{streaming}"
        where.mkdir()
        path = where / name
        path.write_bytes(COMPRESSORS[suffix](content))
        data = prepare(path, where, f"data.streaming={str(streaming).lower()}", "data.streams=1")
        assert read_by(data, where, streaming) == expected

    book = "\n".join(TEXTS * 8)
    (tmp_path / f"book.txt{suffix}").write_bytes(COMPRESSORS[suffix](book.encode()))
    data = prepare(tmp_path / f"book.txt{suffix}", tmp_path, "evaluation.tokens=100000")
    assert data.description["train_tokens"] > 1000

    broken = tmp_path / f"broken.jsonl{suffix}"
    broken.write_bytes(COMPRESSORS[suffix](content)[:-40])
    assert broken.name in error(broken, tmp_path / "broken")


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, streaming: str) -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "meta": [{"a": i} for i in range(60)]})
    dataset.save_to_disk(str(tmp_path / "alone"), num_shards=3)
    parts = datasets.DatasetDict({"train": dataset, "test": datasets.Dataset.from_dict({"text": ["held out"] * 9})})
    parts.save_to_disk(str(tmp_path / "parts"))
    for name in ("alone", "parts"):
        where = tmp_path / f"{name}-run"
        data = prepare(tmp_path / name, where, f"data.streaming={streaming}", "data.streams=1")
        assert read_by(data, where, streaming == "true") == [t for t in TEXTS if lot(t) >= 0.1]


def test_arrays_and_objects_over_several_lines_are_read_as_before(tmp_path: Path) -> None:
    contents = {
        "array.json": json.dumps([{"text": text} for text in TEXTS]),
        "pretty.json": json.dumps([{"text": text} for text in TEXTS], indent=2),
        "strings.json": json.dumps(TEXTS),
        "objects.jsonl": "".join(json.dumps({"text": text, "n": 1}, indent=1) + "\n\n" for text in TEXTS),
        "blank.jsonl": "\n" + "\n \n".join(json.dumps({"text": text}) for text in TEXTS),
        "bom.jsonl": "\ufeff" + "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
        "bom.json": "\ufeff" + json.dumps([{"text": text} for text in TEXTS]),
        "dates.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        data = prepare(tmp_path / name, tmp_path / name.replace(".", "-"))
        read = documents_of(data, tokens_of(data, tmp_path / name.replace(".", "-"), "train"))
        assert read == [t for t in TEXTS if lot(t) >= 0.1], name


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "".join(f"{t}\r\n" for t in TEXTS * 9).encode())
    data = prepare(tmp_path / "a.txt", tmp_path, "evaluation.tokens=100000")
    read = [d for part in ("validation", "train") for d in documents_of(data, tokens_of(data, tmp_path, part))]
    assert sum(map(len, read)) == sum(len(t) + 1 for t in TEXTS * 9)
    assert not any("\ufeff" in text or "\r" in text for text in read)


def test_text_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    texts = [f"2020-01-{day:02}" for day in range(1, 32)] * 3
    data = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path, "evaluation.tokens=8")
    assert documents_of(data, tokens_of(data, tmp_path, "train")) == [t for t in texts if lot(t) >= 0.1]


BROKEN: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"text": \n', "line 5"),
    "not UTF-8": (b'{"text": "\xff"}\n', "line 5"),
    "half a character": (b'{"text": "ab\\ud83d"}\n', "line 5"),
    "a number": (b'{"text": 7}\n', "line 5"),
    "a list": (b"[1, 2]\n", "line 5"),
    "without end": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 5"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_errors_name_the_file_and_the_line_in_it(tmp_path: Path, kind: str) -> None:
    """Not a row of the whole: this is the second file."""
    content, place = BROKEN[kind]
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_jsonl(folder / "b.jsonl", TEXTS[:4])
    with (folder / "b.jsonl").open("ab") as file:
        file.write(content)
    for streaming in ("false", "true"):
        message = ""
        try:
            data = prepare(folder, tmp_path / streaming, f"data.streaming={streaming}", "data.streams=1")
            data.train.take(900, 0, 1)
        except UserError as caught:
            message = str(caught)
        assert f"b.jsonl, {place}" in message, message


def test_errors_name_the_row_of_a_table_and_the_line_of_a_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "fine", "n": i} for i in range(5)])
    assert "a.parquet, row 1: column 'n' holds int" in error(tmp_path / "a.parquet", tmp_path, "data.text_key=n")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    assert "a.txt, line 3" in error(tmp_path / "a.txt", tmp_path)


def test_a_column_that_one_file_lacks_is_named_with_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_jsonl(folder / "b.jsonl", TEXTS, key="body")
    message = error(folder, tmp_path)
    assert "b.jsonl" in message
    assert "set data.text_key to one of body" in message


def test_a_position_of_an_earlier_version_in_streamed_files_is_refused_by_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = prepare(path, tmp_path, "data.streaming=true", "data.streams=1")
    rows = {"examples_iterable": {"shard_idx": 0, "shard_example_idx": 40, "type": "ArrowExamplesIterable"}, "epoch": 0}
    data.train.load_state_dict({"position": 4, "stream_0": json.dumps({"rows": rows, "ahead": []})})
    with pytest.raises(UserError, match=r"data\.path=.* was written by an earlier version"):
        data.train.take(1, 0, 1)
