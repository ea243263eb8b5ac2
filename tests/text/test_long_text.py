"""A very long line needs no more memory than many short ones, and gives the same tokens."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_train.data.tokenizer import encode
from lowrank_train.text.long import ids_in_pieces
from tests.data.test_data import prepare, settings
from tests.runs import documents, write_jsonl

pytestmark = pytest.mark.slow

WORDS = " ".join(documents(400)).split()


def long_text(characters: int) -> str:
    """Words, double spaces, line ends and letters of several bytes."""
    chooser = random.Random(0)
    parts = []
    while characters > 0:
        parts.append(chooser.choice(WORDS) + chooser.choice([" ", " ", " ", "  ", "\n", " ü漢 "]))
        characters -= len(parts[-1])
    return "".join(parts)


def byte_level(path: Path) -> PreTrainedTokenizerBase:
    return prepare(write_jsonl(path / "a.jsonl", documents(60)), path).tokenizer


def sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """As LLaMA's: each text is given a space at its start, so that a cut would change the tokens."""
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    made.train_from_iterator(documents(60), BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def whitespace(path: Path) -> PreTrainedTokenizerBase:
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(documents(60), BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def without_spaces(characters: int) -> str:
    """As Chinese is written."""
    chooser = random.Random(0)
    letters = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
    sentences = ("".join(chooser.choices(letters, k=chooser.randint(4, 20))) for _ in range(characters // 5))
    return "\u3002".join(sentences)[: characters // 3]  # the full stop; a letter has 3 bytes


def compact_json(characters: int) -> str:
    """As a program writes it, without a space."""
    chooser = random.Random(0)
    values = ({"id": i, "name": chooser.choice(WORDS), "of_it": chooser.random()} for i in range(characters // 20))
    return json.dumps(list(values), separators=(",", ":"))[:characters]


def one_word_a_line(characters: int) -> str:
    chooser = random.Random(0)
    return "\n".join(chooser.choices(WORDS, k=characters))[:characters]


KINDS = [long_text, without_spaces, compact_json, one_word_a_line]


def metaspace(path: Path) -> PreTrainedTokenizerBase:
    """As LLaMA 2's with words of their own: the space before a word belongs to it, and the first word is given one."""
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(documents(60), BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_level, metaspace, sentencepiece, whitespace])
def test_the_tokens_of_a_long_text_are_those_of_the_whole(tmp_path: Path, make: object) -> None:
    tokenizer = make(tmp_path)  # type: ignore[operator]
    for text in (*(kind(150_000) for kind in KINDS), long_text(120_000) + "x" * 120_000, "x" * 210_000):
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert encode(tokenizer, ["short", text])[1] == [*whole, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_one_long_line_needs_little_memory(tmp_path: Path, kind: Callable[[int], str]) -> None:
    """A line of 50 MB needed 6.8 GiB; this is one of 1 MB."""
    path = write_jsonl(tmp_path / "a.jsonl", [*documents(60), kind(1_000_000)])
    settings(path)  # imports
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_prepare, args=(path, tmp_path, answer))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    needed = answer.get()
    assert needed < 130 * 2**20


def _prepare(path: Path, folder: Path, answer: multiprocessing.SimpleQueue[int]) -> None:
    prepare(write_jsonl(folder / "small.jsonl", documents(60)), folder / "small")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    prepare(path, folder)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    answer.put(int(peak.split()[1]) * 1024 - before)


@pytest.mark.parametrize("make", [byte_level, metaspace, whitespace])
def test_a_tokenizer_is_never_given_a_long_text_whole(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """One that begins every text with a space is given the next part without its space."""
    tokenizer: Any = make(tmp_path)
    given: list[int] = []

    def ids(texts: list[str]) -> list[list[int]]:
        given.extend(map(len, texts))
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    text = long_text(350_000)
    assert ids_in_pieces(ids, [text]) == [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    assert max(given) < 110_000
