"""Documents that share a row: the loss of each is its loss alone, in every model, on any ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_train.config.run_config import load_config
from lowrank_train.models.packing import block_mask
from lowrank_train.text.labels import positions, starting
from tests.runs import SEQUENCE, arguments, documents, failure, losses, train_on, write_jsonl
from tests.text.test_supervised import END, KEYS, WORDS, tokenizer
from tests.tiers import only_first_quick

__all__ = ["tokenizer"]

GQA = ("model.overrides.num_attention_heads=4", "model.overrides.num_key_value_heads=2")
MODELS = {"llama": (), "llama_gqa": GQA, "opt": ()}


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Four tokens each: two of a prompt, one of a response, and the end."""
    chooser = random.Random(seed)
    words = [f"w{i}" for i in range(WORDS)]
    return [{"prompt": " ".join(chooser.choices(words, k=2)), "response": chooser.choice(words)} for _ in range(count)]


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alone(model: Any, sequences: Sequence[tuple[list[int], int]]) -> float:
    """Mean loss of the tokens after the first ``k`` of each sequence, each in a forward pass of its own."""
    found = []
    for ids, learned_from in sequences:
        tokens = torch.tensor(ids)
        with torch.no_grad():
            scores = functional.log_softmax(model(tokens[None]).logits[0], -1)
        found += [-scores[k - 1, tokens[k]] for k in range(max(1, learned_from), len(ids))]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("name", "world_size", "precision"),
    only_first_quick(
        [
            *(("llama", 1, "float32"), ("llama", 2, "float64"), ("llama_gqa", 1, "float64")),
            *(("opt", 1, "float32"), ("opt", 2, "float64")),
        ],
        2,
    ),
)
def test_a_packed_example_has_the_loss_it_has_alone(
    tmp_path: Path, tokenizer: str, name: str, world_size: int, precision: str
) -> None:
    """At a rate of 0 the exported model is the one that computed the losses; one step reads every example."""
    trained, held_out = pairs(96), pairs(6, seed=1)
    run_dir, text, other = tmp_path / "run", write(tmp_path / "a.jsonl", trained), write(tmp_path / "b.jsonl", held_out)
    given = [*KEYS, tokenizer, "steps=1", "optimizer.lr=0", f"data.validation={other}", "evaluation.tokens=10000"]
    given += [f"tokens_per_step={24 * SEQUENCE}", "loss_chunk=24", *MODELS[name]]
    words = arguments(text, run_dir, *given, model=name.partition("_")[0], precision=precision)
    record = train_on(world_size, words)[0]

    loaded = AutoTokenizer.from_pretrained(run_dir / "huggingface")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "huggingface", dtype=torch.float64).eval()

    def expected(rows: Sequence[dict[str, str]]) -> float:
        return alone(model, [([*loaded(f"{r['prompt']} {r['response']}").input_ids, END], 2) for r in rows])

    tolerance = 1e-10 if precision == "float64" else 1e-5
    assert losses(run_dir) == [pytest.approx(expected(trained), rel=tolerance)]
    assert record.validation_loss == pytest.approx(expected(held_out), rel=tolerance)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_documents_are_kept_apart_if_asked(tmp_path: Path, streaming: bool) -> None:
    """By default they see each other, as in pretraining elsewhere; both are told apart in checkpoints."""
    held_out = documents(3, seed=7)
    written = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    text = write_jsonl(tmp_path / "a.jsonl", documents(80))
    given = [f"data.validation={written}", "seq_len=512", "tokens_per_step=1024", "micro_batch=1", "steps=2"]
    given += ["evaluation.tokens=511", "checkpoint.every=2", f"data.streaming={str(streaming).lower()}"]
    given += ["data.streams=2"]
    apart = arguments(text, tmp_path / "apart", *given, "data.separate_documents=true", precision="float64")
    (record,) = train_on(1, [*apart, "optimizer.lr=0"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "apart" / "huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "apart" / "huggingface", dtype=torch.float64).eval()
    made = [([*tokenizer(one).input_ids, tokenizer.eos_token_id], 1) for one in held_out]
    count = sum(len(ids) for ids, _ in made)
    assert count < 512
    assert record.validation_loss == pytest.approx(alone(model, made), rel=1e-10)
    together = train_on(1, arguments(text, tmp_path / "together", *given, "optimizer.lr=0", precision="float64"))
    assert together[0].validation_loss != pytest.approx(record.validation_loss, rel=1e-6)
    assert json.loads((tmp_path / "apart" / "checkpoints" / "step-2" / "about.json").read_text())[
        "data.separate_documents"
    ]
    message = failure([*apart, "data.separate_documents=false", "steps=4"])
    assert "data.separate_documents was True, is None" in message


def test_the_mask_and_positions_of_a_row() -> None:
    blocks = torch.tensor([[starting(5), 6, starting(7), 8, 9], [1, 2, 3, 4, 5]])
    found = positions(blocks)
    assert found.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    seen = block_mask(found, torch.float32)[:, 0] == 0
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(seen[1], torch.ones(4, 4, dtype=torch.bool).tril())


def test_what_is_kept_apart() -> None:
    given = ["data.path=a.jsonl", "data.prompt_key=p", "data.response_key=r"]
    assert load_config(given).data.separates
    assert not load_config([*given, "data.separate_documents=false"]).data.separates
    assert not load_config([]).data.separates
    assert load_config(["data.separate_documents=true"]).data.separates
