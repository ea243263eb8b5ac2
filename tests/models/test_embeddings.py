"""Every embedding row that occurs in the text is trained and exported, whichever token pads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig, PretrainedConfig

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.compress.command import compress_folder, load_settings
from lowrank_train.config.methods import find, names
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import DataConfig
from lowrank_train.data import tokenizer_folder
from lowrank_train.data.tokenizer import prepare_tokenizer
from lowrank_train.models.fsdp import gathered
from lowrank_train.plan import Plan
from lowrank_train.spectra.pruning import TextConfig, evaluation_blocks
from lowrank_train.text.labels import split
from lowrank_train.train.run import Run
from tests.distributed import run_distributed
from tests.runs import arguments, documents, failure, train_on, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the byte-level kind; it pads with the end-of-text token."""
    folder = tmp_path_factory.mktemp("pads") / "tokenizer"
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(60)), folder)
    made = AutoTokenizer.from_pretrained(folder)
    made.pad_token = made.eos_token
    made.save_pretrained(folder)
    return folder


def embedding(folder: Path) -> Tensor:
    weight: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).get_input_embeddings().weight
    return weight.detach()


def rows_that_occur(text: Path, folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {i for line in text.read_text().splitlines() for i in tokenizer(json.loads(line)["text"]).input_ids}
    return sorted({*found, tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("short") / "a.jsonl", documents(12))


def given(text: Path, run_dir: Path, *more: str, model: str = "llama") -> list[str]:
    """One step over all of a short text."""
    held_out = write_jsonl(text.with_name("held_out.jsonl"), documents(2, seed=3))
    size = ["seq_len=64", "tokens_per_step=2048", "micro_batch=8", "loss_chunk=512", "evaluation.tokens=64"]
    return arguments(text, run_dir, f"data.validation={held_out}", *size, *more, model=model)


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_every_row_that_occurs_is_trained_and_exported(tmp_path: Path, tokenizer: Path, text: Path, model: str) -> None:
    """From scratch, and then from the folder that was exported."""
    start = tmp_path / "start"
    train_on(1, given(text, start, f"data.tokenizer={tokenizer}", "steps=1", "optimizer.lr=0", model=model))
    before, occur = embedding(start / "huggingface"), rows_that_occur(text, tokenizer)
    assert before[occur].abs().sum(1).gt(0).all()
    assert json.loads((start / "huggingface" / "config.json").read_text())["pad_token_id"] == 0
    words = [word for word in given(text, tmp_path / "on", "steps=1", model=model) if not word.startswith("model.")]
    words += [f"model.name={start / 'huggingface'}", "schedule.warmup_steps=0", "optimizer.weight_decay=0"]
    train_on(1, words)
    after = embedding(tmp_path / "on" / "huggingface")
    assert (after[occur] != before[occur]).any(1).all()


def test_every_method_trains_every_row_that_occurs(tmp_path: Path, tokenizer: Path, text: Path) -> None:
    """One step of each; riemannian_adamw trains manifolds only, which no language model here has."""

    def rows_left(name: str, ranks: Ranks) -> str:
        rank = ["optimizer.rank=8"] if "rank" in find(name).arguments() else []
        words = [f"optimizer.name={name}", "optimizer.lr=1e-2", *rank, f"data.folder={tmp_path / 'tokens'}"]
        config = load_config(given(text, tmp_path / name, f"data.tokenizer={tokenizer}", *words))
        run = Run.build(Plan.of(config, world_size=ranks.world_size), ranks)
        blocks = run.data.train.take(8, 0, 1)
        weight = run.model.get_input_embeddings().weight
        before = gathered(weight).detach().clone()
        run.model.token_loss(*split(blocks), 512).backward()
        run.optimizer.step()
        occur = blocks[:, :-1].unique()
        left = (gathered(weight)[occur] == before[occur]).all(1).sum()
        return f"{name}: {left} of {len(occur)} rows" if left else ""

    methods = [name for name in names() if name != "riemannian_adamw"]

    def every_method() -> list[str]:
        with start("cpu", load_config([]).parallel.shards, load_config([]).parallel.replicas) as ranks:
            return [left for name in methods if (left := rows_left(name, ranks))]

    assert run_distributed(every_method, 1) == [[]]


# ------------------------------------------------------------------------------------------------------- added tokens


def folder_of(tmp_path: Path, tokenizer: Path, *added: str, family: str = "llama") -> Path:
    """A model with just enough rows, and a tokenizer to which a few tokens were added."""
    config: PretrainedConfig
    if family == "llama":
        config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    else:
        config = OPTConfig(hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=1)
        config.num_attention_heads, config.pad_token_id = 2, None
    made = AutoTokenizer.from_pretrained(tokenizer)
    config.vocab_size = len(made)
    config.tie_word_embeddings = family == "opt"
    config.bos_token_id = config.eos_token_id = made.eos_token_id
    made.add_special_tokens({"additional_special_tokens": [*added]})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_grows_by_the_tokens_that_were_added(
    tmp_path: Path, tokenizer: Path, text: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path, tokenizer, "<pad>", "<mask>", family=family)
    words = [word for word in given(text, tmp_path / "run", "steps=1") if not word.startswith("model.")]
    train_on(2, [*words, f"model.name={model}", "optimizer.lr=0", "checkpoint.every=1"])
    before, after = embedding(model), embedding(tmp_path / "run" / "huggingface")
    assert torch.equal(after[: len(before)], before)
    assert torch.allclose(after[len(before) :], before.mean(0).expand(2, -1), atol=1e-6)
    said = capfd.readouterr().err
    assert said.count("the tokenizer has 2 added token(s) for which") == 1
    assert f"from {len(before)} to {len(after)} rows" in said
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "huggingface")
    assert exported.get_output_embeddings().weight.shape[0] == len(before) + 2
    train_on(1, [*words, f"model.name={model}", "checkpoint.every=1", "steps=2"])  # goes on


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: Path, text: Path) -> None:
    model = folder_of(tmp_path, tokenizer)
    other = tmp_path / "other"
    prepare_tokenizer(DataConfig(vocab_size=320), lambda: iter(documents(90)), other)
    message = failure([*given(text, tmp_path / "run", f"data.tokenizer={other}"), f"model.name={model}"])
    assert "the tokenizer has 320 entries" in message
    assert "it is of another model" in message


# ------------------------------------------------------------------------------------------ tokenizer.model by itself


@pytest.mark.parametrize("command", ["train", "compress", "perplexity"])
def test_a_sentencepiece_model_alone_says_what_to_install(
    tmp_path: Path, tokenizer: Path, text: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, tokenizer)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00")
    monkeypatch.setattr(tokenizer_folder, "find_spec", lambda module: None if module == "sentencepiece" else module)
    words = [str(folder), "rank_reduction=0.5", f"out={tmp_path / 'small'}", "device=cpu"]
    commands: dict[str, Callable[[], object]] = {
        "train": lambda: prepare_tokenizer(DataConfig(tokenizer=str(folder)), lambda: iter([]), tmp_path / "out"),
        "compress": lambda: compress_folder(*load_settings(words)),
        "perplexity": lambda: evaluation_blocks(TextConfig(str(text)), folder),
    }
    with pytest.raises(UserError) as caught:
        commands[command]()
    message = str(caught.value)
    assert "pip install sentencepiece" in message
    assert str(folder) in message
    assert "tiktoken" not in message
    assert "\n" not in message
