"""Configuration: merging, every kind of mistake, and the way back from the saved file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.loading import save_config
from lowrank_train.config.run_config import help_text, load_config
from lowrank_train.config.schema import Config
from tests.runs import ROOT

RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))


def error(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(words)
    return str(caught.value)


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of the schema by dotted key; dictionaries of free keys are leaves."""
    if not isinstance(node, dict) or prefix in ("model.overrides.", "optimizer."):
        return {prefix[:-1]: node}
    return {key: value for name, child in node.items() for key, value in flat(child, f"{prefix}{name}.").items()}


ALL_KEYS = flat(OmegaConf.to_container(OmegaConf.structured(Config)))


def test_files_are_merged_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "steps: 1\nseq_len: 11\nseed: 111\nmodel: {name: opt_125m}\n")
    second = write(tmp_path / "second.yaml", "seq_len: 22\nseed: 222\nmodel: {checkpointing: full}\n")
    config = load_config(["seed=333", first, second, "data.vocab_size=400"])
    assert (config.steps, config.seq_len, config.seed) == (1, 22, 333)
    assert (config.model.name, config.model.checkpointing) == ("opt_125m", "full")
    assert config.data.vocab_size == 400
    assert config.micro_batch == Config().micro_batch
    assert load_config([second, first]).seq_len == 11


def test_dictionaries_of_free_keys_are_merged(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "optimizer: {name: dct_adamw, rank: 8}\nmodel: {overrides: {hidden_size: 32}}\n")
    config = load_config([file, "optimizer.betas=[0.8,0.9]", "model.overrides.num_hidden_layers=2"])
    assert config.optimizer == {"name": "dct_adamw", "lr": 1e-3, "rank": 8, "betas": [0.8, 0.9]}
    assert config.model.overrides == {"hidden_size": 32, "num_hidden_layers": 2}


def test_numbers_as_people_write_them() -> None:
    config = load_config(["optimizer.lr=1e-4", "clip=2", "schedule.min_ratio=0", "data.streaming=true"])
    assert config.optimizer["lr"] == 1e-4
    assert (config.clip, config.schedule.min_ratio, config.data.streaming) == (2.0, 0.0, True)


def test_null_where_it_means_something() -> None:
    config = load_config(["clip=null", "data.path=null", "parallel.shards=null"])
    assert (config.clip, config.data.path, config.parallel.shards) == (None, None, None)


def test_a_path_may_hold_an_equals_sign() -> None:
    assert load_config(["data.path=corpus/lang=en"]).data.path == "corpus/lang=en"


def test_the_run_folder_is_named_after_model_and_optimizer(tmp_path: Path) -> None:
    assert load_config(["model.name=opt_125m", "optimizer.name=dct_adamw"]).run_dir == "runs/opt_125m-dct_adamw"
    assert load_config([f"model.name={tmp_path / 'mine'}"]).run_dir == "runs/mine-adamw"
    assert load_config(["run_dir=here"]).run_dir == "here"


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("stpes=5", "'steps'"),
        ("model.nam=llama_60m", "'model.name'"),
        ("evaluation.evry=5", "'evaluation.every'"),
        ("data.tokeniser=gpt2", "'data.tokenizer'"),
        ("warmup_steps=5", "'schedule.warmup_steps'"),
    ],
)
def test_unknown_key_names_the_closest(word: str, suggestion: str) -> None:
    message = error(word)
    assert f"unknown key {word.split('=')[0]!r}" in message
    assert f"did you mean {suggestion}" in message


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "wrong.yaml", "schedule:\n  warmup: 5\n")
    message = error(file)
    assert "schedule.warmup" in message
    assert "schedule.warmup_steps" in message
    assert file in message


def test_a_model_is_short_for_its_name() -> None:
    assert load_config(["model=llama_130m"]).model.name == "llama_130m"


def test_a_key_like_nothing_known_gets_no_suggestion() -> None:
    message = error("zzzqqq=1")
    assert "unknown key 'zzzqqq'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    "word",
    [
        "steps=many",
        "steps=1.5",
        "steps=null",
        "clip=high",
        "data.streaming=perhaps",
        "model.name=[a,b]",
        "precision=float16",
        "schedule.name=linear",
        "device=tpu",
        "data=books",
        "optimizer=adamw",
        "parallel=2",
        "steps=[1,2]",
        "steps.more=1",
        "model.overrides=3",
    ],
)
def test_mistyped_value_or_bad_choice_names_the_key(word: str) -> None:
    assert word.split("=")[0].split(".more")[0] in error(word)


@pytest.mark.parametrize("word", ["steps", "=5", "a b=c: [", "optimizer.betas=[0.9", "nothing.yaml", ""])
def test_what_is_neither_a_file_nor_an_override(word: str) -> None:
    assert error(word)


def test_a_missing_file_is_named() -> None:
    assert "no file 'configs/nothing.yaml'" in error("configs/nothing.yaml")


@pytest.mark.parametrize("content", ["steps: 1\n  seq_len: 2\n", "steps: [1, 2", "- steps\n- 5\n", "just words"])
def test_broken_yaml_names_the_file(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "broken.yaml", content)
    assert file in error(file)


def test_a_reference_names_the_key() -> None:
    assert error("steps=${nothing}").startswith("steps=${nothing}")


def test_files_that_are_not_text(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert str(binary) in error(str(binary))
    assert str(tmp_path) in error(str(tmp_path))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path / "empty.yaml", "")]) == load_config([])


def test_unknown_optimizer_and_argument_name_the_closest() -> None:
    assert "did you mean 'adamw'" in error("optimizer.name=adamv")
    assert "did you mean 'weight_decay'" in error("optimizer.weight_decays=0.1")
    assert "no argument 'rank'" in error("optimizer.rank=8")  # adamw has none
    assert "unknown optimizer" in error("optimizer.name=null")


@pytest.mark.parametrize("value", ["-1e-3", "high", "true", "nan", "[1e-3]"])
def test_the_rate_of_what_a_method_leaves_to_adamw_is_a_number(value: str) -> None:
    message = error(f"optimizer.other_lr={value}")
    assert "optimizer.other_lr=" in message
    assert "expected a number >= 0" in message
    assert load_config(["optimizer.other_lr=null"]).optimizer["other_lr"] is None


@pytest.mark.parametrize(
    "word",
    [
        "steps=0",
        "seq_len=0",
        "tokens_per_step=-1",
        "micro_batch=0",
        "loss_chunk=0",
        "log_every=0",
        "max_bad_steps=0",
        "parallel.replicas=0",
        "parallel.shards=0",
        "data.vocab_size=256",
        "data.streams=0",
        "data.validation_fraction=1.1",
        "data.validation_fraction=-0.1",
        "checkpoint.keep=0",
        "checkpoint.every=-1",
        "evaluation.every=-1",
        "evaluation.tokens=0",
        "schedule.warmup_steps=-1",
        "schedule.min_ratio=2",
        "schedule.decay_fraction=-0.5",
        "schedule.min_ratio=nan",
        "clip=0",
        "clip=-1",
        "clip=nan",
    ],
)
def test_out_of_range_value_is_named_with_what_was_expected(word: str) -> None:
    message = error(word)
    assert word.split("=")[0] in message
    assert "expected" in message


def test_the_saved_configuration_reloads_to_an_equal_one(tmp_path: Path) -> None:
    words = [
        "model.overrides.hidden_size=32",
        "model.overrides.rope_scaling=null",
        "data.path=corpus/lang=en",
        "data.validation=null",
        "data.streaming=true",
        "optimizer.name=dct_adamw",
        "optimizer.betas=[0.8,0.95]",
        "optimizer.lr=3.3e-4",
        "optimizer.rank=17",
        "schedule.name=wsd",
        "clip=null",
        "parallel.replicas=2",
        "precision=bfloat16",
        "seed=12345",
        "run_dir=some where/else #1",
    ]
    config = load_config(words)
    save_config(config, tmp_path / "config.yaml")
    again = load_config([str(tmp_path / "config.yaml")])
    assert again == config
    assert again.optimizer["betas"] == [0.8, 0.95]
    assert again != load_config([])


def test_the_default_configuration_reloads_too(tmp_path: Path) -> None:
    save_config(load_config([]), tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]) == load_config([])


def test_a_free_key_that_is_not_text_survives_saving(tmp_path: Path) -> None:
    config = load_config(["optimizer.betas=[0.9,0.999]", "model.overrides.rope_parameters={rope_theta: 5.0}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]).model.overrides == {"rope_parameters": {"rope_theta": 5.0}}


@pytest.mark.parametrize("key", sorted(ALL_KEYS))
def test_help_lists_every_key_with_default_and_meaning(key: str) -> None:
    lines = [line.strip() for line in help_text().splitlines() if line.strip().startswith(f"{key} (")]
    assert len(lines) == 1
    default = "null" if ALL_KEYS[key] is None else str(ALL_KEYS[key])
    shown, meaning = lines[0].split("): ", 1)
    assert shown == f"{key} ({default}"
    assert len(meaning) > 10


def test_help_lists_every_optimizer() -> None:
    for name in optim.names():
        assert optim.describe(name) in help_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid(recipe: str) -> None:
    config = load_config([str(ROOT / recipe)])
    assert config.tokens_per_step % (config.seq_len * config.micro_batch) == 0


PARTS = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("benchmark", "hyperbolic")]


@pytest.mark.parametrize("part", sorted(str(path.relative_to(ROOT)) for path in PARTS))
def test_every_part_of_a_recipe_goes_on_top_of_one(part: str) -> None:
    recipe = str(ROOT / "configs" / "llama_60m.yaml")
    assert load_config([recipe, str(ROOT / part)]) != load_config([recipe])


@pytest.mark.parametrize("name", methods.names())
def test_a_method_names_every_argument_once(name: str) -> None:
    arguments = methods.find(name).arguments()
    assert len(arguments) == len(set(arguments))
