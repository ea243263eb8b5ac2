"""Data: real text, exact packing, disjoint shards, exact resume, and held-out text that stays out."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config
from lowrank_train.data import tokens as data_module
from lowrank_train.data.blocks import TokenFile, TokenStream, TrainingBlocks
from lowrank_train.data.documents import embedded_documents, local_documents, lot
from lowrank_train.data.tokens import Data, prepare_data
from lowrank_train.text.labels import IGNORED
from tests.runs import documents, write_jsonl

SEQUENCE = 16


class OneRank:
    """What ``prepare_data`` needs of the ranks, without a process group."""

    rank, world_size, is_first = 0, 1, True

    def first(self, work: Callable[[], Any]) -> Any:
        return work()

    def each(self, work: Callable[[], Any]) -> Any:
        return work()


def settings(path: Path | str | None, *words: str) -> Config:
    return load_config(
        [
            f"data.path={'null' if path is None else path}",
            "data.vocab_size=300",
            "data.validation_fraction=0.1",
            "evaluation.tokens=300",
            f"seq_len={SEQUENCE}",
            *words,
        ]
    )


def prepare(path: Path | str | None, folder: Path, *words: str) -> Data:
    return prepare_data(settings(path, *words), OneRank(), folder / "run" / "data")  # type: ignore[arg-type]


def error(path: Path | str | None, folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare(path, folder, *words)
    return str(caught.value)


def tokens_of(data: Data, folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / "run" / "data" / f"{name}.bin", dtype=data.description["dtype"]).tolist()


def documents_of(data: Data, tokens: Sequence[int]) -> list[str]:
    """Text of token ids, cut where the end-of-text token stands."""
    made, current = [], []
    for token in tokens:
        if token == data.tokenizer.eos_token_id:
            made.append(data.tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    return made


# ------------------------------------------------------------------------------------------------ where text comes from


def test_the_embedded_text_is_the_library_and_the_documentation_of_this_python() -> None:
    texts = list(embedded_documents())
    assert Path(inspect.getfile(json)).read_text(encoding="utf-8") in texts
    assert any(text.lstrip().startswith("Boolean operations") for text in texts)  # a topic of the language reference
    assert sum(map(len, texts)) > 3_000_000
    assert not any("site-packages" in text[:200] for text in texts)
    assert texts == list(embedded_documents())


def test_the_embedded_text_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    some = [text for text in embedded_documents() if len(text) < 2000][:60]
    monkeypatch.setattr(data_module, "embedded_documents", lambda: iter(some))
    data = prepare(None, tmp_path)
    assert data.description["data.path"] == "embedded"
    read = documents_of(data, tokens_of(data, tmp_path, "train")) + documents_of(
        data, tokens_of(data, tmp_path, "validation")
    )
    assert set(read) <= set(some)
    assert len(read) > 40


def test_a_python_without_its_sources_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_train.data.documents.sysconfig.get_path", lambda name: str(tmp_path))
    assert "data.path" in error(None, tmp_path)


TEXTS = ["One line.", "Two\nlines, ümläut and 漢字.", "  spaces stay  "]


def parquet(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({key: list(texts), "number": list(range(len(texts)))}), path)
    return path


def test_parquet_and_jsonl_keep_documents_as_they_are(tmp_path: Path) -> None:
    assert list(local_documents(str(parquet(tmp_path / "a.parquet", TEXTS)), "text")) == TEXTS
    assert list(local_documents(str(write_jsonl(tmp_path / "a.jsonl", TEXTS)), "text")) == TEXTS
    assert list(local_documents(str(write_jsonl(tmp_path / "b.jsonl", TEXTS, key="body")), "body")) == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "md", "rst", "py", "TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_text("First.\n\nSecond.\n")
    assert [text.strip() for text in local_documents(str(file), "text")] == ["First.\n\nSecond."]


def test_a_folder_is_read_in_the_order_of_names_and_other_files_are_left_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["b1", "b2"])
    write_jsonl(tmp_path / "a.jsonl", ["a1"])
    (tmp_path / "deeper").mkdir()
    write_jsonl(tmp_path / "deeper" / "c.jsonl", ["c1"])
    (tmp_path / "notes.doc").write_text("not text")
    (tmp_path / "README.md").write_text("about the files")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "a.jsonl", ["hidden"])
    assert list(local_documents(str(tmp_path), "text")) == ["a1", "b1", "b2", "c1"]


def test_a_long_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    """A single book must give training and held-out text."""
    book = "".join(f"{line}\n" for line in documents(400))
    (tmp_path / "book.txt").write_text(book)
    pieces = list(local_documents(str(tmp_path / "book.txt"), "text"))
    assert "".join(pieces) == book
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_path_with_characters_that_mean_something_in_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "part [1]*"
    folder.mkdir()
    assert list(local_documents(str(write_jsonl(folder / "a?.jsonl", TEXTS)), "text")) == TEXTS


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_rows_without_text_are_left_out(tmp_path: Path, streaming: str) -> None:
    rows = [{"text": text} for text in documents(60)]
    rows[::7] = [{"text": None} if i % 2 else {"text": ""} for i, _ in enumerate(rows[::7])]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(path, tmp_path, f"data.streaming={streaming}", "data.streams=2")
    ids = data.train.take(40, 0, 1)[:, :-1].flatten()
    end = data.tokenizer.eos_token_id
    assert not ((ids[1:] == end) & (ids[:-1] == end)).any()  # an empty document would be an end after an end


def test_real_files_outside_the_repository() -> None:
    books = Path(__file__).resolve().parents[3] / "shared" / "data" / "books" / "validation.parquet"
    if not books.exists():
        pytest.skip("needs ../shared/data/books, which is not part of the repository")
    expected = pyarrow.parquet.read_table(books)
    assert list(local_documents(str(books), "text")) == expected["text"].to_pylist()


# ---------------------------------------------------------------------------------------------------- packing and order


def test_packing_is_exact(tmp_path: Path, text: Path) -> None:
    """Blocks of one epoch, put in order, are the token file, and the token file is the text."""
    data = prepare(text, tmp_path)
    assert isinstance(data.train, TokenFile)
    tokens = tokens_of(data, tmp_path, "train")
    expected = [t for t in documents(300) if lot(t) >= 0.1]
    assert documents_of(data, tokens) == expected
    assert tokens[-1] == data.tokenizer.eos_token_id
    assert data.description["train_tokens"] == len(tokens)

    blocks = data.train.take(data.train.blocks, 0, 1).tolist()
    wanted = [tokens[k * SEQUENCE : (k + 1) * SEQUENCE + 1] for k in range((len(tokens) - 1) // SEQUENCE)]
    assert sorted(blocks) == sorted(wanted)
    assert blocks != wanted  # in random order


def test_a_large_vocabulary_is_stored_without_loss(tmp_path: Path) -> None:
    """Ids above 65,535 do not fit two bytes."""
    words = {"<end>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(70_000)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(
        tmp_path / "tokenizer"
    )
    texts = [f"w{i} w{69_999 - i} w{i * 7}" for i in range(60)]
    data = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path, f"data.tokenizer={tmp_path / 'tokenizer'}")
    assert data.description["vocab_size"] == 70_002
    expected = [words[w] for t in texts if lot(t) >= 0.1 for w in [*t.split(), "<end>"]]
    assert max(expected) > 65_535
    assert tokens_of(data, tmp_path, "train") == expected


def numbered(blocks: int = 13, seed: int = 0, spare: int = 5) -> TokenFile:
    """Tokens 0, 1, 2, ...: a block shows its index."""
    return TokenFile(np.arange(blocks * SEQUENCE + 1 + spare, dtype=np.uint16), SEQUENCE, seed)


def indices(blocks: Tensor) -> list[int]:
    for block in blocks:
        assert torch.equal(block, torch.arange(int(block[0]), int(block[0]) + SEQUENCE + 1))
    return [int(block[0]) // SEQUENCE for block in blocks]


def test_every_block_comes_once_per_epoch_in_a_new_order() -> None:
    source = numbered()
    epochs = [indices(source.take(13, 0, 1)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    assert indices(numbered().take(30, 0, 1)) == indices(numbered().take(30, 0, 1))
    assert indices(numbered().take(13, 0, 1)) != indices(numbered(seed=1).take(13, 0, 1))


def test_exactly_one_block_is_enough_and_less_is_an_error() -> None:
    assert indices(numbered(blocks=1, spare=0).take(3, 0, 1)) == [0, 0, 0]
    with pytest.raises(UserError, match="17"):
        TokenFile(np.arange(SEQUENCE), SEQUENCE, 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_disjoint_shares_of_the_same_blocks(world_size: int) -> None:
    alone, ranks = numbered(), [numbered() for _ in range(world_size)]
    for _ in range(5):  # 40 blocks: over the ends of three epochs
        expected = indices(alone.take(8, 0, 1))
        shares = [indices(source.take(8, rank, world_size)) for rank, source in enumerate(ranks)]
        assert all(len(share) == 8 // world_size for share in shares)
        assert Counter(i for share in shares for i in share) == Counter(expected)


def test_it_continues_exactly_at_any_position_on_any_ranks() -> None:
    whole = indices(numbered().take(60, 0, 1))
    for position in range(4, 48, 4):
        before = numbered()
        before.take(position, 0, 1)
        again = numbered()
        again.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
        assert indices(again.take(12, 0, 1)) == whole[position : position + 12]
        for rank in range(4):
            shard = numbered()
            shard.load_state_dict(before.state_dict())
            assert indices(shard.take(12, rank, 4)) == whole[position + 3 * rank : position + 3 * rank + 3]


# -------------------------------------------------------------------------------------------------------- held-out text


def test_held_out_documents_never_train_and_duplicates_stay_together(tmp_path: Path) -> None:
    texts = documents(200)
    twice = [*texts, *reversed(texts)]
    data = prepare(write_jsonl(tmp_path / "a.jsonl", twice), tmp_path, "evaluation.tokens=1000000")
    trained = documents_of(data, tokens_of(data, tmp_path, "train"))
    held_out = documents_of(data, tokens_of(data, tmp_path, "validation"))
    assert not set(trained) & set(held_out)
    assert Counter(trained + held_out) == Counter(twice)
    assert 0.04 < len(held_out) / len(twice) < 0.2  # a tenth, of few


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path: Path) -> None:
    marked = [t + (" zyzzyva" * 30 if lot(t + " zyzzyva" * 30) < 0.1 else "") for t in documents(300)]
    held_out = [t for t in marked if "zyzzyva" in t]
    assert all(lot(t) < 0.1 for t in held_out)
    assert len(held_out) > 5
    data = prepare(write_jsonl(tmp_path / "a.jsonl", marked), tmp_path, "data.vocab_size=400")
    assert not any("zyz" in token for token in data.tokenizer.get_vocab())


def test_a_small_text_holds_out_at_least_one_document(tmp_path: Path) -> None:
    texts = documents(12, seed=2)
    assert min(map(lot, texts)) > 0.001
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = prepare(path, tmp_path, "data.validation_fraction=0.001", "evaluation.tokens=100000")
    assert documents_of(data, tokens_of(data, tmp_path, "validation")) == [min(texts, key=lot)]
    assert len(documents_of(data, tokens_of(data, tmp_path, "train"))) == 11


def test_copies_of_held_out_documents_are_left_out_of_training(tmp_path: Path) -> None:
    texts = documents(60)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts[:10])
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = prepare(path, tmp_path, f"data.validation={held_out}", "evaluation.tokens=100000")
    assert documents_of(data, tokens_of(data, tmp_path, "train")) == texts[10:]
    assert documents_of(data, tokens_of(data, tmp_path, "validation")) == texts[:10]


def test_the_file_of_held_out_text_may_lie_in_the_folder_of_training_text(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(50))
    held_out = write_jsonl(folder / "validation.jsonl", documents(10, seed=8))
    data = prepare(folder, tmp_path, f"data.validation={held_out}")
    assert documents_of(data, tokens_of(data, tmp_path, "train")) == documents(50)
    assert "also in data.validation" in error(held_out, tmp_path / "same", f"data.validation={held_out}")


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 160, 300, 10**6])
def test_validation_blocks_hold_the_first_held_out_tokens_once_each(tmp_path: Path, text: Path, limit: int) -> None:
    data = prepare(text, tmp_path, f"evaluation.tokens={limit}")
    stored = tokens_of(data, tmp_path, "validation")
    everything = prepare(text, tmp_path / "all", "evaluation.tokens=1000000")
    held_out = tokens_of(everything, tmp_path / "all", "validation")
    count = min(limit, len(held_out) - 1)
    assert stored == held_out[: count + 1]

    inputs, labels = data.validation[:, :-1].flatten(), data.validation[:, 1:].flatten()
    counted = labels != IGNORED
    assert labels[counted].tolist() == held_out[1 : count + 1]
    assert inputs[counted].tolist() == held_out[:count]
    assert data.validation.shape == (-(-count // SEQUENCE), SEQUENCE + 1)


def test_held_out_text_may_be_a_file(tmp_path: Path, text: Path) -> None:
    other = documents(20, seed=7)
    data = prepare(text, tmp_path, f"data.validation={write_jsonl(tmp_path / 'other.jsonl', other)}")
    held_out = documents_of(data, tokens_of(data, tmp_path, "validation"))
    assert held_out == other[: len(held_out)]
    assert held_out
    assert documents_of(data, tokens_of(data, tmp_path, "train")) == documents(300)


# ------------------------------------------------------------------------------------------------------------ streaming

STREAMS = 4


@pytest.fixture(scope="module", params=["one file", "many files"])
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Data]:
    """A streamed data set of 24 documents, and its configuration."""
    folder = tmp_path_factory.mktemp("streamed")
    texts = documents(24, seed=3)
    if request.param == "one file":
        path = write_jsonl(folder / "all.jsonl", texts)
    else:
        path = folder / "parts"
        path.mkdir()
        for i in range(8):
            write_jsonl(path / f"part-{i}.jsonl", texts[i * 3 : (i + 1) * 3])
    words = ("data.streaming=true", f"data.streams={STREAMS}")
    return settings(path, *words), prepare(path, folder, *words)


def stream(streamed: tuple[Config, Data]) -> TokenStream:
    config, data = streamed
    return TokenStream(config, data.tokenizer, 0.1)


def take(source: TrainingBlocks, count: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    return source.take(count, rank, world_size).tolist()


LONG = 480  # blocks: more than twice the data


@pytest.fixture(scope="module")
def long_read(streamed: tuple[Config, Data]) -> list[list[int]]:
    return take(stream(streamed), LONG)


def test_a_stream_reads_every_training_document_and_starts_again(
    streamed: tuple[Config, Data], long_read: list[list[int]]
) -> None:
    config, data = streamed
    expected = [text for text in local_documents(str(config.data.path), "text") if lot(text) >= 0.1]
    assert 0 < len(expected) < 24
    seen: set[str] = set()
    for part in range(STREAMS):
        blocks = long_read[part::STREAMS]
        for before, after in pairwise(blocks):
            assert before[-1] == after[0]  # the last label opens the next block
        read = documents_of(data, [token for block in blocks for token in block[:-1]])
        period = len(set(read))
        assert len(read) > 2 * period  # the end was passed twice
        assert read == [read[i % period] for i in range(len(read))]
        assert not seen & set(read)
        seen |= set(read)
    assert seen == set(expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_stream_gives_every_number_of_ranks_the_same_steps(
    streamed: tuple[Config, Data], long_read: list[list[int]], world_size: int
) -> None:
    ranks = [stream(streamed) for _ in range(world_size)]
    for step in range(10):
        shares = [take(source, 8, rank, world_size) for rank, source in enumerate(ranks)]
        expected = long_read[step * 8 : step * 8 + 8]
        assert sorted(block for share in shares for block in share) == sorted(expected)


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """As a checkpoint does: keys of one rank only, or equal ones."""
    total: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            assert total.setdefault(key, value) == value, key
    return pickle.loads(pickle.dumps(total))


@pytest.mark.parametrize("position", [4, 8, 20, 100, 176, 252, 300, 420])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_a_stream_continues_exactly_on_any_ranks(
    streamed: tuple[Config, Data], long_read: list[list[int]], position: int, before: int, after: int
) -> None:
    """Positions within documents, and after one and two restarts at the end of the data."""
    sources = [stream(streamed) for _ in range(before)]
    for rank, source in enumerate(sources):
        source.take(position, rank, before)
    state = merged([source.state_dict() for source in sources])
    shares = []
    for rank in range(after):
        source = stream(streamed)
        source.load_state_dict(state)
        shares += take(source, 60, rank, after)
    assert sorted(shares) == sorted(long_read[position : position + 60])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_saved_before_all_its_parts_were_read_again_keeps_the_others(
    streamed: tuple[Config, Data], long_read: list[list[int]], world_size: int
) -> None:
    """Small steps: after a resume some parts are untouched, or give a block that was read ahead, when it is saved."""
    state: dict[str, Any] | None = None
    got: list[list[int]] = []
    for _ in range(50):
        sources = [stream(streamed) for _ in range(world_size)]
        for rank, source in enumerate(sources):
            if state is not None:
                source.load_state_dict(state)
            got += take(source, 2, rank, world_size)
        state = merged([source.state_dict() for source in sources])
    assert got == long_read[: len(got)]


def test_a_stream_whose_parts_are_too_many_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(12))
    data = prepare(path, tmp_path, "data.streaming=true", "data.streams=20", "data.validation_fraction=0.3")
    with pytest.raises(UserError, match=r"lower data\.streams"):
        data.train.take(40, 0, 1)


def test_streams_must_divide_by_the_ranks(tmp_path: Path, text: Path) -> None:
    class TwoRanks(OneRank):
        world_size = 2

    with pytest.raises(UserError, match=r"data\.streams=3 does not divide"):
        prepare_data(settings(text, "data.streaming=true", "data.streams=3"), TwoRanks(), tmp_path / "data")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- the folder and mistakes


def test_tokenizing_happens_once_per_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(100))
    first = prepare(path, tmp_path)
    monkeypatch.setattr(data_module, "local_documents", lambda *_: pytest.fail("the text was read again"))
    second = prepare(path, tmp_path)
    assert second.description == first.description
    assert take(second.train, 5) == take(first.train, 5)
    assert torch.equal(second.validation, first.validation)


def test_an_interrupted_preparation_is_started_over(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(text, tmp_path)
    monkeypatch.undo()
    assert prepare(text, tmp_path).description["train_tokens"] > 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("seq_len=8", "seq_len"),
        ("data.vocab_size=310", "data.tokenizer was 'bpe-300', is 'bpe-310'"),
        ("seed=5", "seed"),
        ("evaluation.tokens=200", "evaluation.tokens"),
        ("data.path=ELSEWHERE", "data.path"),
        ("data.validation_fraction=0.2", "data.validation_fraction"),
        ("data.streaming=true", "data.streams"),
    ],
)
def test_other_data_in_the_folder_of_a_trained_run_is_refused(tmp_path: Path, text: Path, word: str, key: str) -> None:
    prepare(text, tmp_path)
    trained = tmp_path / "run" / "checkpoints" / "step-1"
    trained.mkdir(parents=True)
    (trained / ".metadata").touch()
    elsewhere = str(write_jsonl(tmp_path / "elsewhere.jsonl", documents(50)))
    message = error(text, tmp_path, word.replace("ELSEWHERE", elsewhere))
    assert key in message
    assert "set run_dir to another folder" in message


def prepare_shared(path: Path, folder: Path, *words: str) -> Data:
    config = settings(path, f"data.folder={folder}", *words)
    return prepare_data(config, OneRank(), folder)  # type: ignore[arg-type]


def test_runs_may_share_tokens_whatever_their_seed_and_length(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_shared(text, tmp_path / "tokens")
    monkeypatch.setattr(data_module, "local_documents", lambda *_: pytest.fail("the text was read again"))
    second = prepare_shared(text, tmp_path / "tokens", "seed=5", "seq_len=8")
    assert second.description["sha1"] == first.description["sha1"]
    assert (first.description["seed"], second.description["seed"]) == (0, 5)
    assert take(second.train, 1) != take(first.train, 1)


def test_other_tokens_in_a_shared_folder_are_never_replaced(tmp_path: Path, text: Path) -> None:
    prepare_shared(text, tmp_path / "tokens")
    with pytest.raises(
        UserError, match=r"data\.folder=.* holds other tokens: data\.tokenizer was 'bpe-300', is 'bpe-310'"
    ):
        prepare_shared(text, tmp_path / "tokens", "data.vocab_size=310")


def test_one_run_tokenizes_for_those_that_wait(tmp_path: Path, text: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_prepare_and_tell, args=(text, tmp_path / "tokens")) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert (tmp_path / "tokens.told").read_text() == "tokenized\n"


def _prepare_and_tell(text: Path, folder: Path) -> None:
    write = data_module._write

    def telling(file: Path, *more: Any) -> int:
        if file.stem == "train":
            with folder.with_name("tokens.told").open("a") as told:
                told.write("tokenized\n")
        return write(file, *more)

    data_module._write = telling
    prepare_shared(text, folder)


def test_before_any_training_other_data_simply_replaces_what_was_prepared(tmp_path: Path, text: Path) -> None:
    prepare(text, tmp_path)
    path = write_jsonl(tmp_path / "elsewhere.jsonl", documents(50, seed=4))
    data = prepare(path, tmp_path, "seq_len=8")
    assert documents_of(data, tokens_of(data, tmp_path, "train"))[0] in documents(50, seed=4)
    assert data.validation.shape[1] == 9


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}'])
def test_a_damaged_record_of_the_data_is_named(tmp_path: Path, text: Path, content: str) -> None:
    prepare(text, tmp_path)
    (tmp_path / "run" / "data" / "data.json").write_text(content)
    assert "data.json is damaged" in error(text, tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_a_token_file_that_was_cut_is_named(tmp_path: Path, text: Path, name: str) -> None:
    prepare(text, tmp_path)
    file = tmp_path / "run" / "data" / name
    file.write_bytes(file.read_bytes()[:-20])
    assert name in error(text, tmp_path)


def test_the_description_tells_texts_apart_that_have_the_same_name(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        path = write_jsonl(tmp_path / "a.jsonl", documents(100, seed))
        found.append(prepare(path, tmp_path / str(seed)).description)
    assert found[0]["data.path"] == found[1]["data.path"]
    assert found[0] != found[1]


def test_a_tokenizer_of_ones_own(tmp_path: Path, text: Path) -> None:
    prepare(text, tmp_path / "first")
    folder = tmp_path / "first" / "run" / "data" / "tokenizer"
    other = write_jsonl(tmp_path / "b.jsonl", documents(100, seed=9))
    data = prepare(other, tmp_path, f"data.tokenizer={folder}")
    assert documents_of(data, tokens_of(data, tmp_path, "train"))[0] in documents(100, seed=9)
    assert len(data.tokenizer) == 300


def test_a_text_cannot_produce_the_end_of_text_token(tmp_path: Path) -> None:
    """Or a document could end where it does not, and text that quotes the token would not come back."""
    texts = [f"{text} <|endoftext|> and on" for text in documents(60)]
    data = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path)
    assert documents_of(data, tokens_of(data, tmp_path, "train")) == [t for t in texts if lot(t) >= 0.1]


def test_a_tokenizer_that_is_not_there_or_cannot_end_a_text(tmp_path: Path, text: Path) -> None:
    assert "cannot load data.tokenizer=no/such" in error(text, tmp_path, "data.tokenizer=no/such")
    (tmp_path / "bare").mkdir()
    message = error(text, tmp_path, f"data.tokenizer={tmp_path / 'bare'}")
    assert f"{tmp_path / 'bare'}: the folder holds no tokenizer; expected one of tokenizer.json, vocab.json" in message
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "endless")
    assert "no end-of-text token" in error(text, tmp_path, f"data.tokenizer={tmp_path / 'endless'}")


def test_a_dataset_name_that_cannot_be_reached(tmp_path: Path) -> None:
    message = error("nobody/nothing", tmp_path, "data.name=en")
    assert "data.path=nobody/nothing" in message
    assert "neither a local path nor a Hugging Face dataset" in message


def unreadable(folder: Path, kind: str) -> Path:
    """A file or folder with no text in it, each in its own way."""
    match kind:
        case "empty jsonl":
            (folder / "a.jsonl").write_text("")
            return folder / "a.jsonl"
        case "empty txt":
            (folder / "a.txt").write_text("")
            return folder / "a.txt"
        case "empty documents":
            return write_jsonl(folder / "a.jsonl", [""] * 10)
        case "broken parquet":
            (folder / "a.parquet").write_bytes(b"PAR1 this is not a table")
            return folder / "a.parquet"
        case "broken jsonl":
            (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
            return folder / "a.jsonl"
        case "binary txt":
            (folder / "a.txt").write_bytes(bytes(range(128, 256)) * 10)
            return folder / "a.txt"
        case "no column":
            return write_jsonl(folder / "a.jsonl", documents(10), key="body")
        case "column of numbers":
            return parquet(folder / "a.parquet", ["x"] * 10, key="other")
        case "unknown suffix":
            (folder / "a.docx").write_text("text")
            return folder / "a.docx"
        case "no suffix":
            (folder / "README").write_text("text")
            return folder / "README"
        case "empty folder":
            (folder / "nothing").mkdir()
            return folder / "nothing"
        case "mixed folder":
            write_jsonl(folder / "a.jsonl", ["text"])
            parquet(folder / "b.parquet", ["text"])
            return folder
    raise AssertionError(kind)


KINDS = {
    "empty jsonl": "text",
    "empty txt": "no",
    "empty documents": "no",
    "broken parquet": "a.parquet",
    "broken jsonl": "cannot",
    "binary txt": "cannot",
    "no column": "set data.text_key to one of body",
    "column of numbers": "set data.text_key to one of other, number",
    "unknown suffix": ".docx",
    "no suffix": "nameless",
    "empty folder": "no file to read",
    "mixed folder": "mixes files of kinds json, parquet",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_cannot_be_read(tmp_path: Path, kind: str, streaming: bool) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    path = unreadable(folder, kind)
    message = error(path, tmp_path, f"data.streaming={str(streaming).lower()}")
    assert KINDS[kind] in message
    assert not (tmp_path / "run" / "data").exists()


def test_a_column_that_is_not_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS)
    assert "column 'number' holds int" in error(path, tmp_path, "data.text_key=number")


def test_too_little_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(30))
    assert "seq_len + 1 = 50001" in error(path, tmp_path, "seq_len=50000", "evaluation.tokens=20")


def test_no_held_out_text(tmp_path: Path, text: Path) -> None:
    assert "data.validation_fraction=0" in error(text, tmp_path, "data.validation_fraction=0")
    assert "data.validation_fraction=0" in error(text, tmp_path, "data.validation_fraction=0", "data.streaming=true")


def test_everything_held_out(tmp_path: Path, text: Path) -> None:
    assert "no training text" in error(text, tmp_path, "data.validation_fraction=1")


def test_validation_text_that_does_not_exist(tmp_path: Path, text: Path) -> None:
    assert "data.validation=no/such.jsonl does not exist" in error(text, tmp_path, "data.validation=no/such.jsonl")
