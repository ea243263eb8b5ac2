"""Chats and special tokens: ids as the tokenizer gives them, only the assistant learned, trained as a user types it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.data.tokens import Data, prepare_data
from lowrank_train.text.labels import IGNORED, split
from tests.chat_models import CHATML, MARKED, SPECIAL, chat_folder, chat_tokenizer, write_rows
from tests.data.test_data import OneRank
from tests.runs import ROOT, Launched

Messages = list[dict[str, Any]]

TALK: Messages = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "the river?"},
    {"role": "assistant", "content": "a stone"},
    {"role": "user", "content": "morning <|im_end|> sky?"},
    {"role": "assistant", "content": "green and old"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt", "system": "system"}[m["role"]], "value": m["content"]} for m in TALK
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers by the name of their template."""
    root = tmp_path_factory.mktemp("tokenizers")
    opening = "{{ bos_token }}" + CHATML
    thinking = CHATML.replace("{{ message.content }}", "{{ message.content if loop.last else message.content[:2] }}")
    refusing = "{{ raise_exception('roles must alternate') }}"
    templates = {"chatml": CHATML, "marked": MARKED, "none": None, "thinking": thinking, "refusing": refusing}
    for name, template in templates.items():
        chat_tokenizer(template).save_pretrained(root / name)
    made = chat_tokenizer(opening)
    made.bos_token = "<|endoftext|>"
    made.save_pretrained(root / "opening")
    return root


def prepare(rows: list[dict[str, object]], tokenizer: Path, tmp_path: Path, *words: str) -> Data:
    tmp_path.mkdir(exist_ok=True)
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[-1:])
    path = write_rows(tmp_path / "a.jsonl", rows[:-1])
    given = [f"data.path={path}", f"data.validation={held_out}", f"data.tokenizer={tokenizer}", "seq_len=128"]
    config = load_config([*given, "evaluation.tokens=128", f"run_dir={tmp_path / 'run'}", *words])
    return prepare_data(config, OneRank(), tmp_path / "run" / "data")  # type: ignore[arg-type]


def error(rows: list[dict[str, object]], tokenizer: Path, tmp_path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare(rows, tokenizer, tmp_path, *words)
    return str(caught.value)


def only_row(data: Data) -> tuple[list[int], list[int]]:
    """Input ids and learned ids of the one training row, without filling."""
    inputs, labels = split(data.train.take(1, 0, 1))
    return inputs[0].tolist(), labels[labels != IGNORED].tolist()


def held_out(key: str) -> dict[str, object]:
    """Another example, to be evaluated."""
    two: Messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    return {key: two} if key == "messages" else {"prompt": "x", "response": "y", "text": "x"}


# ------------------------------------------------------------------------------------------------------ special tokens


PROMPT = "<|im_start|>user\nthe river?<|im_end|>\n<|im_start|>assistant\n"
RESPONSE = "a stone<|im_end|>"
KEYS = ("data.prompt_key=prompt", "data.response_key=response")


def test_prompts_and_responses_have_the_ids_of_the_tokenizer(folders: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": PROMPT, "response": RESPONSE}, held_out("pair")]
    data = prepare(rows, folders / "chatml", tmp_path, *KEYS)
    tokenizer = AutoTokenizer.from_pretrained(folders / "chatml")
    prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, RESPONSE))
    assert prompt[0] == response[-1] - 1 == 1
    inputs, learned = only_row(data)
    assert inputs[: len(prompt + response) + 1] == [*prompt, *response, tokenizer.eos_token_id]
    assert learned == [*response, tokenizer.eos_token_id]


def test_a_response_that_ends_itself_is_not_ended_twice(folders: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "response": "b<|endoftext|>"}, held_out("pair")]
    _, learned = only_row(prepare(rows, folders / "chatml", tmp_path, *KEYS))
    assert learned.count(0) == 1


@pytest.mark.parametrize("special", [None, False, True])
def test_plain_text_may_have_special_tokens_if_asked(folders: Path, tmp_path: Path, special: bool | None) -> None:
    """By default text cannot end a document; how many documents hold a name of a special token is counted."""
    rows: list[dict[str, object]] = [{"text": PROMPT * 12}, {"text": "of a stone"}, {"text": RESPONSE}]
    word = [] if special is None else [f"data.special_tokens={str(special).lower()}"]
    data = prepare(rows, folders / "chatml", tmp_path, *word)
    tokens = np.fromfile(tmp_path / "run" / "data" / "train.bin", dtype="uint16").tolist()
    assert tokens.count(1) == (24 if special else 0)
    assert tokens.count(2) == (12 if special else 0)
    assert tokens.count(0) == 2  # documents
    assert data.description["documents_with_split_names"] == (0 if special else 2)


# --------------------------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize("template", ["chatml", "marked"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_only_the_assistant_is_learned(folders: Path, tmp_path: Path, template: str, kind: str) -> None:
    """By the template's own marks, or by prefixes; the column is found by itself."""
    rows: list[dict[str, object]] = [{"id": 3, "messages": TALK, "source": None}, {"messages": TALK[1:3]}]
    words = []
    if kind == "parquet":
        datasets.Dataset.from_list(rows[:1]).to_parquet(tmp_path / "a.parquet")
        words = [f"data.path={tmp_path / 'a.parquet'}"]
    data = prepare(rows, folders / template, tmp_path, *words)
    assert data.description["data.messages_key"] == "messages"
    tokenizer = AutoTokenizer.from_pretrained(folders / template)
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    inputs, learned = only_row(data)
    assert inputs[: len(whole)] == whole
    turns = [tokenizer("a stone<|im_end|>").input_ids, tokenizer("green and old<|im_end|>").input_ids]
    newline = tokenizer("\n").input_ids if template == "chatml" else []
    assert learned == [*itertools.chain(*(turn + newline for turn in turns))]
    assert tokenizer.decode(learned).replace("\n", "") == "a stone<|im_end|>green and old<|im_end|>"


def test_conversations_are_the_same_chats(folders: Path, tmp_path: Path) -> None:
    one = prepare([{"messages": TALK}, held_out("messages")], folders / "chatml", tmp_path / "a")
    two = prepare([{"conversations": SHAREGPT}, {"conversations": SHAREGPT[1:3]}], folders / "chatml", tmp_path / "b")
    assert two.description["data.messages_key"] == "conversations"
    assert only_row(one) == only_row(two)


def test_tools_are_read_and_not_learned(folders: Path, tmp_path: Path) -> None:
    talk: Messages = [
        *TALK[:2],
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "a stone"}]},
    ]
    _, learned = only_row(prepare([{"messages": talk}, held_out("messages")], folders / "marked", tmp_path))
    assert chat_tokenizer().decode(learned) == "<|im_end|>a stone<|im_end|>"


def test_a_chat_that_the_assistant_opens(folders: Path, tmp_path: Path) -> None:
    _, learned = only_row(prepare([{"messages": TALK[2:]}, held_out("messages")], folders / "chatml", tmp_path))
    assert chat_tokenizer().decode(learned).replace("\n", "") == "a stone<|im_end|>green and old<|im_end|>"


def test_long_chats_are_cut_and_empty_ones_left_out(folders: Path, tmp_path: Path) -> None:
    long: Messages = [*TALK[:2], {"role": "assistant", "content": "stone " * 200}]
    unanswered: Messages = TALK[:2]
    rows: list[dict[str, object]] = [{"messages": one} for one in (long, unanswered, [], TALK, TALK[1:3])]
    found = prepare(rows, folders / "chatml", tmp_path).description
    assert (found["examples_cut"], found["examples_left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("messages", "template", "words", "expected"),
    [
        (TALK, "none", [], ["has no chat template", "chat_template.jinja"]),
        (TALK, "thinking", [], ["turn 2", "differently", "{% generation %}"]),
        (TALK, "refusing", [], ["chat template refuses", "roles must alternate"]),
        ([{"from": "alien", "value": "x"}], "chatml", [], ["line 1", "'alien'", "human"]),
        ([{"content": "x"}], "chatml", [], ["line 1", "without a role"]),
        ([{"role": "user", "content": 3}], "chatml", [], ["line 1", "without text"]),
        ([{"role": "user", "content": [{"type": "image"}]}], "chatml", [], ["line 1", "without text"]),
        (["hello"], "chatml", [], ["line 1", "str", "messages of role and content"]),
        ("hello", "chatml", ["data.messages_key=messages"], ["line 1", "holds str", "list of messages"]),
        (TALK, "chatml", ["data.add_bos=true"], ["data.add_bos=True", "template decides"]),
        (TALK, "chatml", ["data.special_tokens=true"], ["data.special_tokens=True", "template decides"]),
        (TALK, "chatml", ["data.messages_key=talk"], ["'talk'", "data.messages_key"]),
        (TALK, "chatml", ["data.messages_key=messages", *KEYS], ["data.messages_key", "set one of them to null"]),
        (TALK, "chatml", ["data.messages_key=messages", "data.streaming=true"], ["not streamed"]),
    ],
)
def test_errors_say_what_to_do(
    folders: Path, tmp_path: Path, messages: object, template: str, words: list[str], expected: list[str]
) -> None:
    message = error([{"messages": messages}, held_out("messages")], folders / template, tmp_path, *words)
    assert not [part for part in expected if part not in message], message
    assert "\n" not in message


# ----------------------------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("by_itself", "word", "added"), [(True, None, 1), (True, False, 0), (False, True, 1)])
def test_bos_is_added_as_the_tokenizer_does_or_as_asked(
    folders: Path, tmp_path: Path, by_itself: bool, word: bool | None, added: int, streaming: bool
) -> None:
    from tokenizers.processors import TemplateProcessing

    made = chat_tokenizer()
    made.bos_token = SPECIAL[1]
    if by_itself:
        made.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    made.save_pretrained(tmp_path / "tokenizer")
    words = [f"data.streaming={str(streaming).lower()}", "data.streams=1", "seq_len=16"]
    words += [] if word is None else [f"data.add_bos={str(word).lower()}"]
    rows: list[dict[str, object]] = [{"text": "the river of a stone "}, {"text": "sky"}]
    data = prepare([*rows[:1] * 9, rows[1]], tmp_path / "tokenizer", tmp_path, *words)
    ids = made("the river of a stone ", add_special_tokens=False).input_ids
    document = [1] * added + [*ids, 0]
    blocks = data.train.take(1, 0, 1)[0].tolist()
    assert any(blocks == (document * 5)[k : k + 17] for k in range(len(document)))
    assert data.description["adds_bos"] is bool(added)


def test_a_bos_that_does_not_exist_is_refused(folders: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "river"}, {"text": "sky"}]
    assert "no BOS token" in error(rows, folders / "chatml", tmp_path, "data.add_bos=true")


# ---------------------------------------------------------------------------------------------------- what a user types


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_chat_model_is_fine_tuned(tmp_path: Path, family: str) -> None:
    """launch/finetune.py on a JSONL file of messages; the export answers as it was taught."""
    model = chat_folder(tmp_path / "model", family=family)
    answers = {"the river": "old stone", "a tree": "green sky"}
    rows: list[dict[str, object]] = []
    for i, (question, answer) in itertools.product(range(20), answers.items()):
        turns = [{"role": "user", "content": f"{i} {question}?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    words = [f"model={model}", f"data.path={write_rows(tmp_path / 'chat.jsonl', rows)}", f"run_dir={tmp_path / 'run'}"]
    words += ["seq_len=64", "tokens_per_step=512", "micro_batch=4", "steps=40", "optimizer.lr=1e-2", "device=cpu"]
    words += ["schedule.warmup_steps=2", "evaluation.tokens=64", "evaluation.every=0", "checkpoint.every=0"]
    run = Launched(words, tmp_path / "log", ROOT / "launch" / "finetune.py")
    assert run.finish(120) == 0, run.output
    assert run.output.count("chats: column 'messages' goes through the chat template") == 1
    folder = tmp_path / "run" / "huggingface"
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for question, answer in answers.items():
        asked = [{"role": "user", "content": f"7 {question}?"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = trained.generate(**ids, max_new_tokens=20, do_sample=False, temperature=None, top_p=None)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == f"{answer}<|im_end|>"
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["data"]["data.messages_key"] == "messages"
