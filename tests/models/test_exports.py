"""Exported folders keep what the source folder had: dtype, settings of generation, chat template, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lowrank_train.common.errors import UserError
from lowrank_train.compress.command import compress_folder, load_settings
from lowrank_train.data.export_files import cast_state, source_dtype
from tests.chat_models import CHATML, chat_folder, write_rows
from tests.distributed import run_distributed
from tests.runs import train_on

KEPT = ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("source") / "model")


def finetune(model: Path, run_dir: Path, *words: str) -> Path:
    """A step on chats; returns the exported folder."""
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "stone"}] for i in range(12)]
    text = write_rows(run_dir.with_suffix(".jsonl"), [{"messages": one} for one in turns])
    given = [f"model.name={model}", f"data.path={text}", f"run_dir={run_dir}", "checkpoint.every=0", "device=cpu"]
    size = ["seq_len=64", "tokens_per_step=128", "steps=1", "micro_batch=2", "evaluation.tokens=64"]
    train_on(1, [*given, *size, *words])
    return run_dir / "huggingface"


def compress(model: Path, out: Path, *words: str) -> Path:
    folder, config = load_settings([str(model), f"out={out}", "perplexity=false", "device=cpu", *words])
    run_distributed(compress_folder, 1, folder, config)
    return out


def dtypes(folder: Path) -> set[str]:
    """As written: of the tensors, and of the configuration."""
    found = {str(json.loads((folder / "config.json").read_text())["dtype"])}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {str(tensors.get_tensor(name).dtype).removeprefix("torch.") for name in tensors.keys()}  # noqa: SIM118
    return found


def check_kept(folder: Path, source: Path, kept: Sequence[str] = KEPT) -> None:
    for name in kept:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


EXPORTS = {
    "plain": [],
    "bfloat16 weights": ["precision=bfloat16", "weights=bfloat16"],
    "int8 weights": ["precision=bfloat16", "weights=int8"],
    "sst": ["optimizer.name=sst", "optimizer.rank=8"],
    "relora": ["optimizer.name=relora", "optimizer.rank=8"],
    "lora of peft": ["adapter.name=lora", "adapter.rank=4"],
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_fine_tuned_folder_keeps_what_the_source_had(tmp_path: Path, source: Path, name: str) -> None:
    folder = finetune(source, tmp_path / "run", *EXPORTS[name])
    assert dtypes(folder) == {"bfloat16"}
    check_kept(folder, source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.6, 0.95)


def test_another_dtype_may_be_asked_for(tmp_path: Path, source: Path) -> None:
    assert dtypes(finetune(source, tmp_path / "wide", "export.dtype=float32")) == {"float32"}
    adapter = ("export.dtype=float16", "adapter.name=lora", "adapter.rank=4")
    assert dtypes(finetune(source, tmp_path / "adapter", *adapter)) == {"float16"}


def test_compressed_and_merged_folders_keep_what_the_source_had(tmp_path: Path, source: Path) -> None:
    """Also fine-tuned in between."""
    small = compress(source, tmp_path / "small", "rank_reduction=0.5")
    tuned = finetune(small, tmp_path / "run", "train=low_rank")
    for folder in (small, tuned, compress(tuned, tmp_path / "merged", "merge=true")):
        assert dtypes(folder) == {"bfloat16"}
        check_kept(folder, source)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.generation_config.eos_token_id == [2, 0]


def test_a_folder_without_settings_of_generation_gets_those_of_its_model(tmp_path: Path) -> None:
    """And one without a word on its dtype is of the dtype of its tensors."""
    source = chat_folder(tmp_path / "model", dtype=torch.float16)
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    folder = finetune(source, tmp_path / "run")
    assert dtypes(folder) == {"float16"}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    assert source_dtype(source) == torch.bfloat16


def test_tied_weights_stay_one_and_numbers_too_large_are_refused() -> None:
    shared = torch.ones(2, 2)
    cast = cast_state({"a": shared, "b": shared, "c": torch.arange(2)}, torch.float16)
    assert cast["a"] is cast["b"]
    assert cast["c"].dtype == torch.int64
    with pytest.raises(UserError, match=r"'d' has a number of size 1e\+05.*export.dtype=float32"):
        cast_state({"d": torch.tensor([1e5])}, torch.float16)
