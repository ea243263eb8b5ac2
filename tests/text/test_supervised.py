"""Prompts with responses: what is learned of them, how they are laid out, and that every learned token weighs alike."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.data.blocks import TokenFile
from lowrank_train.data.documents import Example, lot
from lowrank_train.data.tokens import Data, prepare_data
from lowrank_train.text.labels import IGNORED, count_labels, lay_out, positions, split, starting, unlabelled
from lowrank_train.train.metrics import read_metrics
from tests.data.test_data import OneRank
from tests.runs import SEQUENCE, Launched, arguments, failure, losses, train_on

END = 0  # the id whose stored form is nearest to IGNORED
WORDS = 60
KEYS = ("data.prompt_key=prompt", "data.response_key=response")


def ids(words: str) -> list[int]:
    """Of the tiny tokenizer: w0, w1, ... are 2, 3, ..."""
    return [int(word[1:]) + 2 for word in words.split()]


def say(numbers: Sequence[int]) -> str:
    return " ".join(f"w{number}" for number in numbers)


def row(prompt: object, response: object) -> dict[str, object]:
    return {"prompt": prompt, "response": response}


def write(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that names a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<end>": END, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return f"data.tokenizer={folder}"


def prepare(path: Path | str, folder: Path, *words: str, seq_len: int = 8) -> Data:
    config = load_config([f"data.path={path}", *KEYS, f"seq_len={seq_len}", "evaluation.tokens=16", *words])
    return prepare_data(config, OneRank(), folder / "run" / "data")  # type: ignore[arg-type]


def error(path: Path | str, folder: Path, *words: str, seq_len: int = 8) -> str:
    with pytest.raises(UserError) as caught:
        prepare(path, folder, *words, seq_len=seq_len)
    return str(caught.value)


def stored(folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / "run" / "data" / f"{name}.bin", dtype="int32").tolist()


def token(stored: int) -> int:
    return -(2**30) - stored if stored <= -(2**30) else max(stored, IGNORED - 1 - stored)


def hidden(*tokens: int) -> list[int]:
    return [unlabelled(t) for t in tokens]


def marked(tokens: Sequence[int]) -> list[int]:
    """The first token starts an example."""
    return [starting(tokens[0]), *tokens[1:]]


# ---------------------------------------------------------------------------------------------------------- what counts


def test_stored_tokens_become_inputs_and_labels() -> None:
    """An id of 0 and padding stay apart, though both are the input 0."""
    highest = 2**30 - 200
    some = [0, *hidden(0, 1, highest), starting(0), starting(1), starting(unlabelled(highest)), IGNORED]
    assert len(set(some)) == len(some)
    assert all(np.int32(one) == one for one in some)
    assert starting(unlabelled(1)) == starting(1) == starting(starting(1))
    blocks = torch.tensor([[starting(7), *hidden(0), 5, 0, *hidden(9)], [3, IGNORED, starting(4), 6, IGNORED]])
    inputs, labels = split(blocks)
    assert inputs.tolist() == [[7, 0, 5, 0], [3, 0, 4, 6]]
    assert labels.tolist() == [[IGNORED, 5, 0, IGNORED], [IGNORED, IGNORED, 6, IGNORED]]
    assert count_labels(blocks) == 3
    assert max(hidden(0)) < IGNORED
    assert positions(blocks).tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_blocks_of_plain_text_are_split_as_ever() -> None:
    blocks = torch.randint(0, 70_000, (5, 17))
    inputs, labels = split(blocks)
    assert torch.equal(inputs, blocks[:, :-1])
    assert torch.equal(labels, blocks[:, 1:])
    assert count_labels(blocks) == 80


BY_HAND = [
    row("w1 w2", "w3 w4"),
    row("", "w5"),
    row("w6", "w7"),  # does not fit the one place left
    row("w0 w1 w2 w3 w4 w5 w6 w7", "w8"),  # longer than a row, and nothing of the response is left
    row("w9", ""),
    row("w9", None),
    row(None, "w10 w11 w12 w13"),  # fills the row exactly
    row("w14", "w15 w16 w17 w18 w19 w20 w21 w22"),  # cut
    row("w23", "w24"),
]
LAID_OUT = [
    [*marked([*hidden(*ids("w1 w2")), *ids("w3 w4"), END]), *marked([*ids("w5"), END]), *hidden(END)],
    [*marked([*hidden(*ids("w6")), *ids("w7"), END]), *marked([*ids("w10"), *ids("w11 w12 w13"), END])],
    marked([*hidden(*ids("w14")), *ids("w15 w16 w17 w18 w19 w20 w21")]),
    [*marked([*hidden(*ids("w23")), *ids("w24"), END]), *hidden(END, END, END, END, END)],
]


def test_examples_are_laid_out_in_rows(tmp_path: Path, tokenizer: str) -> None:
    held_out = write(tmp_path / "held_out.jsonl", [row("w30", "w31")])
    data = prepare(write(tmp_path / "a.jsonl", BY_HAND), tmp_path, tokenizer, f"data.validation={held_out}")
    assert stored(tmp_path, "train") == [*itertools.chain(*LAID_OUT), *hidden(END)]
    assert data.description["train_tokens"] == 4 * 8 + 1
    assert data.description["dtype"] == "int32"
    assert data.description["examples_cut"] == 2
    found = json.loads((tmp_path / "run" / "data" / "data.json").read_text())["found"]
    assert found["examples_cut"] == 2

    assert isinstance(data.train, TokenFile)
    assert data.train.blocks == 4
    inputs, labels = split(data.train.take(4, 0, 1))
    assert (labels[:, -1] == IGNORED).all()  # it would be the first token of another row
    learned = Counter(labels[labels != IGNORED].tolist())
    assert learned == Counter(ids("w3 w4 w7 w11 w12 w13 w15 w16 w17 w18 w19 w20 w21 w24") + 5 * [END])
    order = [int(i) for i in torch.stack([(inputs == i).any(1).int().argmax() for i in ids("w1 w6 w14 w23")])]
    assert inputs[order].tolist() == [[token(t) for t in one] for one in LAID_OUT]


def test_no_example_goes_over_the_end_of_a_row_and_none_learns_its_first_token() -> None:
    """Of many random ones, each as its own run of numbers."""
    chooser = random.Random(0)
    made, start = [], 1
    for _ in range(300):
        prompt, response = chooser.randint(0, 9), chooser.randint(2, 12)
        numbers = list(range(start, start + prompt + response))
        made.append([*hidden(*numbers[:prompt]), *numbers[prompt:]])
        start = numbers[-1] + 1
    seen: Counter[str] = Counter()
    rows = list(lay_out(made, SEQUENCE, END, seen))
    assert rows.pop() == hidden(END)
    assert all(len(one) == SEQUENCE for one in rows)
    assert seen["cut"] == sum(len(one) > SEQUENCE for one in made) > 10
    place = {token(t): (i, t) for i, one in enumerate(rows) for t in one}
    for one in made:
        numbers = [token(t) for t in one[:SEQUENCE]]
        assert len({place[number][0] for number in numbers}) == 1
        assert place[numbers[0]][1] < 0
        assert [place[number][1] for number in numbers[1:]] == one[1:SEQUENCE]
        assert not place.keys() & set(one[SEQUENCE:])
    for before, after in itertools.pairwise(rows):  # a new row only where the next does not fit
        used = SEQUENCE - next((k for k, t in enumerate(reversed(before)) if t != unlabelled(END)), SEQUENCE)
        whole = next(one for one in made if token(one[0]) == token(after[0]))
        assert used + len(whole[:SEQUENCE]) > SEQUENCE


# ---------------------------------------------------------------------------------------------------------- held out


def many(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows of 9 to 16 tokens, so that each fills a row of 16; from 1 to 14 of them are learned, and the end."""
    chooser = random.Random(seed)
    rows = []
    for i in range(count):
        length = chooser.randint(8, 14)
        learned = 1 if i % 2 else length
        numbers = [chooser.randrange(WORDS) for _ in range(length + 1)]
        rows.append(row(say(numbers[: len(numbers) - learned]), say(numbers[len(numbers) - learned :])))
    return rows


def as_stored(one: dict[str, object]) -> list[int]:
    return marked([*hidden(*ids(str(one["prompt"]))), *ids(str(one["response"])), END])


def shown(one: Sequence[int]) -> list[int]:
    """Without the filling."""
    return list(one[: SEQUENCE - next(k for k, t in enumerate(reversed(one)) if t != unlabelled(END))])


def rows_of(tokens: Sequence[int]) -> list[list[int]]:
    assert tokens[-1] < 0
    return [list(tokens[k : k + SEQUENCE]) for k in range(0, len(tokens) - 1, SEQUENCE)]


def test_held_out_examples_are_drawn_by_prompt_and_response(tmp_path: Path, tokenizer: str) -> None:
    rows = many(200)
    words = (tokenizer, "data.validation_fraction=0.1", "evaluation.tokens=100000")
    prepare(write(tmp_path / "a.jsonl", [*rows, *rows[:20]]), tmp_path, *words, seq_len=SEQUENCE)
    held_out = [one for one in rows if lot(str(one["prompt"]) + str(one["response"])) < 0.1]
    assert 8 < len(held_out) < 40
    assert lot(Example("ab", "c")) == lot("abc")
    got = [shown(one) for one in rows_of(stored(tmp_path, "validation"))]
    assert [one for one in got if one in map(as_stored, rows[20:])] == [
        as_stored(one) for one in held_out if one in rows[20:]
    ]
    trained = [shown(one) for one in rows_of(stored(tmp_path, "train"))]
    assert trained == [as_stored(one) for one in [*rows, *rows[:20]] if one not in held_out]


@pytest.mark.parametrize("tokens", [16, 31, 32, 10**6])
def test_validation_is_of_whole_rows(tmp_path: Path, tokenizer: str, tokens: int) -> None:
    """From a file of their own, which may lie beside the training examples; copies of them are not trained."""
    rows = many(40)
    folder = tmp_path / "corpus"
    folder.mkdir()
    held_out = write(folder / "held_out.jsonl", rows[:5])
    write(folder / "a.jsonl", rows)
    words = (tokenizer, f"data.validation={held_out}", f"evaluation.tokens={tokens}")
    data = prepare(folder, tmp_path, *words, seq_len=SEQUENCE)
    count = min(tokens // SEQUENCE, 5)
    assert data.validation.shape == (count, SEQUENCE + 1)
    assert [shown(one) for one in data.validation[:, :-1].tolist()] == [as_stored(one) for one in rows[:count]]
    inputs, labels = split(data.validation)
    assert (inputs >= 0).all()
    assert count_labels(data.validation) == sum(len(ids(str(one["response"]))) + 1 for one in rows[:count])
    assert (labels[:, -1] == IGNORED).all()
    assert len(rows_of(stored(tmp_path, "train"))) == 35


def test_a_tokenizer_learns_prompts_and_responses(tmp_path: Path) -> None:
    rows = [row(f"{i} zyzzyva zyzzyva", f"quokka quokka {i}") for i in range(60)]
    data = prepare(write(tmp_path / "a.jsonl", rows), tmp_path, "data.vocab_size=300", "data.validation_fraction=0.1")
    vocabulary = data.tokenizer.get_vocab()
    assert "Ġzyzzyva" in vocabulary
    assert "Ġquokka" in vocabulary


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("examples") / "a.jsonl", many(64))


def words(path: Path, run_dir: Path, tokenizer: str, *more: str) -> list[str]:
    return arguments(path, run_dir, *KEYS, tokenizer, "steps=6", *more, precision="float64")


def literal_loss(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """Each example alone, each position by itself."""
    every = []
    for one in rows:
        tokens = torch.tensor([token(t) for t in one])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        for k in range(1, len(one)):
            if one[k] >= 0:
                every.append(-functional.log_softmax(logits[k - 1], 0)[tokens[k]])
    return float(torch.stack(every).mean())


def test_the_loss_is_that_of_the_examples_one_by_one(tmp_path: Path, tokenizer: str, examples: Path) -> None:
    """At a rate of 0 the exported model is the one that computed every loss; one step is all examples."""
    held_out = write(tmp_path / "held_out.jsonl", many(9, seed=5))
    step = ("steps=1", f"tokens_per_step={64 * SEQUENCE}", "optimizer.lr=0", f"data.validation={held_out}")
    (record,) = train_on(1, words(examples, tmp_path / "run", tokenizer, *step))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "huggingface", dtype=torch.float64).eval()
    assert losses(tmp_path / "run") == [pytest.approx(literal_loss(model, [*map(as_stored, many(64))]), rel=1e-10)]
    alone = [*map(as_stored, many(9, seed=5))]
    assert record.validation_loss == pytest.approx(literal_loss(model, alone), rel=1e-10)
    assert record.validation_tokens == sum(t >= 0 for one in alone for t in one)
    (trained,) = [r for r in read_metrics(tmp_path / "run") if "train/tokens" in r]
    assert trained["train/tokens"] == 64 * SEQUENCE


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, examples: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    train_on(1, words(examples, run_dir, tokenizer))
    return run_dir


def history(run_dir: Path, *keys: str) -> list[float]:
    return [r[key] for r in read_metrics(run_dir) for key in keys if key in r]


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(2, []), (2, ["parallel.replicas=2"]), (1, ["micro_batch=1"]), (4, [])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_learned_token_weighs_the_same_on_any_ranks(
    tmp_path: Path, tokenizer: str, examples: Path, alone: Path, world_size: int, more: list[str]
) -> None:
    def note() -> None:
        original = TokenFile.take

        def take(self: TokenFile, *given: int) -> Tensor:
            blocks = original(self, *given)
            with (tmp_path / f"labels-{dist.get_rank()}").open("a") as file:
                file.write(f"{count_labels(blocks)}\n")
            return blocks

        TokenFile.take = take  # type: ignore[method-assign, assignment]

    train_on(world_size, words(examples, tmp_path / "run", tokenizer, *more), note)
    got, expected = (history(run, "train/loss", "train/grad_norm", "eval/loss") for run in (tmp_path / "run", alone))
    assert len(got) == 2 * 6 + 2
    assert got == pytest.approx(expected, rel=1e-9)
    if world_size > 1:  # or the mean of the ranks' means would be as good
        files = [tmp_path / f"labels-{r}" for r in range(world_size)]
        per_rank = [[int(line) for line in file.read_text().split()] for file in files]
        assert any(max(step) > 1.3 * min(step) for step in zip(*per_rank, strict=True))


def test_examples_are_learned(tmp_path: Path, tokenizer: str) -> None:
    """The response to a prompt, while the prompts, of which no two are alike, stay unknown."""
    rows = [row(say([i, 59 - i, (7 * i) % 50]), say([(3 * i) % 60, (5 * i) % 60])) for i in range(24)]
    held_out = write(tmp_path / "held_out.jsonl", [row("w1 w2", "w3 w4")])
    more = ("steps=60", f"data.validation={held_out}", "optimizer.lr=1e-2", "evaluation.tokens=16")
    train_on(1, words(write(tmp_path / "a.jsonl", rows), tmp_path / "run", tokenizer, *more))
    assert losses(tmp_path / "run")[-1] < 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "huggingface", dtype=torch.float64).eval()
    prompts = [ids(str(one["prompt"])) for one in rows]
    assert literal_loss(model, prompts) > 2.0


def test_a_step_without_labels_changes_nothing(tmp_path: Path, tokenizer: str, examples: Path) -> None:
    def hide(at: Callable[[int], bool]) -> Callable[[], None]:
        def install() -> None:
            original = TokenFile.take

            def take(self: TokenFile, *given: int) -> Tensor:
                blocks = original(self, *given)
                return torch.where(blocks < 0, blocks, IGNORED - 1 - blocks) if at(self.position) else blocks

            TokenFile.take = take  # type: ignore[method-assign, assignment]

        return install

    records = train_on(2, words(examples, tmp_path / "none", tokenizer), hide(lambda position: position == 8))
    assert records[0].skipped_steps == 0
    first, *others = losses(tmp_path / "none")
    assert first == 0
    assert min(others) > 1
    assert history(tmp_path / "none", "train/grad_norm")[0] == 0
    second = words(examples, tmp_path / "one", tokenizer)  # a rank that has none beside one that has
    train_on(2, second, hide(lambda position: position == 8 and dist.get_rank() == 1))
    assert min(losses(tmp_path / "one")) > 1


def test_what_a_user_types_trains_and_says_what_was_cut(tmp_path: Path, tokenizer: str) -> None:
    rows = [*many(40), *(row("w1 w2", say([*range(i, i + 20)])) for i in range(3))]
    held_out = write(tmp_path / "held_out.jsonl", many(2, seed=3))
    given = (f"data.validation={held_out}", "evaluation.tokens=32", "steps=2")
    log = tmp_path / "log"
    run = Launched(words(write(tmp_path / "a.jsonl", rows), tmp_path / "run", tokenizer, *given), log)
    assert run.finish() == 0, run.output
    assert run.output.count("3 examples are longer than seq_len=16 tokens and were cut") == 1


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_run_on_plain_text_from_before_there_were_prompts_goes_on(tmp_path: Path, text: Path) -> None:
    train_on(1, arguments(text, tmp_path, "steps=3", "checkpoint.every=3"))
    kept = [tmp_path / "data" / "data.json", tmp_path / "checkpoints" / "step-3" / "about.json"]
    for file in kept:
        (file.parent / "checksums.txt").unlink()  # such runs have none
        cleaned = json.loads(file.read_text())
        settings = cleaned.get("settings", cleaned)
        assert settings.pop("data.prompt_key") is None
        assert settings.pop("data.response_key") is None
        file.write_text(json.dumps(cleaned))
    (record,) = train_on(1, arguments(text, tmp_path, "steps=5"))
    assert (record.status, record.steps) == ("finished", 5)


def test_other_columns_are_other_data(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "a.jsonl", [{**one, "second": one["response"]} for one in many(64)])
    train_on(1, words(path, tmp_path / "run", tokenizer, "steps=2"))
    again = words(path, tmp_path / "run", tokenizer, "steps=4")
    message = failure([*again, "data.response_key=second"])
    assert "data.response_key was 'response', is 'second'" in message
    assert "data.prompt_key was 'prompt', is None" in failure(
        [*again, "data.prompt_key=null", "data.response_key=null", "data.text_key=text"]
    )
    train_on(1, again)


def test_shared_rows_are_of_one_length(tmp_path: Path, tokenizer: str, examples: Path) -> None:
    """Plain tokens may be read in blocks of any length."""
    shared = (tokenizer, f"data.folder={tmp_path / 'run' / 'data'}", "evaluation.tokens=64")
    prepare(examples, tmp_path, *shared, seq_len=SEQUENCE)
    prepare(examples, tmp_path, *shared, "seed=3", seq_len=SEQUENCE)
    assert "seq_len was 16, is 32" in error(examples, tmp_path, *shared, seq_len=32)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.response_key=null"], ["data.prompt_key=prompt", "data.response_key=None", "neither"]),
        (["data.prompt_key=null"], ["data.prompt_key=None", "data.response_key=response", "both"]),
        (["data.path=null"], ["data.path=null", "embedded", "set data.path"]),
        (["evaluation.tokens=7"], ["evaluation.tokens=7", "seq_len=8", "raise"]),
        (["data.streaming=true"], ["not streamed", "data.streaming=false"]),
        (["data.path=some/where"], ["not streamed", "data.streaming=false"]),
        (["data.path=some.jsonl"], ["data.path=some.jsonl does not exist"]),
        (["data.prompt_key=question"], ["'question' holds nothing", "data.prompt_key", "prompt, response, number"]),
        (["data.response_key=answer"], ["'answer' holds nothing", "data.response_key", "prompt, response, number"]),
        (["data.prompt_key=number"], ["'number' holds int", "data.prompt_key"]),
        (["data.response_key=number"], ["'number' holds int", "data.response_key"]),
        (["data.validation={folder}/other.jsonl"], ["data.validation=", "'response' holds nothing"]),
        (["data.validation={folder}/none.jsonl"], ["data.validation=", "does not exist"]),
        (["data.path={folder}/text.txt"], ["text.txt is plain text", "data.response_key needs JSON"]),
        (["data.path={folder}/long.jsonl"], ["no train example", "seq_len=8", "raise seq_len"]),
        (
            ["data.validation={folder}/long.jsonl"],
            ["no validation example", "seq_len=8", "raise seq_len", "data.validation"],
        ),
        (["data.validation_fraction=0"], ["no validation example", "data.validation_fraction=0.0"]),
    ],
    ids=lambda value: value[0] if len(value) == 1 else "",
)
def test_errors_say_what_to_do(tmp_path: Path, tokenizer: str, changes: list[str], expected: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", [{**one, "number": i} for i, one in enumerate(many(40))])
    write(tmp_path / "other.jsonl", [{"prompt": "w1", "text": "w2"}])
    write(tmp_path / "long.jsonl", [row(say(range(20 + i)), "w1") for i in range(30)])
    (tmp_path / "text.txt").write_text("w1 w2\n")
    message = error(
        path, tmp_path, tokenizer, "data.validation_fraction=0.2", *(c.format(folder=tmp_path) for c in changes)
    )
    assert not [part for part in expected if part not in message], message
