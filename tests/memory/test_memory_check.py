"""A run that does not fit its device says so before it starts, and what would fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import Config, load_config
from lowrank_train.memory.check import check_fits, device_bytes, in_words, setting_that_fits
from lowrank_train.memory.step import predict
from tests.runs import arguments, train_on


def config(*words: str) -> Config:
    return load_config(["model.name=llama_60m", "seq_len=256", "tokens_per_step=8192", "micro_batch=32", *words])


def test_what_fits_is_not_spoken_of() -> None:
    peak = predict(config()).peak
    check_fits(config(), peak, world_size=1)
    check_fits(config(), None, world_size=1)
    with pytest.raises(UserError, match="which has"):
        check_fits(config(), peak - 1, world_size=1)


def test_the_largest_smaller_micro_batch_is_proposed() -> None:
    limit = predict(config("micro_batch=8")).peak
    assert setting_that_fits(config(), limit, world_size=1) == "micro_batch=8"
    with pytest.raises(UserError, match=r" on every device, which has .* GiB; it would fit with micro_batch=8$"):
        check_fits(config(), limit, world_size=1)


def test_checkpointing_is_proposed_where_no_micro_batch_is_small_enough() -> None:
    words = ("seq_len=2048", "tokens_per_step=65536", "micro_batch=32")
    limit = predict(config(*words, "micro_batch=2", "model.checkpointing=full")).peak
    assert limit < predict(config(*words, "micro_batch=1")).peak
    change = setting_that_fits(config(*words), limit, world_size=1)
    assert change == "model.checkpointing=full micro_batch=2"
    check_fits(config(*words, *change.split()), limit, world_size=1)  # what is proposed is what fits


def test_where_nothing_helps_that_is_said() -> None:
    weights = predict(config()).step.weights
    with pytest.raises(UserError, match="no micro-batch fits: take a smaller model, or more ranks"):
        check_fits(config(), weights, world_size=1)
    assert setting_that_fits(config(), 2 * weights, world_size=8) is not None


def test_a_cpu_has_no_limit_of_its_own() -> None:
    assert device_bytes(torch.device("cpu")) is None


def test_words_name_the_largest_term_first() -> None:
    memory = predict(config())
    largest = max(memory.terms, key=lambda name: memory.terms[name])
    assert f"({largest.replace('_', ' ')} " in in_words(memory)


def test_a_run_says_and_records_its_prediction(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "steps=2")
    (record,) = train_on(1, words)
    saved = json.loads((tmp_path / "run" / "record.json").read_text())
    assert saved["predicted_peak_gib"] == record.predicted_peak_gib > 0
    assert f"predicted: {record.predicted_peak_gib:.2f}" in (tmp_path / "run" / "report.md").read_text()
