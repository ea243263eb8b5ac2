"""The benchmarks of whole training steps and of the digits: what they write, and the order the paper found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank_train.bench import digits
from lowrank_train.bench.digits import METHODS, DigitsConfig, train_digits
from lowrank_train.bench.steps import training_step
from lowrank_train.common.errors import UserError

pytestmark = pytest.mark.slow

TINY = [
    "--model",
    "llama_9m",
    "--layers",
    "1",
    "--vocab-size",
    "64",
    "--tokens",
    "32",
    "--seq-len",
    "16",
    "--rank",
    "8",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_whole_steps_are_timed_and_written(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--rounds", "2", "--device", "cpu"]
    table = training_step.measure([*TINY, *out, "--methods", "sst", "galore_adamw", "--frozen-dtype", "float16"])
    figures = json.loads((tmp_path / "training.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["adamw", "sst", "galore_adamw"]
    assert figures["rows"][0]["ratio"] == 1
    adamw, sst, _ = figures["rows"]
    assert sst["trainable_parameters"] < adamw["trainable_parameters"]
    (found,) = figures["rounds_of_svd"]
    assert found["steps_per_round"] == 200 * 128 // 8
    assert 0 < found["share_of_training"] < 1
    assert table in (tmp_path / "training.md").read_text()
    assert "A re-SVD of all layers" in (tmp_path / "training.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "33"], "--tokens 33 is not a multiple of --seq-len 16"),
        (["--methods", "ssd"], "unknown optimizer 'ssd'; did you mean 'sst'"),
        (["--methods", "sst", "--rank", "129"], "rank=129; expected a whole number from 1 to 128"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_step.measure([*TINY, "--out", str(tmp_path), "--rounds", "1", *arguments])


def test_digits_are_written(tmp_path: Path) -> None:
    table = digits.measure(["--epochs", "1", "--lr", "1e-3", "3e-3", "--seeds", "0", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "digits.json").read_text())
    assert len(figures["runs"]) == len(METHODS) * 2
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(METHODS)


def test_digits_come_in_the_papers_order() -> None:
    """LoRA, ReLoRA*, SST, full; after 10 epochs, where the distances are wider than a seed's."""
    data = digits.images_and_classes()
    accuracy = {name: train_digits(DigitsConfig(name, 3e-3, seed=0, epochs=10), data)["accuracy"] for name in METHODS}
    assert accuracy["lora"] < accuracy["sst"] - 3
    assert accuracy["relora"] < accuracy["sst"] - 1
    assert accuracy["sst"] < accuracy["full"]
