"""Text of a Hugging Face dataset by name: only the columns asked for, configurations, splits, exact resume.

There is no hub here. A name leads to a folder with the files and the README of a repository, which ``datasets``
resolves in the same way.
"""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pytest
from huggingface_hub import HfFileSystem, constants

from lowrank_train.data.blocks import TokenStream
from lowrank_train.data.documents import Example, lot
from lowrank_train.data.tokens import Data
from lowrank_train.files.pretrained import hub_answers
from tests.data.test_data import documents_of, error, merged, prepare, settings, take, tokens_of
from tests.runs import write_jsonl
from tests.text.test_text_rows import COMPRESSORS, HALVES, TEXTS, WRITERS, read_by, rows_of, write_lines

NAME = "some/where"
TRAINED = [text for text in TEXTS if lot(text) >= 0.1]
PARTS = {"en/train": 0, "en/more": 1, "de/train": 1}
"""Files of the repository -> half of the texts; the configuration en has two of them."""


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    write_lines(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


KINDS = {**WRITERS, "jsonl.gz": write_gz, "json.gz": write_gz}


class Hub:
    """Names of datasets -> folders that stand for repositories; remembers the commits that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commits: dict[str, Path] = {}
        self.asked: list[str | None] = []
        self.moved: Callable[[str], str] = str
        """Where files are said to be."""
        original = datasets.load_dataset_builder

        def builder(path: str, name: str | None = None, revision: Any = None, **more: Any) -> Any:
            if path != NAME:
                return original(path, name, **more)
            self.asked.append(revision)
            commit = revision or list(self.commits)[-1]
            made = original(str(self.commits[commit]), name, **more)
            made.hash = commit
            for split, files in made.config.data_files.items():
                made.config.data_files[split] = type(files)([self.moved(file) for file in files], files.origin_metadata)
            return made

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        monkeypatch.setattr(datasets.load, "load_dataset_builder", builder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(monkeypatch)
    made.commits["first"] = tmp_path / "repository"
    return made


def repository(folder: Path, kind: str, *options: str) -> None:
    """Two configurations, of which en has three splits, and unused columns that stop a reader of tables."""
    files = {"en": {"train": "en/train* en/more*", "test": "en/test*", "dev": "de/*"}, "de": {"train": "de/*"}}
    lines = ["---", "configs:"]
    for name, splits in files.items():
        lines += [f"- config_name: {name}", *(f"  {option}" for option in options), "  data_files:"]
        for split, paths in splits.items():
            lines += [f"  - split: {split}", "    path:", *(f"    - {path}" for path in paths.split())]
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", "# About"]))
    for part, half in PARTS.items():
        KINDS[kind](folder / f"{part}.{kind}", rows_of(HALVES[half], half, one_type=kind in ("parquet", "arrow")))
    KINDS[kind](folder / f"en/test.{kind}", [{"text": f"held out {i}", "prompt": "of", "null": "x"} for i in range(20)])


@pytest.mark.parametrize("streaming", [False, True], ids=["once", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_nobody_asked_for_stop_no_dataset(tmp_path: Path, hub: Hub, kind: str, streaming: bool) -> None:
    repository(hub.commits["first"], kind)
    words = (f"data.streaming={str(streaming).lower()}", "data.streams=1", "data.name=en")
    assert read_by(prepare(NAME, tmp_path, *words), tmp_path, streaming) == TRAINED


def test_a_dataset_of_the_hub_without_a_readme_is_read(tmp_path: Path, hub: Hub) -> None:
    hub.commits["first"].mkdir()
    for half, texts in enumerate(HALVES):
        write_lines(hub.commits["first"] / f"train-{half}.jsonl", rows_of(texts, half, one_type=False))
    assert read_by(prepare(NAME, tmp_path, "data.streams=1"), tmp_path, True) == TRAINED


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_and_the_split_are_those_asked_for(tmp_path: Path, hub: Hub, kind: str) -> None:
    repository(hub.commits["first"], kind)
    data = prepare(NAME, tmp_path, "data.streaming=false", "data.name=de")
    assert read_by(data, tmp_path, False) == [text for text in HALVES[1] if lot(text) >= 0.1]
    words = ("data.streaming=false", "data.name=en", "data.validation=test", "evaluation.tokens=5000")
    data = prepare(NAME, tmp_path / "en", *words)
    assert documents_of(data, tokens_of(data, tmp_path / "en", "validation")) == [f"held out {i}" for i in range(20)]
    assert read_by(data, tmp_path / "en", False) == TEXTS
    data = prepare(NAME, tmp_path / "both", *words[:2], "data.validation=test+dev", "evaluation.tokens=100000")
    read = documents_of(data, tokens_of(data, tmp_path / "both", "validation"))
    assert read == [*(f"held out {i}" for i in range(20)), *HALVES[1]]
    assert read_by(data, tmp_path / "both", False) == HALVES[0]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_nobody_asked_for_stop_no_prompts_and_responses(tmp_path: Path, hub: Hub, kind: str) -> None:
    repository(hub.commits["first"], kind)
    words = ("data.prompt_key=prompt", "data.response_key=text", "seq_len=400", "evaluation.tokens=4000")
    data = prepare(NAME, tmp_path, *words, "data.name=en", "data.streaming=false")
    labels = [token for token in tokens_of(data, tmp_path, "train") if token >= 0]
    assert documents_of(data, labels) == [t for t in TEXTS if lot(Example(t[:9], t)) >= 0.1]


def streams(data: Data, count: int, *words: str) -> list[TokenStream]:
    config = settings(NAME, "data.name=en", *words)
    return [TokenStream(config, data.tokenizer, 0.1) for _ in range(count)]


@pytest.mark.parametrize("parts", [2, 4], ids=["a file for each part", "rows of files for each part"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_shared_by_ranks_and_continued_exactly(tmp_path: Path, hub: Hub, kind: str, parts: int) -> None:
    repository(hub.commits["first"], kind)
    words = ("data.streaming=true", f"data.streams={parts}")
    data = prepare(NAME, tmp_path, *words, "data.name=en")
    whole = take(streams(data, 1, *words)[0], 480)
    for part in range(parts):
        read = documents_of(data, [token for block in whole[part::parts] for token in block[:-1]])
        rows = HALVES[part] if parts == 2 else TEXTS[part::parts]
        mine = [text for text in rows if lot(text) >= 0.1]
        assert read[: len(mine)] == mine
    for position in (4, 100, 300):
        before = streams(data, 2, *words)
        for rank, source in enumerate(before):
            source.take(position, rank, 2)
        after = streams(data, 1, *words)[0]
        after.load_state_dict(merged([source.state_dict() for source in before]))
        assert take(after, 60) == whole[position : position + 60]


def test_a_resumed_run_reads_the_commit_it_began_with(tmp_path: Path, hub: Hub) -> None:
    """New text under the same name would move every position."""
    repository(hub.commits["first"], "jsonl")
    words = ("data.streaming=true", "data.streams=2")
    data = prepare(NAME, tmp_path, *words, "data.name=en")
    whole = take(streams(data, 1, *words)[0], 480)
    source = streams(data, 1, *words)[0]
    source.take(100, 0, 1)
    state = source.state_dict()
    hub.commits["second"] = tmp_path / "changed"
    repository(hub.commits["second"], "jsonl")
    write_lines(hub.commits["second"] / "en" / "train.jsonl", [{"text": "other"}] * 99)
    source = streams(data, 1, *words)[0]
    source.load_state_dict(state)
    hub.asked.clear()
    assert take(source, 380) == whole[100:]  # past the end, where the files are opened again
    assert set(hub.asked) == {"first"}
    assert take(streams(data, 1, *words)[0], 20) != whole[:20]


def remote(hub: Hub, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Put the files of the repository elsewhere, so that only an opener of URLs finds them."""
    contents: dict[str, bytes] = {}
    folder = hub.commits["first"]

    def moved(file: str) -> str:
        place = f"datasets/{NAME}@first/{Path(file).relative_to(folder)}"
        contents[place] = Path(file).read_bytes()
        if scheme == "memory":
            fsspec.filesystem("memory").pipe(f"/{place}", contents[place])
        return f"{scheme}://{place}"

    def opened(self: Any, path: str, *more: Any, **options: Any) -> io.BytesIO:
        return io.BytesIO(contents[path])

    hub.moved = moved
    monkeypatch.setattr(HfFileSystem, "_open", opened)


def write_arrow(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(list(rows))
    make = pyarrow.ipc.new_stream if path.stem == "train" else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("scheme", ["memory", "hf"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", *(f"json{suffix}" for suffix in COMPRESSORS)])
def test_files_that_lie_elsewhere_are_opened_by_their_url(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str
) -> None:
    def compressed(path: Path, rows: list[dict[str, Any]]) -> None:
        write_lines(path, rows)
        path.write_bytes(COMPRESSORS[path.suffix](path.read_bytes()))

    monkeypatch.setitem(KINDS, kind, {"arrow": write_arrow, **WRITERS}.get(kind, compressed))
    repository(hub.commits["first"], kind)
    remote(hub, monkeypatch, scheme)
    for streaming in (False, True):
        words = (f"data.streaming={str(streaming).lower()}", "data.streams=1", "data.name=en")
        data = prepare(NAME, tmp_path / str(streaming), *words)
        assert read_by(data, tmp_path / str(streaming), streaming) == TRAINED
    message = error(NAME, tmp_path / "wrong", "data.name=en", "data.text_key=txet")
    assert f"{scheme}://datasets/{NAME}@first/en/train.{kind}" in message
    assert "set data.text_key to one of text, prompt" in message


OTHERS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "a row for each line": ("txt", "".join(f"{text}\n" for text in TEXTS).encode(), ()),
    "columns by tabs": ("tsv", "".join(f"{a}\t{i}\n" for i, a in enumerate(["text", *TEXTS])).encode(), ()),
    "other separators": ("csv", "".join(f"{a};{i}\n" for i, a in enumerate(["text", *TEXTS])).encode(), ("sep: ;",)),
    "a field of an object": ("json", json.dumps({"in": [{"text": t} for t in TEXTS]}).encode(), ("field: in",)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_only_datasets_reads_are_read_by_it(tmp_path: Path, hub: Hub, kind: str) -> None:
    suffix, content, options = OTHERS[kind]
    folder = hub.commits["first"]
    folder.mkdir()
    lines = ["configs:", "- config_name: en", *(f"  {option}" for option in options), f"  data_files: '*.{suffix}'"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---"]))
    (folder / f"a.{suffix}").write_bytes(content)
    for streaming in (False, True):
        words = (f"data.streaming={str(streaming).lower()}", "data.streams=1", "data.name=en")
        data = prepare(NAME, tmp_path / str(streaming), *words)
        assert read_by(data, tmp_path / str(streaming), streaming) == TRAINED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.name=en", "data.validation=nowhere"], "Available splits: ['train', 'test', 'dev']"),
        (["data.name=fr"], "Available: ['en', 'de']"),
        ([], "Config name is missing"),
    ],
)
def test_a_split_or_a_configuration_that_is_not_there(
    tmp_path: Path, hub: Hub, words: list[str], expected: str
) -> None:
    repository(hub.commits["first"], "jsonl")
    message = error(NAME, tmp_path, *words)
    assert message.startswith(f"cannot open data.path={NAME}")
    assert expected in message


@pytest.mark.parametrize("word", ["data.path=nobody/nothing", "data.tokenizer=nobody/nothing"])
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Its clients try again for up to a minute."""
    pauses: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub_answers.cache_clear()
    message = error(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path, word)
    hub_answers.cache_clear()
    assert word in message
    assert "connect" in message or "reach" in message
    assert not pauses
