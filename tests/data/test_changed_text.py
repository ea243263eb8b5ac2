"""Text that changes, moves or is held out by its name: tokens are those of the text, and nothing of it is silent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.data import tokens as data_module
from lowrank_train.data.documents import lot
from lowrank_train.data.tokens import Data, prepare_data
from lowrank_train.files.checksums import CHECKSUMS
from tests.data.test_data import OneRank, documents_of, prepare, settings, tokens_of
from tests.runs import Launched, arguments, documents, exact_history, write_jsonl

OLD, NEW = documents(60), documents(60, seed=1)


def trained_documents(data: Data, folder: Path) -> list[str]:
    return documents_of(data, tokens_of(data, folder, "train"))


def of(texts: list[str]) -> list[str]:
    return [text for text in texts if lot(text) >= 0.1]


def pretend_training(folder: Path) -> None:
    """Leave a checkpoint where a run would."""
    (folder / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "step-1" / ".metadata").touch()


def replace_file(path: Path) -> None:
    """Other text of the same size, with the time of the old."""
    before = path.stat()
    texts = ["".join(reversed(text)) for text in OLD]
    write_jsonl(path, texts)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def add_file(path: Path) -> None:
    write_jsonl(path.with_name("b.jsonl"), NEW)


def remove_file(path: Path) -> None:
    path.with_name("a2.jsonl").unlink()


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced": (replace_file, "changed: a.jsonl"),
    "added": (add_file, "new: b.jsonl"),
    "removed": (remove_file, "gone: a2.jsonl"),
}


def corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", OLD)
    write_jsonl(folder / "a2.jsonl", NEW[:20])
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_was_not_trained_tokenizes_changed_text_again(tmp_path: Path, change: str) -> None:
    folder = corpus(tmp_path / "text")
    first = prepare(folder, tmp_path)
    act, words = CHANGES[change]
    act(folder / "a.jsonl")
    second = prepare(folder, tmp_path)
    assert first.description["sha1"] != second.description["sha1"]
    assert any(words in note and "tokenized again" in note for note in second.notes), second.notes
    fresh = prepare(folder, tmp_path / "fresh")
    assert second.description["sha1"] == fresh.description["sha1"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_trained_run_goes_on_with_the_tokens_it_began_with_and_says_so(tmp_path: Path, change: str) -> None:
    folder = corpus(tmp_path / "text")
    first = prepare(folder, tmp_path)
    pretend_training(tmp_path)
    act, words = CHANGES[change]
    act(folder / "a.jsonl")
    second = prepare(folder, tmp_path)
    assert second.identity == first.identity
    said = [note for note in second.notes if words in note]
    assert len(said) == 1
    assert "goes on with the tokens it began with" in said[0]
    assert "set run_dir to another folder" in said[0]


@pytest.mark.parametrize("change", CHANGES)
def test_shared_tokens_of_text_that_has_changed_are_refused(tmp_path: Path, change: str) -> None:
    folder = corpus(tmp_path / "text")

    def shared() -> Data:
        config = settings(folder, f"data.folder={tmp_path / 'tokens'}", f"run_dir={tmp_path / 'run'}")
        return prepare_data(config, OneRank(), tmp_path / "tokens")  # type: ignore[arg-type]

    first = shared()
    act, words = CHANGES[change]
    act(folder / "a.jsonl")
    with pytest.raises(UserError, match=rf"data\.folder=.*{words}.*set it to another folder, or delete it"):
        shared()
    pretend_training(tmp_path)
    second = shared()
    assert second.identity == first.identity
    assert any(words in note for note in second.notes)


@pytest.mark.parametrize("key", ["data.validation", "data.tokenizer"])
def test_held_out_text_and_tokenizers_count_too(tmp_path: Path, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", OLD)
    other = write_jsonl(tmp_path / "other.jsonl", NEW)
    if key == "data.tokenizer":
        tokenizers = []
        for i, texts in enumerate((OLD, ["w" * 9 + text for text in NEW])):
            prepare(write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / f"tokenizer-{i}")
            tokenizers.append(tmp_path / f"tokenizer-{i}" / "run" / "data" / "tokenizer")
        other = tmp_path / "tokenizer"
        shutil.copytree(tokenizers[0], other)
    first = prepare(path, tmp_path, f"{key}={other}")
    if key == "data.tokenizer":
        shutil.rmtree(other)
        shutil.copytree(tokenizers[1], other)
    else:
        write_jsonl(other, OLD[:9])
    second = prepare(path, tmp_path, f"{key}={other}")
    assert first.description["sha1"] != second.description["sha1"]
    assert any(f"{key}={other} has changed" in note for note in second.notes)


def test_the_same_text_at_another_place_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus(tmp_path / "text"), tmp_path)
    pretend_training(tmp_path)
    shutil.copytree(tmp_path / "text", tmp_path / "copy")
    monkeypatch.setattr(data_module, "local_documents", lambda *_, **__: pytest.fail("the text was tokenized again"))
    second = prepare(tmp_path / "copy", tmp_path)
    assert second.identity == first.identity
    (tmp_path / "copy" / "a.jsonl").touch()
    assert prepare(tmp_path / "copy", tmp_path).identity == first.identity
    write_jsonl(tmp_path / "copy" / "a.jsonl", NEW)
    with pytest.raises(UserError, match=r"data\.path was .*text', is .*copy'; set run_dir to another folder"):
        prepare(tmp_path / "copy", tmp_path)


@pytest.mark.parametrize("trained", [False, True])
def test_text_that_is_no_longer_there_does_not_stop_a_run_that_has_its_tokens(tmp_path: Path, trained: bool) -> None:
    folder = corpus(tmp_path / "text")
    (tmp_path / "link").symlink_to(folder)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", NEW[:20])
    words = (f"data.validation={held_out}",)
    first = prepare(tmp_path / "link", tmp_path, *words)
    if trained:
        pretend_training(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    held_out.unlink()
    second = prepare(tmp_path / "link", tmp_path, *words)
    assert second.identity == first.identity
    assert trained_documents(second, tmp_path) == trained_documents(first, tmp_path)
    assert sum("no longer there" in note for note in second.notes) == 2
    assert prepare(folder, tmp_path, *words).identity == first.identity
    with pytest.raises(UserError, match="does not exist"):
        prepare(tmp_path / "another", tmp_path / "new")


def test_a_streamed_run_goes_on_in_the_same_text_only(tmp_path: Path) -> None:
    words = ("data.streaming=true", "data.streams=2")
    folder = corpus(tmp_path / "text")
    first = prepare(folder, tmp_path, *words)
    blocks = first.train.take(8, 0, 1).tolist()
    pretend_training(tmp_path)
    folder.rename(tmp_path / "moved")
    second = prepare(tmp_path / "moved", tmp_path, *words)
    assert second.identity == first.identity
    assert second.train.take(8, 0, 1).tolist() == blocks
    with pytest.raises(UserError, match=r"data\.path=.*text does not exist, and streamed text is read while training"):
        prepare(folder, tmp_path, *words)
    (tmp_path / "moved").rename(folder)
    add_file(folder / "a.jsonl")
    with pytest.raises(UserError, match=r"new: b\.jsonl.*goes on in the same text only"):
        prepare(folder, tmp_path, *words)


def test_another_python_is_another_embedded_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "embedded_documents", lambda: iter(OLD))
    first = prepare(None, tmp_path)
    pretend_training(tmp_path)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    second = prepare(None, tmp_path)
    assert second.identity == first.identity
    assert any("is embedded 3.99.0" in note for note in second.notes)


def test_tokens_of_an_earlier_version_are_used_and_what_is_not_known_is_said(tmp_path: Path) -> None:
    """An earlier version wrote no sources."""
    path = write_jsonl(tmp_path / "a.jsonl", OLD)
    first = prepare(path, tmp_path)
    record = tmp_path / "run" / "data" / "data.json"
    content = json.loads(record.read_text())
    del content["text"]
    record.write_text(json.dumps(content))
    (record.parent / CHECKSUMS).unlink()
    pretend_training(tmp_path)
    second = prepare(path, tmp_path)
    assert second.identity == first.identity
    assert any("whether the text has changed is not known" in note for note in second.notes)
    path.unlink()
    assert prepare(path, tmp_path).identity == first.identity
    with pytest.raises(UserError, match=r"data\.path was"):
        prepare(write_jsonl(tmp_path / "b.jsonl", OLD), tmp_path)


# ------------------------------------------------------------------------------------------------- files of a folder


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("name", ["test.jsonl", "validation-00000-of-00001.jsonl", "dev/a.jsonl", "my.eval.jsonl"])
def test_a_file_that_is_held_out_by_its_name_is_not_trained_on(tmp_path: Path, name: str, streaming: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", OLD)
    (folder / name).parent.mkdir(exist_ok=True)
    write_jsonl(folder / name, NEW)
    data = prepare(folder, tmp_path, f"data.streaming={streaming}", "data.streams=1")
    assert f"data.path={folder}: reads 1 file (train.jsonl)" in data.notes
    assert any(f"does not read 1 file ({name})" in note and "data.validation=FILE" in note for note in data.notes)
    assert data.description["text"]["data.path"]["left_out"] == [name]
    if streaming == "false":
        assert trained_documents(data, tmp_path) == of(OLD)
    else:
        read = documents_of(data, data.train.take(600, 0, 1)[:, :-1].flatten().tolist())
        assert set(read) - {read[-1]} <= set(OLD)


def test_files_named_after_what_they_are_about_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in (("a.py", OLD), ("test_a.py", NEW), ("test.md", NEW[:9])):
        (folder / name).write_text("\n".join(texts))
    data = prepare(folder, tmp_path, "evaluation.tokens=10")
    assert f"data.path={folder}: reads 3 files (a.py, test.md, test_a.py)" in data.notes
    (tmp_path / "only").mkdir()
    write_jsonl(tmp_path / "only" / "test.jsonl", OLD)
    assert trained_documents(prepare(tmp_path / "only", tmp_path / "2"), tmp_path / "2") == of(OLD)


def test_a_launched_run_names_its_files_and_survives_that_its_text_moves(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", OLD)
    write_jsonl(folder / "test.jsonl", NEW)
    run = Launched(arguments(folder, tmp_path / "run", "steps=2", "schedule.warmup_steps=1"), tmp_path / "log")
    assert run.finish() == 0, run.output
    assert "reads 1 file (train.jsonl)" in run.output
    assert "does not read 1 file (test.jsonl)" in run.output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["data"]["text"]["data.path"]["files"] == ["train.jsonl"]

    folder.rename(tmp_path / "moved")
    histories = []
    for place in (folder, tmp_path / "moved"):
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        words = arguments(place, tmp_path / "again", "steps=4", "schedule.warmup_steps=1")
        resumed = Launched(words, tmp_path / "log")
        assert resumed.finish() == 0, resumed.output
        assert ("is no longer there; the tokens in" in resumed.output) == (place == folder)
        histories.append(exact_history(tmp_path / "again"))
        shutil.rmtree(tmp_path / "again")
    assert histories[0] == histories[1]
    assert histories[0][-1]["step"] == 4
