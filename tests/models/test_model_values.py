"""Values of a model that make none: refused by name before anything is built, by overrides and by folders alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.parametrization import Dense
from lowrank_train.memory.budget import solve
from lowrank_train.memory.check import check_size, count_parameters
from lowrank_train.memory.question import load_budget
from lowrank_train.models import build as models
from lowrank_train.models.folders import load_model, model_folder
from lowrank_train.plan import Plan
from tests.runs import TINY

WRONG = [
    ("attention_dropout", 2, "from 0 to below 1"),
    ("attention_dropout", -0.5, "from 0 to below 1"),
    ("attention_dropout", float("nan"), "that is finite"),
    ("attention_dropout", "high", "from 0 to below 1"),
    ("hidden_size", 10**9, "at most 10000000"),
    ("num_hidden_layers", 10**6, "at most 4096"),
    ("vocab_size", 10**12, "at most 100000000"),
    ("num_attention_heads", 0, "a whole number >= 1"),
]
OF_KIND = {
    "llama": [
        *[("rms_norm_eps", value, "expected a number") for value in (float("nan"), float("inf"), -1e-6, 0, 2)],
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}, "that is finite"),
        ("initializer_range", -1.0, "a number >= 0"),
    ],
    "opt": [
        *[("dropout", value, "expected a number") for value in (2, -0.5, float("nan"), 1)],
        ("layerdrop", 1.5, "from 0 to below 1"),
    ],
}
NO_EFFECT = {
    "model_type": "model.name",
    "dtype": "precision and weights",
    "torch_dtype": "precision and weights",
    "architectures": "model.name",
    "gradient_checkpointing": "model.checkpointing",
    "attn_implementation": "itself",
    "use_cache": "no cache",
    "output_hidden_states": "no effect",
    "problem_type": "no effect",
    "to_dict": "no effect",
    "rope_theta": "rope_parameters",
    "num_hidden_layer": "did you mean 'num_hidden_layers'?",
}
NAMES = {"llama": "llama_9m", "opt": "opt_125m"}


def refusal(name: str, overrides: dict[str, Any], **needs: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.architecture(ModelConfig(name=name, overrides=overrides), **needs)
    return str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, with weights."""
    made = {}
    for kind, words in TINY.items():
        config = load_config(words).model
        config.overrides["vocab_size"] = 40
        model = models.skeleton(models.architecture(config), torch.float32).to_empty(device="cpu")
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.02)
        made[kind] = tmp_path_factory.mktemp("models") / kind
        model.save_pretrained(made[kind])
    return made


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize("kind", NAMES)
def test_values_that_make_no_model(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for index, (key, value, expected) in enumerate([*WRONG, *OF_KIND[kind]]):
        message = refusal(NAMES[kind], {key: value})
        assert f"model.overrides.{key}" in message
        assert expected in message
        folder = edited(folders[kind], tmp_path / str(index), **{key: value})
        for message in (refusal(str(folder), {}), _of_loading(folder)):
            assert str(folder) in message
            assert key in message


def _of_loading(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("kind", NAMES)
def test_an_override_without_effect_is_refused_with_the_key_to_use(folders: dict[str, Path], kind: str) -> None:
    for key, instead in NO_EFFECT.items():
        for name in (NAMES[kind], str(folders[kind])):
            message = refusal(name, {key: "1"})
            assert f"model.overrides.{key}" in message
            assert instead in message or (key == "rope_theta" and kind == "opt")


def test_fewer_positions_than_the_sequence_are_not_extended_in_silence() -> None:
    overrides = {"max_position_embeddings": 64}
    assert "max_position_embeddings=64 is less than seq_len=65" in refusal("llama_9m", overrides, seq_len=65)
    kept = models.architecture(ModelConfig(name="llama_9m", overrides={"max_position_embeddings": 99}), seq_len=65)
    assert kept.max_position_embeddings == 99


@pytest.mark.parametrize("kind", NAMES)
def test_a_folder_that_says_fewer_layers_than_it_holds(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = edited(folders[kind], tmp_path / "fewer", num_hidden_layers=1)
    message = _of_loading(folder)
    assert "has no place for" in message
    assert "layers.1." in message
    config = models.architecture(ModelConfig(name=str(folder)))
    model = models.skeleton(config, torch.float32)
    with pytest.raises(UserError, match=r"has no place for, '.*layers\.1\."):
        models.load_weights(model, models.skeleton(config, torch.float32), str(folder), Dense(), _alone())
    assert load_model(folders[kind]).config.num_hidden_layers == 2


def _alone() -> Ranks:
    return None  # type: ignore[return-value]  # refused before a rank is needed


@pytest.mark.parametrize("name", ["llama_9m", "llama_1b", "opt_125m", "opt_350m"])
def test_parameters_are_counted_without_building_all_layers(name: str) -> None:
    config = models.architecture(ModelConfig(name=name))
    assert count_parameters(config) == models.parameter_count(models.skeleton(config, torch.float32))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.overrides.hidden_size=1000000"], "parameters, needs .* of host memory, and .* are available; take"),
        (["model.overrides.num_hidden_layers=4000", "model.name=llama_7b"], "parameters, needs .* of host memory"),
    ],
)
def test_a_model_larger_than_memory_is_refused_before_it_is_built(words: list[str], message: str) -> None:
    config = load_config(["device=cpu", "micro_batch=1", "tokens_per_step=512", "model.name=llama_9m", *words])
    with pytest.raises(UserError, match=message):
        check_size(config, 1)


def test_an_adapter_larger_than_memory_is_refused_before_it_is_built(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["device=cpu", "seq_len=64", "tokens_per_step=64", "adapter.name=lora", "adapter.rank=1000000"]
    wide = edited(folders["llama"], tmp_path / "wide", hidden_size=100_000, intermediate_size=100_000, head_dim=16)
    with pytest.raises(UserError, match=r"adapter\.rank=1000000, .*|model\.name=.*needs .* of host memory"):
        check_size(load_config([*words, f"model={wide}"]), 1)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"fused_backward": True, "optimizer": {"name": "muon"}}, "fused_backward=true"),
        ({"tokens_per_step": 1000}, "tokens_per_step=1000 is not a multiple of seq_len=512"),
        ({"weights": "int8", "precision": "bfloat16", "optimizer": {"name": "sst", "rank": 8}}, "weights=int8"),
        ({"optimizer": {"name": "dct_adamw", "rank": 4000}}, "rank=4000 exceeds"),
        ({"optimizer": {"name": "adamw", "lr": float("inf")}}, "optimizer.lr=inf"),
        ({"model": {"name": "llama_9m", "overrides": {"dtype": "float16"}}}, "model.overrides.dtype"),
    ],
)
def test_what_a_run_refuses_is_not_predicted(tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"model": {"name": "llama_9m"}, **recipe}).replace("Infinity", ".inf"))
    with pytest.raises(UserError) as of_run:
        Plan.of(load_config([str(file)]))
    with pytest.raises(UserError) as of_budget:
        solve(load_budget(["--recipe", str(file)]))
    assert message in str(of_run.value)
    assert str(of_budget.value) == str(of_run.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama_9m", "--world-size", "1000000"], "world_size=1000000; expected a number from 1 to 100000"),
        (["--model", "llama_9m", "--optimizer", "dct_adamw", "--rank", "1000000"], "rank=1000000 exceeds"),
        (["--model", "llama_9m", "--micro-batch", "1000000000000"], "micro_batch=1000000000000; expected a number"),
        (["--model", "llama_9m", "--world-size", "100000", "--replicas", "100000"], "tokens_per_step="),
        (["--model", "llama_9m", "--weights", "int8", "--precision", "float32"], "weights=int8 with precision=float32"),
    ],
)
def test_what_no_budget_is_made_for(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        solve(load_budget(words))
    assert message in str(caught.value)


def test_a_budget_for_many_ranks_takes_no_longer() -> None:
    assert solve(load_budget(["--model", "llama_9m", "--world-size", "100000"])).fits


def test_words_that_are_no_folder_of_a_model() -> None:
    for word in (5000 * "x", "a\0b", "", "~nobody_of_this_name/x"):
        with pytest.raises(UserError):
            model_folder(word, "before=")
