"""Training: the same numbers on any ranks, honest perplexity, and everything a run leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_train import optim
from lowrank_train.common.record import RunRecord
from lowrank_train.config.run_config import load_config
from lowrank_train.train.metrics import read_metrics
from tests.runs import (
    OPTIMIZERS,
    SEQUENCE,
    arguments,
    assert_equal_tensors,
    checkpoint_tensors,
    losses,
    train_on,
)
from tests.tiers import only_first_quick

STEPS = 20
CLOSE = {  # relative; of OPT in float32, Adam amplifies the rounding of gradients that are nearly zero
    ("float64", "llama"): 1e-9,
    ("float64", "opt"): 1e-9,
    ("float32", "llama"): 1e-5,
    ("float32", "opt"): 1e-3,
}


class Runs:
    """Runs that are trained once for all tests that look at them."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text, self.folder = text, folder
        self._made: dict[Any, tuple[Path, list[RunRecord]]] = {}

    def make(self, world_size: int, *more: str, **kwargs: str) -> tuple[Path, list[RunRecord]]:
        """The run's folder and the records of all ranks."""
        case = {"model": "llama", "optimizer": "adamw", "precision": "float32", **kwargs}
        key = (world_size, more, *sorted(case.items()))
        if key not in self._made:
            run_dir = self.folder / f"run-{len(self._made)}"
            self._made[key] = run_dir, train_on(world_size, arguments(self.text, run_dir, *more, **case))
        return self._made[key]

    def run_dir(self, world_size: int, *more: str, **kwargs: str) -> Path:
        return self.make(world_size, *more, **kwargs)[0]

    def losses(self, world_size: int, *more: str, **kwargs: str) -> list[float]:
        found = losses(self.run_dir(world_size, *more, **kwargs))
        assert len(found) == STEPS
        assert found[-1] < found[0] - 0.2  # it learns, or equal losses would mean little
        return found


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(text, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("precision", "model", "optimizer"),
    only_first_quick(
        [
            ("float64", "llama", "dct_adamw"),
            ("float64", "opt", "adamw"),
            ("float32", "llama", "adamw"),
            ("float32", "opt", "dct_adamw"),
        ]
    ),
)
def test_two_ranks_equal_one(runs: Runs, precision: str, model: str, optimizer: str) -> None:
    case = {"precision": precision, "model": model, "optimizer": optimizer}
    assert runs.losses(2, **case) == pytest.approx(runs.losses(1, **case), rel=CLOSE[precision, model])


DOUBLE = {"precision": "float64", "optimizer": "dct_adamw"}


@pytest.mark.parametrize(
    ("world_size", "more"),
    only_first_quick(
        [
            (1, ["micro_batch=2"]),
            (2, ["parallel.replicas=2"]),
            (4, ["parallel.replicas=2", "parallel.shards=2", "micro_batch=1"]),
            (4, []),
            (2, ["model.checkpointing=full"]),
            (1, ["loss_chunk=7"]),
        ],
        2,
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_how_a_step_is_cut_changes_nothing(runs: Runs, world_size: int, more: list[str]) -> None:
    assert runs.losses(world_size, *more, **DOUBLE) == pytest.approx(runs.losses(1, **DOUBLE), rel=1e-9)


@pytest.mark.slow
def test_gradient_checkpointing_recomputes(text: Path, tmp_path: Path) -> None:
    """That losses are equal would also hold if the switch did nothing."""
    calls = tmp_path / "calls"

    def count_attention() -> None:
        original = functional.scaled_dot_product_attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                with calls.open("a") as file:
                    file.write("x")
            return original(*args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = counted

    counts = []
    for i, setting in enumerate([("none",), ("full",), ("full", "model.checkpointed_layers=1"), ("selective",)]):
        more = [f"model.checkpointing={setting[0]}", *setting[1:]]
        words = arguments(text, tmp_path / str(i), "steps=1", *more, "micro_batch=8")
        calls.write_text("")
        train_on(1, words, before=count_attention)
        counts.append(len(calls.read_text()))
    assert counts == [2, 4, 3, 4]  # one per layer, and once more in backward; of selective only the call


@pytest.mark.parametrize(("model", "optimizer"), only_first_quick([("llama", "adamw"), ("opt", "dct_adamw")]))
def test_bfloat16_stays_near_float32_and_keeps_float32_weights(runs: Runs, model: str, optimizer: str) -> None:
    low = runs.losses(2, precision="bfloat16", model=model, optimizer=optimizer)
    full = runs.losses(1, precision="float32", model=model, optimizer=optimizer)
    assert low == pytest.approx(full, rel=2e-2)
    assert low != pytest.approx(full, rel=1e-6)  # it was computed in bfloat16
    run_dir = runs.run_dir(2, precision="bfloat16", model=model, optimizer=optimizer)
    weights = checkpoint_tensors(run_dir / "checkpoints" / f"step-{STEPS}", "model.")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


def test_seed_changes_weights_and_order(runs: Runs) -> None:
    assert runs.losses(1, "seed=1", **DOUBLE)[0] != pytest.approx(runs.losses(1, **DOUBLE)[0], rel=1e-6)


@pytest.mark.slow
def test_runs_repeat_exactly(runs: Runs, text: Path, tmp_path: Path) -> None:
    train_on(2, arguments(text, tmp_path, **DOUBLE))
    assert losses(tmp_path) == runs.losses(2, **DOUBLE)


@pytest.mark.slow
def test_streamed_text_trains_the_same_on_any_ranks(runs: Runs) -> None:
    words = ("data.streaming=true", "data.streams=4")
    alone = runs.losses(1, *words, **DOUBLE)
    assert runs.losses(2, *words, **DOUBLE) == pytest.approx(alone, rel=1e-9)
    assert alone != pytest.approx(runs.losses(1, **DOUBLE), rel=1e-6)  # in another order


@pytest.mark.parametrize("optimizer", only_first_quick(["adamw", "dct_adamw"]))
def test_what_a_method_leaves_to_adamw_has_a_rate_of_its_own(runs: Runs, optimizer: str) -> None:
    """Matrices at a rate of 0 stay where they were; the rest moves, and by the schedule."""
    still = ("optimizer.lr=0", "optimizer.other_lr=3e-3", "checkpoint.every=10")
    checkpoints = runs.run_dir(1, *still, optimizer=optimizer) / "checkpoints"
    before, after = (checkpoint_tensors(checkpoints / f"step-{step}", "model.") for step in (10, 20))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.endswith("_proj.weight")}
    same = ("optimizer.other_lr=3e-3",)  # as optimizer.lr
    assert losses(runs.run_dir(1, *same, optimizer=optimizer)) == runs.losses(1, optimizer=optimizer)


def test_the_learning_rate_follows_the_schedule(runs: Runs) -> None:
    rows = [row for row in read_metrics(runs.run_dir(1, **DOUBLE)) if "train/learning_rate" in row]
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[:4] == pytest.approx([3e-3 * k / 4 for k in (1, 2, 3, 4)])
    assert rates[-1] == pytest.approx(3e-4)


def test_clipping(runs: Runs) -> None:
    """A limit never reached is none; a tiny one shortens the steps, and the norm reported is the one before it."""
    eps = "optimizer.eps=1e-3"  # or Adam would undo any scaling of the gradient
    free, loose, tight = (losses(runs.run_dir(1, f"clip={limit}", eps, **DOUBLE)) for limit in ("null", "1e9", "1e-3"))
    assert loose == free
    assert tight[0] == free[0]
    assert tight[5] > free[5] + 0.1
    norms = [read_metrics(runs.run_dir(1, f"clip={x}", eps, **DOUBLE))[1]["train/grad_norm"] for x in ("null", "1e-3")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert norms[0] > 0.1


def test_gradient_norms_do_not_depend_on_the_ranks(runs: Runs) -> None:
    norms = [
        [row["train/grad_norm"] for row in read_metrics(runs.run_dir(world_size, **DOUBLE)) if "train/loss" in row]
        for world_size in (1, 2, 4)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-8)
    assert norms[2] == pytest.approx(norms[0], rel=1e-8)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("model", only_first_quick(["llama", "opt"]))
def test_perplexity_is_the_mean_over_tokens_on_any_ranks(runs: Runs, model: str) -> None:
    """Against the exported folder, transformers' logits and torch's cross-entropy, one long mean over tokens."""
    run_dir, (record, _) = runs.make(2, model=model, precision="float64")
    tokens = torch.from_numpy(np.fromfile(run_dir / "data" / "validation.bin", dtype="uint16").astype(np.int64))
    assert len(tokens) == 301
    assert 300 % SEQUENCE  # the last block is not full
    network = AutoModelForCausalLM.from_pretrained(run_dir / "huggingface", dtype=torch.float64).eval()
    each = []
    with torch.no_grad():
        for start in range(0, 300, SEQUENCE):
            stop = min(start + SEQUENCE, 300)
            logits = network(tokens[None, start:stop]).logits[0]
            each.append(functional.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="none"))
    every_token = torch.cat(each)
    assert record.validation_tokens == len(every_token) == 300
    assert record.validation_loss == pytest.approx(every_token.mean().item(), rel=1e-10)
    assert record.perplexity == pytest.approx(math.exp(every_token.mean().item()), rel=1e-10)
    mean_of_blocks = torch.stack([block.mean() for block in each]).mean().item()
    assert record.validation_loss != pytest.approx(mean_of_blocks, rel=1e-7)  # the wrong average would show

    alone = runs.run_dir(1, model=model, precision="float64")
    values = [[row["eval/loss"] for row in read_metrics(folder) if "eval/loss" in row] for folder in (run_dir, alone)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert len(values[0]) == 2


@pytest.mark.slow
def test_evaluation_of_fewer_blocks_than_ranks(runs: Runs) -> None:
    values = [
        [
            row["eval/loss"]
            for row in read_metrics(runs.run_dir(world_size, "evaluation.tokens=5", "steps=1", **DOUBLE))[::2]
        ]
        for world_size in (1, 4)
    ]
    assert len(values[0]) == 2
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_an_untrained_model_is_as_good_as_guessing(runs: Runs) -> None:
    first = read_metrics(runs.run_dir(1, **DOUBLE))[0]
    assert first["step"] == 0
    assert first["eval/loss"] == pytest.approx(math.log(300), rel=0.02)


@pytest.mark.slow
def test_evaluating_changes_nothing(runs: Runs) -> None:
    """Dropout is off while evaluating and on again after it, and random numbers go on as without it."""
    words = ("model.overrides.dropout=0.2",)
    plain = runs.losses(2, *words, model="opt")
    evaluated = runs.run_dir(2, *words, "evaluation.every=3", model="opt")
    assert losses(evaluated) == plain
    assert [row["step"] for row in read_metrics(evaluated) if "eval/loss" in row] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert plain != pytest.approx(runs.losses(2, model="opt"), rel=1e-4)  # dropout did something


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("world_size", "optimizer", "more"),
    [
        (1, "adamw", []),
        (2, "adamw", []),
        (1, "dct_adamw", []),
        (2, "dct_adamw", []),
        (4, "dct_adamw", ["parallel.replicas=2", "parallel.shards=2", "micro_batch=1"]),
    ],
)
def test_measured_optimizer_bytes_equal_the_prediction(
    runs: Runs, world_size: int, optimizer: str, more: list[str]
) -> None:
    _, records = runs.make(world_size, *more, optimizer=optimizer, precision="float64")
    assert len(records) == world_size
    for record in records:
        assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes > 10_000


def test_the_low_rank_state_is_smaller(runs: Runs) -> None:
    low, full = (runs.make(1, optimizer=name)[1][0].optimizer_state_bytes for name in ("dct_adamw", "adamw"))
    assert low < 0.8 * full


# --------------------------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    run_dir = tmp_path_factory.mktemp("finished") / "my run"
    words = arguments(text, run_dir, "evaluation.every=10", "checkpoint.every=5", "log_every=2", optimizer="dct_adamw")
    return run_dir, train_on(2, words, plot=True)[0]


def test_the_run_folder_holds_what_it_should_and_nothing_else(finished: tuple[Path, RunRecord]) -> None:
    run_dir, _ = finished
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "data",
        "huggingface",
        "lock",
        "loss.png",
        "metrics.jsonl",
        "record.json",
        "report.md",
        "tensorboard",
    ]
    assert not list(run_dir.rglob("*.tmp"))
    assert (run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_the_configuration_in_the_run_folder_is_the_runs(finished: tuple[Path, RunRecord], text: Path) -> None:
    run_dir, _ = finished
    words = arguments(text, run_dir, "evaluation.every=10", "checkpoint.every=5", "log_every=2", optimizer="dct_adamw")
    assert load_config([str(run_dir / "config.yaml")]) == load_config(words)


def test_scalars_and_their_steps(finished: tuple[Path, RunRecord]) -> None:
    rows = read_metrics(finished[0])
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(2, 21, 2))
    assert set(training[0]) >= {
        "step",
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens",
        "train/skipped_steps",
        "throughput/tokens_per_second",
        "memory/peak_gib",
    }
    assert [row["train/tokens"] for row in training] == [row["step"] * 8 * SEQUENCE for row in training]
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20]
    for row in evaluations:
        assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))


def test_tensorboard_holds_the_same_numbers(finished: tuple[Path, RunRecord]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = finished
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for name in ("train/loss", "eval/perplexity"):
        expected = [(row["step"], row[name]) for row in read_metrics(run_dir) if name in row]
        got = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_the_record_says_what_the_run_was(finished: tuple[Path, RunRecord]) -> None:
    run_dir, record = finished
    written = json.loads((run_dir / "record.json").read_text())
    assert {f.name for f in fields(RunRecord)} <= written.keys()
    assert written["validation_loss"] == record.validation_loss
    assert written["perplexity"] == pytest.approx(math.exp(record.validation_loss or 0))
    assert written["initial_perplexity"] == pytest.approx(300, rel=0.1)
    assert (record.status, record.steps, record.tokens, record.world_size) == ("finished", 20, 20 * 8 * SEQUENCE, 2)
    assert (record.skipped_steps, record.precision, record.seed) == (0, "float32", 0)
    assert record.optimizer["name"] == "dct_adamw"
    assert record.parameters == 2 * 300 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32) + 32
    assert record.data["sha1"]
    made = record.provenance
    assert made["command"]
    assert made["python"].startswith("3.")
    assert (
        made["versions"]["torch"] == torch.__version__.split("+")[0] or made["versions"]["torch"] == torch.__version__
    )
    assert {"commit", "device", "cores"} <= made.keys()


def test_the_report_shows_the_result(finished: tuple[Path, RunRecord]) -> None:
    run_dir, record = finished
    report = (run_dir / "report.md").read_text()
    for expected in (
        f"{record.perplexity:.4g}"[:5],
        "step-20",
        "huggingface",
        "loss.png",
        "seed 0",
        "dct_adamw",
        "torch",
    ):
        assert expected in report


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_transformers_loads_the_exported_folder_and_finds_the_same_loss(runs: Runs, model: str) -> None:
    """With transformers' own loss, on the validation blocks."""
    run_dir, (record, _) = runs.make(2, model=model)
    network = AutoModelForCausalLM.from_pretrained(run_dir / "huggingface").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "huggingface")
    assert next(network.parameters()).dtype == torch.float32
    assert len(tokenizer) == network.config.vocab_size == 300
    assert network.config.eos_token_id == tokenizer.eos_token_id
    tokens = torch.from_numpy(np.fromfile(run_dir / "data" / "validation.bin", dtype="uint16").astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 300, SEQUENCE):
            block = tokens[None, start : start + SEQUENCE + 1]
            total += network(block, labels=block).loss.item() * (block.shape[1] - 1)  # transformers shifts the labels
    assert record.validation_loss == pytest.approx(total / 300, rel=1e-6)
    assert network.generate(tokens[None, :4], max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_run_continues_from_the_exported_folder(runs: Runs, text: Path, tmp_path: Path) -> None:
    source = runs.run_dir(2, model="opt")
    before = json.loads((source / "record.json").read_text())
    words = [w for w in arguments(text, tmp_path / "next", "steps=3", model="opt") if not w.startswith("model.")]
    record = train_on(2, [*words, f"model.name={source / 'huggingface'}"])[0]
    assert record.initial_validation_loss == pytest.approx(before["validation_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "name", only_first_quick([name for name in optim.names() if name not in (*OPTIMIZERS, "riemannian_adamw")], 3)
)
def test_every_registered_optimizer_trains_by_its_name(runs: Runs, name: str) -> None:
    layers = ", rank: 4" if optim.find(name).layers is not None else ""  # theirs; the others' ranks have a default
    (record,) = runs.make(1, f"optimizer={{name: {name}, lr: 1.0e-3{layers}}}", "steps=3")[1]
    assert record.status == "finished"
    assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes


@pytest.mark.slow
def test_background_checkpoints_hold_the_step_they_are_named_after(runs: Runs) -> None:
    """Training goes on while they are written; what is written must not."""
    folders = [
        runs.run_dir(2, "checkpoint.every=4", "checkpoint.keep=9", f"checkpoint.asynchronous={switch}", model="opt")
        for switch in ("true", "false")
    ]
    for step in (4, 8, 12, 16, 20):
        background, blocking = (checkpoint_tensors(folder / "checkpoints" / f"step-{step}") for folder in folders)
        assert_equal_tensors(background, blocking)
