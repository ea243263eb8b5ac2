"""Techniques that make more fit, in the trainer: the same training in less memory, priced by the memory tool."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.memory.step import predict
from lowrank_train.plan import Plan
from lowrank_train.train.metrics import read_metrics
from tests.runs import ROOT, arguments, failure, losses, train_on
from tests.tiers import only_first_quick
from tests.train.test_failures import spoil

RECIPES = sorted((ROOT / "configs" / "budget").glob("*.yaml"))


# ------------------------------------------------------------------------------------------------ updates in backward


@pytest.mark.parametrize("world_size", only_first_quick([1, 2]))
def test_updates_in_backward_train_as_updates_after_it(text: Path, tmp_path: Path, world_size: int) -> None:
    found = []
    for fused in ("true", "false"):
        run_dir = tmp_path / fused
        words = arguments(text, run_dir, f"fused_backward={fused}", "clip_by=parameter", "steps=6", precision="float64")
        train_on(world_size, words)
        norms = [row["train/grad_norm"] for row in read_metrics(run_dir) if "train/grad_norm" in row]
        found.append((losses(run_dir), norms))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "dct_adamw"])
def test_a_loss_that_is_not_finite_changes_nothing(text: Path, tmp_path: Path, optimizer: str) -> None:
    words = arguments(
        text, tmp_path / "run", "fused_backward=true", "clip=null", "steps=6", "micro_batch=2", optimizer=optimizer
    )
    record = train_on(2, words, spoil(4, rank=1))[0]  # the second micro-batch of step 2: the first is summed already
    assert (record.status, record.skipped_steps) == ("finished", 1)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["train/loss"] is None for row in rows].count(True) == 1
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_a_gradient_that_is_not_finite_ends_the_run(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "fused_backward=true", "clip=null", "checkpoint.every=1")
    message = failure(words, 2, spoil(3, by=3e38, gradient_only=True))
    assert "a gradient of step 3 was not finite, and with fused_backward=true others have been used already" in message
    assert "the last good checkpoint is" in message
    assert "step-2" in message


def test_global_clipping_that_cannot_wait_names_the_keys(text: Path, tmp_path: Path) -> None:
    message = failure(arguments(text, tmp_path / "run", "fused_backward=true", "clip=1.0"))
    assert message.startswith("fused_backward=true: max_norm=1.0 with clip='global' needs every gradient")
    assert message.endswith("or set clip_by=parameter or clip=null")


# ---------------------------------------------------------------------------------------- weights and state in few bits


@pytest.mark.parametrize("weights", only_first_quick(["bfloat16", "int8"]))
def test_low_precision_weights_learn_nearly_as_float32_does(text: Path, tmp_path: Path, weights: str) -> None:
    settings = ["precision=bfloat16", "optimizer.other_state_dtype=8bit", "steps=20"]
    low = train_on(1, arguments(text, tmp_path / "low", *settings, f"weights={weights}"))[0]
    full = train_on(1, arguments(text, tmp_path / "full", *settings))[0]
    assert low.validation_loss == pytest.approx(full.validation_loss, rel=0.02)
    assert low.validation_loss < low.initial_validation_loss - 0.3
    assert low.optimizer_state_bytes == low.predicted_optimizer_state_bytes


def test_a_run_with_int8_weights_goes_on_with_other_ranks(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "precision=bfloat16", "weights=int8", "checkpoint.every=5", "steps=5")
    first = train_on(2, words)[0]
    words = arguments(text, tmp_path / "run", "precision=bfloat16", "weights=int8", "steps=8")
    then = train_on(1, words)[0]
    assert (then.status, then.steps) == ("finished", 8)
    assert then.validation_loss < first.validation_loss


# -------------------------------------------------------------------------------------------------------- the recipes


def test_there_is_a_recipe_for_every_budget_of_the_readme() -> None:
    names = {path.stem for path in RECIPES}
    assert {"llama_1b_12gib", "llama_3b_24gib", "llama_7b_24gib", "llama_7b_16gib", "opt_1.3b_12gib"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_needs_what_it_says(path: Path) -> None:
    said = re.search(r"# Predicted peak: ([\d.]+) GiB of one GPU with (\d+) GiB", path.read_text())
    assert said is not None
    peak = predict(Plan.of(load_config([str(path)]))).peak / 2**30
    assert peak == pytest.approx(float(said[1]), abs=0.006)
    assert peak < 0.97 * float(said[2]), "CUDA and its allocator need some too"
    assert f"_{said[2]}gib" in path.stem


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights=bfloat16"], "weights=bfloat16 with precision=float32: nothing would be computed more exactly"),
        (
            ["weights=int8", "precision=bfloat16", "optimizer.name=sst", "optimizer.rank=4"],
            "weights=int8 is for matric",
        ),
        (["model.checkpointed_layers=2"], "checkpointed_layers=2 with model.checkpointing=none; set that to"),
        (["model.checkpointing=full", "model.checkpointed_layers=3"], "llama_9m has 2 decoder layers: use a number"),
        (["model.checkpointing=selective", "optimizer.name=sst", "optimizer.rank=4"], "a spectral layer makes its"),
        (["model.checkpointing=some"], "wrong value for 'model.checkpointing'"),
        (["optimizer.other_state_dtype=2bit"], "state_dtype='2bit'; expected None or one of"),
        (
            ["optimizer.name=sst", "optimizer.rank=4", "optimizer.offload_state=true"],
            "offload_state=True for parameters",
        ),
    ],
)
def test_settings_that_do_not_go_together(text: Path, tmp_path: Path, words: list[str], message: str) -> None:
    try:
        found = failure(arguments(text, tmp_path / "run", *words))
    except UserError as error:
        found = str(error)
    assert message in found
