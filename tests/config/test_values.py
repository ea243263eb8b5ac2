"""Values that no setting takes: not finite, out of range, empty, of another kind; for every key of every schema."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lowrank_train.bench import digits, tree
from lowrank_train.bench.compression import CompressionConfig
from lowrank_train.bench.graphs import GraphBenchmark
from lowrank_train.bench.quality import QualityConfig
from lowrank_train.bench.translation import TranslationBenchmark
from lowrank_train.common.errors import UserError
from lowrank_train.compress.command import CompressConfig
from lowrank_train.config.loading import load_schema
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config
from lowrank_train.config.settings import key_help, keys, settle
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.translation.config import TranslationConfig
from lowrank_train.memory.question import BudgetConfig
from lowrank_train.spectra.command import SpectrumConfig

SCHEMAS: list[type[Any]] = [
    *(Config, BudgetConfig, CompressConfig, CompressionConfig, SpectrumConfig, QualityConfig),
    *(GraphConfig, GraphBenchmark, TranslationConfig, TranslationBenchmark),
]
every_schema = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
LOADERS: dict[str, Callable[[list[str]], Any]] = {
    "run": load_config,
    "graph": partial(load_recipe, GraphConfig),
    "translation": partial(load_recipe, TranslationConfig),
}


def refusal_of(schema: type[Any], key: str, value: Any) -> str:
    """Of a configuration that a loader made, with one other value."""
    config = schema()
    *sections, leaf = key.split(".")
    setattr(functools.reduce(getattr, sections, config), leaf, value)
    with pytest.raises(UserError) as caught:
        settle(config)
    assert str(caught.value).startswith(f"{key}")
    return str(caught.value)


@every_schema
def test_no_number_of_any_schema_may_be_infinite_nan_or_without_end(schema: type[Any]) -> None:
    numbers = [
        key for key, value, _ in keys(schema()) if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if schema is not GraphBenchmark and schema is not TranslationBenchmark:
        assert numbers
    for key in numbers:
        for value in (math.inf, -math.inf, math.nan, 10**20, -(10**20)):
            assert "; expected a number" in refusal_of(schema, key, value)
    for key, value, metadata in keys(schema()):
        if isinstance(value, dict) and not metadata["path"]:
            assert f"{key}.a" in refusal_of(schema, key, {"a": [1.0, math.nan]})
        elif isinstance(value, str):
            assert "is empty" in refusal_of(schema, key, "  ")


@every_schema
def test_help_shows_the_range_that_is_checked(schema: type[Any]) -> None:
    lines = {line.split(" (")[0].strip(): line for line in key_help(schema)[1:]}
    for key, value, metadata in keys(schema()):
        low = metadata["range"].at_least
        if low is not None:
            assert "; a number from" in lines[key] or "; a number >=" in lines[key]
            below = type(value)([low - 1]) if isinstance(value, list) else {"a": low - 1} if value == {} else low - 1
            assert "expected a number" in refusal_of(schema, key, below)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr=.inf"], "optimizer.lr=inf; expected a number that is finite"),
        (["optimizer.betas=[.nan,0.9]"], "optimizer.betas=nan; expected"),
        (["adapter.arguments={a: {b: .inf}}"], "adapter.arguments.a.b=inf; expected"),
        (["clip=.inf"], "clip=inf; expected a number > 0, or null"),
        (["steps=0"], "steps=0; expected a number >= 1"),
        (["schedule.min_ratio=1.5"], "schedule.min_ratio=1.5; expected a number from 0 to 1"),
        (["tokens_per_step=1000000000000"], "tokens_per_step=1000000000000; expected a number from 1 to 1000000000"),
        (["adapter.rank=10000000"], "adapter.rank=10000000; expected a number from 1 to 1000000, or null"),
        (["steps=???"], "steps=??? in 'steps=???' stands for a value that is still to be given"),
        (["optimizer.lr=???"], "optimizer.lr=???"),
        (["data.path="], "'data.path' is given without a value"),
        (["data.tokenizer="], "write data.tokenizer=null for null"),
        (["run_dir="], "'run_dir' is given without a value"),
        (["run_dir= "], "'run_dir' is given without a value"),
        (["model="], "'model.name' is given without a value"),
        (["optimizer.rank="], "'optimizer.rank' is given without a value"),
        (["data.text_key=''"], "data.text_key is empty"),
        (["run_dir=' '"], "run_dir is empty"),
        (["run_dir=" + 5000 * "x"], "has 5000 characters; expected a path of at most 3500 bytes"),
        (["data.path=" + 5000 * "x" + ".yaml"], "has 5005 characters; expected a path"),
        (["run_dir=" + 2000 * "x/"], "has 4000 characters; expected a path"),
        (["model=" + 5000 * "x"], "has 5000 characters; expected a path"),
        ([5000 * "x" + ".yaml"], "cannot read"),
        (["nul\0.yaml"], "cannot read"),
        (["run_dir=a\0b"], "cannot read the override"),
        (["run_dir=\udcff"], "cannot read the override"),
        (["run_dir=~nobody_of_this_name/x"], "there is no such home folder; write ./~nobody_of_this_name/x"),
        (["model.overrides={null: 3}"], "cannot read the override"),
        (["model.overrides={? {a: 1} : 3}"], "cannot read the override"),
        (["model.overrides=[1]"], "where keys and values belong"),
        (["optimizer=[1]"], "where keys and values belong"),
        (["model.overrides=" + 500 * "["], "nested more than 20 levels deep"),
        (["model.overrides=" + 100_000 * "{a: "], "nested more than 20 levels deep"),
        ([3000 * "a." + "b=1"], "its key has more than 20 levels"),
        (["steps={a: 1}"], "wrong value for 'steps'"),
        (["steps.a=1"], "steps"),
        (["{a: b}=3"], "unknown key"),
        (["null=3"], "unknown key 'null'"),
    ],
)
def test_values_that_no_run_takes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(words)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        500 * "[",
        "a: " * 1000,
        "".join(f"{' ' * i}a:\n" for i in range(400)),
        "model: {overrides: {a: &a [1, 1], "
        + ", ".join(f"b{i}: &b{i} [{9 * f'*b{i - 1}, '}]" for i in range(1, 9))
        + "}}",
        "model: &m {overrides: {a: *m}}",
        "? null\n: 3",
        "null: 3",
        "? [a]\n: 3",
        "- steps",
        "steps: [1]",
        "steps: 5\n---\nsteps: 6",
        "model: {overrides: {null: 3}}",
        "optimizer: [1]",
        "optimizer: null",
        "model: null",
        "steps: ???",
        "steps: .inf",
        "data: {path: ''}",
        "steps: !!python/object:os.system 3",
        "run_dir: !!binary aGVsbG8=",
        "\x00",
        "a" * 100_000,
    ],
)
def test_yaml_of_any_shape_ends_in_one_message_that_names_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    for load in LOADERS.values():
        with pytest.raises(UserError) as caught:
            load([str(file)])
        assert len(str(caught.value)) < 1500


def test_a_home_folder_is_expanded_wherever_a_path_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    for schema in SCHEMAS:
        for key, value, metadata in keys(schema()):
            if metadata["path"] and not isinstance(value, dict):
                found = {k: v for k, v, _ in keys(load_schema(schema, [f"{key}=~/x"]))}
                assert found[key] == "/home/of/me/x"
    assert load_config(["run_dir=~/x", "model=~/m", "data.path=~"]).run_dir == "/home/of/me/x"


@pytest.mark.parametrize("word", ["model.curvature=1e300", "model.curvature=1e-300", "model.curvature=.nan"])
def test_a_curvature_that_no_float_can_compute_with(word: str) -> None:
    for schema in (GraphConfig, TranslationConfig):
        with pytest.raises(UserError, match=r"curvature=.*; expected a number (from|>=) 1e-06"):
            load_recipe(schema, [word])


@pytest.mark.parametrize("measure", [digits.measure, tree.measure])
@pytest.mark.parametrize("rate", ["inf", "nan", "0"])
def test_rates_of_benchmarks_without_a_schema(measure: Callable[[list[str]], str], rate: str) -> None:
    with pytest.raises(UserError, match="expected numbers > 0"):
        measure(["--lr", rate])
