"""A run that does not fit its device says so before it starts, and what would fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config
from lowrank_train.memory.check import check_fits, setting_that_fits
from lowrank_train.memory.phases import StepMemory
from lowrank_train.memory.step import predict
from lowrank_train.plan import Plan
from tests.runs import arguments, train_on


def config(*words: str) -> Config:
    return load_config(["model.name=llama_60m", "seq_len=256", "tokens_per_step=8192", "micro_batch=32", *words])


def peak_of(config: Config) -> StepMemory:
    return predict(Plan.of(config))


def check(config: Config, limit: int) -> None:
    plan = Plan.of(config)
    check_fits(plan, predict(plan), limit)


def test_what_fits_is_not_spoken_of() -> None:
    peak = peak_of(config()).peak
    check(config(), peak)
    with pytest.raises(UserError, match="which has"):
        check(config(), peak - 1)


def test_the_largest_smaller_micro_batch_is_proposed() -> None:
    limit = peak_of(config("micro_batch=8")).peak
    assert setting_that_fits(Plan.of(config()), limit) == "micro_batch=8"
    with pytest.raises(UserError, match=r" on every device, which has .* GiB; it would fit with micro_batch=8$"):
        check(config(), limit)


def test_checkpointing_is_proposed_where_no_micro_batch_is_small_enough() -> None:
    words = ("seq_len=2048", "tokens_per_step=65536", "micro_batch=32")
    limit = peak_of(config(*words, "micro_batch=2", "model.checkpointing=full")).peak
    assert limit < peak_of(config(*words, "micro_batch=1")).peak
    change = setting_that_fits(Plan.of(config(*words)), limit)
    assert change == "model.checkpointing=full micro_batch=2"
    check(config(*words, *change.split()), limit)  # what is proposed is what fits


def test_where_nothing_helps_that_is_said() -> None:
    weights = peak_of(config()).step.weights
    with pytest.raises(UserError, match="no micro-batch fits: take a smaller model, or more ranks"):
        check(config(), weights)
    assert setting_that_fits(Plan.of(config(), world_size=8), 2 * weights) is not None


def test_words_name_the_largest_term_first() -> None:
    memory = peak_of(config())
    largest = max(memory.terms, key=lambda name: memory.terms[name])
    assert f"({largest.replace('_', ' ')} " in memory.in_words()


def test_a_run_says_and_records_its_prediction(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "steps=2")
    (record,) = train_on(1, words)
    saved = json.loads((tmp_path / "run" / "record.json").read_text())
    assert saved["predicted_peak_gib"] == record.predicted_peak_gib > 0
    assert f"predicted: {record.predicted_peak_gib:.2f}" in (tmp_path / "run" / "report.md").read_text()
