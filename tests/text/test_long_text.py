"""A very long line needs no more memory than many short ones, and gives the same tokens."""

from __future__ import annotations

import multiprocessing
import random
import resource
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_train.data.tokenizer import encode
from tests.data.test_data import prepare, settings
from tests.runs import documents, write_jsonl

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


@pytest.mark.parametrize("make", [byte_level, sentencepiece, whitespace])
def test_the_tokens_of_a_long_text_are_those_of_the_whole(tmp_path: Path, make: object) -> None:
    tokenizer = make(tmp_path)  # type: ignore[operator]
    for text in (long_text(350_000), long_text(120_000) + "x" * 120_000, "x" * 210_000):
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert encode(tokenizer, ["short", text])[1] == [*whole, tokenizer.eos_token_id]


def test_one_long_line_needs_little_memory(tmp_path: Path) -> None:
    """A line of 50 MB needed 6.8 GiB; this is one of 2 MB."""
    path = write_jsonl(tmp_path / "a.jsonl", [*documents(60), long_text(2_000_000)])
    settings(path)  # imports
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_prepare, args=(path, tmp_path, answer))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    needed = answer.get()
    assert needed < 150 * 2**20


def _prepare(path: Path, folder: Path, answer: multiprocessing.SimpleQueue[int]) -> None:
    prepare(write_jsonl(folder / "small.jsonl", documents(60)), folder / "small")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    prepare(path, folder)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    answer.put(int(peak.split()[1]) * 1024 - before)
