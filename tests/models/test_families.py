"""Every family of models: its matrices are found, it trains, and its memory is predicted from what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.layers.choice import linear_layers
from lowrank_train.layers.lora import add_adapters
from lowrank_train.layers.spectral import SpectralLinear, to_spectral
from lowrank_train.memory import step
from lowrank_train.memory.budget import solve
from lowrank_train.memory.question import load_budget
from lowrank_train.memory.step import predict
from lowrank_train.models import build as models
from lowrank_train.models.families import FAMILIES, LLAMA
from lowrank_train.models.loss import token_loss
from lowrank_train.plan import Plan
from lowrank_train.spectra.spectrum import spectra
from tests.runs import TINY, arguments, documents, train_on, write_jsonl
from tests.tools.memory_tracker import track

every = pytest.mark.parametrize("kind", [family.model_type for family in FAMILIES])


def build(kind: str, *overrides: str) -> PreTrainedModel:
    """A tiny model with transformers' initial weights."""
    config = models.architecture(load_config([*TINY[kind], *overrides]).model, vocab_size=300)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model


def matrices(model: nn.Module) -> set[str]:
    """All linear layers inside of decoder layers, whatever they are called."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}


@every
def test_every_method_finds_the_matrices(kind: str) -> None:
    expected = matrices(build(kind))
    assert expected
    assert linear_layers(build(kind)).keys() == expected == spectra(build(kind)).keys()
    spectral = to_spectral(build(kind), 4)
    assert {name for name, module in spectral.named_modules() if isinstance(module, SpectralLinear)} == expected
    adapted = add_adapters(build(kind), 4)
    assert {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")} == expected


def test_matrices_are_those_of_the_family_alone() -> None:
    """A name that is a matrix elsewhere may be something else here."""
    model = build("llama")
    model.get_decoder().layers[0].fc1 = nn.Linear(32, 32)
    assert "model.layers.0.fc1" not in linear_layers(model)
    model.config = None
    assert "model.layers.0.fc1" in linear_layers(model)  # of nothing that is known


@pytest.mark.parametrize("documents_apart", [False, True])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("mistral", ()),
        ("mistral", ("model.overrides.sliding_window=99",)),
        ("qwen3", ("model.overrides.use_sliding_window=true", "model.overrides.max_window_layers=1")),
    ],
)
def test_a_window_hides_what_is_far_in_training_too(
    kind: str, overrides: tuple[str, ...], documents_apart: bool
) -> None:
    """Against transformers' own mask of each document alone; the qwen3 has layers with and without a window."""
    more = ("model.overrides.sliding_window=5",) if kind == "qwen3" else ()
    model = build(kind, *overrides, *more).eval()
    lengths = (20, 12, 8) if documents_apart else (40,)
    rows = [torch.randint(5, 300, (length,)) for length in lengths]
    ids, places = torch.cat(rows)[None], torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        expected = sum(
            functional.cross_entropy(model(row[None]).logits[0], row.roll(-1), reduction="sum") for row in rows
        )
        labels = torch.cat([row.roll(-1) for row in rows])[None]
        got = token_loss(model, ids, labels, 16, places if documents_apart else None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


NAMES = ["adopted_llama", "plain_llama", "opt", "opt_1.3b", "llama_7b", "mistral"]


@every
def test_a_budget_follows_from_the_model_not_from_the_name_of_its_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(kind).save_pretrained("first")
    found = set()
    for name in NAMES:
        shutil.copytree("first", f"folders/{name}")
        for question in (["--models"], ["--model"]):
            asked = [
                *question,
                f"{tmp_path}/folders/{name}",
                "--budget",
                "64MiB",
                "--seq-len",
                "4096",
                "--optimizers",
                "adamw",
            ]
            try:
                (fit,) = solve(load_budget(asked)).fits
                found.add((question[0], fit.micro_batch, fit.memory.peak))
            except UserError as error:
                found.add((question[0], str(error).replace(f"/{name}", "")))
    assert len(found) == 2, found
    learned = next(family.learned_positions for family in FAMILIES if family.model_type == kind)
    assert any("learned positions" in str(answer) for answer in found) == learned, found


@every
@pytest.mark.parametrize(
    "settings",
    [
        "precision=float32",
        "precision=bfloat16 model.checkpointing=full",
        "precision=bfloat16 model.checkpointing=selective",
        "precision=bfloat16 data.separate_documents=true",
    ],
)
def test_predicted_activations_are_those_that_a_step_has(kind: str, settings: str) -> None:
    """Of three layers and a small vocabulary, so that what is kept for backward is most of the memory."""
    family = next(family for family in FAMILIES if family.model_type == kind)
    name = next(size for size in family.sizes if size not in family.for_tests)
    words = [f"model.name={name}", "model.overrides.num_hidden_layers=3", "model.overrides.vocab_size=4000"]
    window = ["model.overrides.sliding_window=64"] if "sliding_window" in family.defaults else []
    plan = Plan.of(load_config([*words, *window, "seq_len=256", "micro_batch=8", *settings.split()]))
    tracked, predicted = track(plan, updates=False), predict(plan)
    assert max(predicted.phases[name] for name in tracked.phases) == pytest.approx(tracked.peak, rel=0.025)
    for phase in tracked.phases:
        assert predicted.phases[phase] == pytest.approx(tracked.phases[phase], rel=0.03), phase


def test_a_family_without_activations_trains_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without = replace(LLAMA, activations=None)
    monkeypatch.setattr(step, "family_of", lambda *about: without)
    text = write_jsonl(tmp_path / "text.jsonl", documents(60))
    words = arguments(text, tmp_path / "run", "steps=2")
    (record,) = train_on(1, words)
    assert record.predicted_peak_gib is None
    assert capfd.readouterr().err.count("the memory of a step is not predicted: what layers of a llama model") == 1
    with pytest.raises(UserError, match="what layers of a llama model keep for backward is not known"):
        predict(Plan.of(load_config(words)))


def test_a_model_without_a_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="is a 'gpt2' model; expected one of llama, opt"):
        load_and_plan(f"model.name={tmp_path}")


def load_and_plan(*words: str) -> Any:
    return Plan.of(load_config(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["low_rank_adamw", "sst", "relora", "lora"])
@every
def test_a_family_trains_from_a_size_and_goes_on_from_its_folder(kind: str, method: str, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", documents(300))
    optimizer = f"optimizer={{name: {method}, rank: 4, lr: 1.0e-2}}"
    first = arguments(text, tmp_path / "run", optimizer, "schedule.warmup_steps=0", model=kind)
    (record,) = train_on(1, first)
    assert record.predicted_optimizer_state_bytes == record.optimizer_state_bytes
    assert record.validation_loss is not None
    assert record.initial_validation_loss is not None
    assert record.validation_loss < record.initial_validation_loss - 0.1
    folder = tmp_path / "run" / "huggingface"
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    later = [word for word in arguments(text, tmp_path / "later", optimizer, "steps=2") if "model." not in word]
    (again,) = train_on(1, [*later, f"model.name={folder}", "schedule.warmup_steps=0"])
    assert again.initial_validation_loss == pytest.approx(record.validation_loss, rel=0.02)
