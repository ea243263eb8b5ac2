"""Mistakes and accidents while training: one message, exit code 2, nothing lost."""

from __future__ import annotations

import errno
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from lowrank_train.models import fsdp
from lowrank_train.train import checkpoint as checkpoint_module
from lowrank_train.train.metrics import read_metrics
from tests.distributed import DistributedFailure
from tests.runs import (
    SEQUENCE,
    Launched,
    arguments,
    assert_equal_tensors,
    at_step,
    checkpoint_tensors,
    checkpoints,
    documents,
    failure,
    losses,
    send,
    train_on,
    write_jsonl,
)
from tests.tiers import only_first_quick

# ------------------------------------------------------------------------------------------------- numbers not finite


def spoil(*steps: int, by: float = float("nan"), rank: int = 0, gradient_only: bool = False) -> Callable[[], None]:
    """For ``train_on``: the loss (or only its gradient) of these passes is not finite, on one rank."""

    def install() -> None:
        original = fsdp.token_loss
        passes = [0]

        def token_loss(model: Any, *args: Any) -> torch.Tensor:
            loss = original(model, *args)
            if torch.is_grad_enabled():
                passes[0] += 1
                if passes[0] in steps and dist.get_rank() == rank:
                    loss = loss + (loss - loss.detach()) * by if gradient_only else loss * by
            return loss

        fsdp.token_loss = token_loss  # type: ignore[assignment]

    return install


ONE_PASS = "micro_batch=8"


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    only_first_quick([("nan loss", "dct_adamw"), ("infinite loss", "adamw"), ("nan gradient", "dct_adamw")]),
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    text: Path, tmp_path: Path, kind: str, optimizer: str
) -> None:
    """Steps 1 (before any state), 4 and 5, on one rank of two; with a checkpoint of every step."""
    words = arguments(
        text, tmp_path, ONE_PASS, "steps=7", "checkpoint.every=1", "checkpoint.keep=9", optimizer=optimizer
    )
    by = float("inf") if kind == "infinite loss" else float("nan")
    records = train_on(2, words, spoil(1, 4, 5, by=by, rank=1, gradient_only=kind == "nan gradient"))
    assert [record.skipped_steps for record in records] == [3, 3]
    assert records[0].status == "finished"
    assert records[0].steps == 7

    rows = [row for row in read_metrics(tmp_path) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [1, 1, 1, 2, 3, 3, 3]
    bad = "train/grad_norm" if kind == "nan gradient" else "train/loss"
    assert [row["step"] for row in rows if row[bad] is None] == [1, 4, 5]

    saved = {step: checkpoint_tensors(tmp_path / "checkpoints" / f"step-{step}") for step in range(1, 8)}

    def part(step: int, section: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in saved[step].items() if key.startswith(section)}

    for skipped in (4, 5):
        for section in ("model.", "optimizer.state."):
            assert_equal_tensors(part(skipped, section), part(skipped - 1, section))
    for section in ("model.", "optimizer.state."):
        for value in part(7, section).values():
            assert value.double().isfinite().all()
    assert not torch.equal(*(saved[step]["model.lm_head.weight"] for step in (5, 6)))


def test_rows_of_skipped_steps_are_written_whatever_the_interval(text: Path, tmp_path: Path) -> None:
    train_on(1, arguments(text, tmp_path, ONE_PASS, "steps=6", "log_every=3"), spoil(4))
    assert [row["step"] for row in read_metrics(tmp_path) if "train/loss" in row] == [3, 4, 6]


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.slow
def test_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    text: Path, tmp_path: Path, background: str
) -> None:
    words = arguments(
        text,
        tmp_path / "run",
        ONE_PASS,
        "steps=12",
        "checkpoint.every=5",
        "max_bad_steps=3",
        f"checkpoint.asynchronous={background}",
    )
    message = failure(words, 2, spoil(2, 3, 6, 7, 8))
    assert "3 steps in a row, up to step 8" in message
    assert "step-5" in message
    assert checkpoints(tmp_path / "run") == ["step-5"]
    assert not list((tmp_path / "run").rglob("*.tmp"))

    # what was spoilt was the passes of that process: now it goes on from step 5
    record = train_on(2, words)[0]
    assert (record.status, record.skipped_steps) == ("finished", 2)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row] == list(range(1, 13))


def test_bad_steps_before_any_checkpoint(text: Path, tmp_path: Path) -> None:
    message = failure(arguments(text, tmp_path, ONE_PASS, "max_bad_steps=2"), 1, spoil(1, 2))
    assert "there is no earlier checkpoint" in message


def test_the_count_of_bad_steps_goes_on_after_a_resume(text: Path, tmp_path: Path) -> None:
    """Two before a kill and one after it; or a run that is restarted at each failure would go on for ever."""
    words = arguments(
        text, tmp_path, ONE_PASS, "checkpoint.every=4", "checkpoint.asynchronous=false", "max_bad_steps=3"
    )

    def spoil_and_die() -> None:
        spoil(3, 4)()
        at_step(5, send(signal.SIGKILL))()

    with pytest.raises(DistributedFailure, match="died without an answer"):
        train_on(1, words, spoil_and_die)
    assert checkpoints(tmp_path) == ["step-4"]
    assert "3 steps in a row, up to step 5" in failure(words, 1, spoil(1))


def test_a_learning_rate_that_explodes_ends_in_a_message(text: Path, tmp_path: Path) -> None:
    """No injection: weights near the end of float32."""
    words = arguments(text, tmp_path, "optimizer.lr=1e37", "schedule.warmup_steps=0", "max_bad_steps=2")
    assert "Lower optimizer.lr" in failure(words)


# ------------------------------------------------------------------------------------------------------------ full disk


def disk_full_from(step: int, how: str, rank: int = 0) -> Callable[[], None]:
    """For ``train_on``: from this step's checkpoint on, this rank cannot write."""

    def install() -> None:
        save = checkpoint_module.Checkpoints.save

        def limited(self: Any, at: int, *args: Any) -> None:
            self.wait()  # an earlier one may still be on its way
            if at >= step and dist.get_rank() == rank:
                if how == "file size limit":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                else:

                    def no_space(*_: Any, **__: Any) -> None:
                        raise OSError(errno.ENOSPC, "No space left on device")

                    target = {"weights": "write_data", "metadata": "finish"}[how]
                    setattr(filesystem.FileSystemWriter, target, no_space)
            save(self, at, *args)

        checkpoint_module.Checkpoints.save = limited  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize("background", only_first_quick(["true", "false"]))
@pytest.mark.parametrize(
    ("world_size", "how", "rank"),
    only_first_quick([(1, "file size limit", 0), (2, "weights", 1), (2, "metadata", 0)]),
)
def test_a_full_disk_keeps_the_last_good_checkpoint(
    text: Path, tmp_path: Path, background: str, world_size: int, how: str, rank: int
) -> None:
    words = arguments(text, tmp_path, "steps=12", "checkpoint.every=4", f"checkpoint.asynchronous={background}")
    message = failure(words, world_size, disk_full_from(8, how, rank))
    assert "cannot write the checkpoint" in message
    assert "step-8" in message
    assert "step-4" in message
    assert checkpoints(tmp_path) == ["step-4"]
    if how == "weights":
        assert train_on(world_size, words)[0].status == "finished"
        assert len(losses(tmp_path)) == 12


def test_a_full_disk_at_the_last_step_is_not_taken_for_success(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path, "steps=3")
    assert "there is no earlier checkpoint" in failure(words, 1, disk_full_from(3, "weights"))
    assert checkpoints(tmp_path) == []
    assert not (tmp_path / "record.json").exists()


def test_a_full_disk_through_the_launcher(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", no_space)
    run = Launched(arguments(text, tmp_path / "run", "steps=3"), tmp_path / "log")
    assert run.finish() == 2
    assert "No space left on device" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_run_folder_that_cannot_be_made(text: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / "file" if place == "a file" else tmp_path / "file" / "run"
    assert "run_dir" in failure(arguments(text, run_dir), 2)


def test_no_space_for_the_tokens(text: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

    assert str(tmp_path) in failure(arguments(text, tmp_path), 2, limit)


@pytest.mark.slow
def test_no_space_for_the_exported_model(text: Path, tmp_path: Path) -> None:
    """The last checkpoint is written before it, and the next start needs only to export."""

    def limit_after_saving() -> None:
        wait = checkpoint_module.Checkpoints.wait

        def limited(self: Any) -> None:
            wait(self)
            if (self.folder / "step-3").exists():
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        checkpoint_module.Checkpoints.wait = limited  # type: ignore[method-assign]

    words = arguments(text, tmp_path, "steps=3")
    assert "Hugging Face folder" in failure(words, 2, limit_after_saving)
    assert checkpoints(tmp_path) == ["step-3"]
    assert train_on(2, words)[0].status == "finished"
    assert (tmp_path / "huggingface" / "config.json").exists()


# ---------------------------------------------------------------------------------------------- numbers that do not fit


@pytest.mark.parametrize(
    ("world_size", "word", "expected"),
    [
        (1, "tokens_per_step=100", r"use 96"),
        (2, f"tokens_per_step={3 * SEQUENCE}", "does not divide by 2 ranks"),
        (1, "micro_batch=3", "use micro_batch=2"),
        (2, "parallel.replicas=3", "parallel.replicas=3 x parallel.shards=1 is not the world size 2"),
        (2, "parallel.shards=1", "is not the world size 2"),
        (1, "parallel.shards=2", "is not the world size 1"),
        (1, "device=cuda", "no CUDA device"),
        (2, "model.overrides.num_attention_heads=5", "attention heads (5)"),
        (2, "model.name=llama_61m", "did you mean"),
        (2, "data.path=nobody/nothing", "neither a local path nor"),
    ],
)
def test_numbers_and_names_that_do_not_fit(
    text: Path, tmp_path: Path, world_size: int, word: str, expected: str
) -> None:
    if word == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    message = failure(arguments(text, tmp_path, word), world_size)
    assert expected in message
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("word", ["rank=0", "rank=-1", "rank=33", "rank=1.5", "rank=many", "refresh_interval=0"])
def test_a_rank_that_does_not_fit_names_the_parameter(text: Path, tmp_path: Path, word: str) -> None:
    message = failure(arguments(text, tmp_path, f"optimizer.{word}", optimizer="dct_adamw"))
    assert word.split("=")[0] in message
    assert word.split("=")[1] in message
    if word.startswith("rank=33"):
        assert "32" in message
        assert "proj" in message


@pytest.mark.parametrize(
    "word", ["lr=-1", "lr=fast", "lr=null", "betas=[0.9]", "betas=[0.9,1.5]", "betas=3", "eps=-1", "weight_decay=-1"]
)
def test_hyperparameters_that_make_no_sense(text: Path, tmp_path: Path, word: str) -> None:
    assert "in optimizer" in failure(arguments(text, tmp_path, f"optimizer.{word}"))


def test_one_rank_that_cannot_read_stops_all(tmp_path: Path) -> None:
    """A streamed part without a document: only the rank that reads it notices."""
    path = write_jsonl(tmp_path / "few.jsonl", documents(3))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents(3, seed=1))
    words = ["data.streaming=true", "data.streams=4", f"data.validation={held_out}"]
    assert "lower data.streams" in failure(arguments(path, tmp_path / "run", *words), 2)


@pytest.mark.parametrize(
    "words",
    [
        ["stpes=5"],
        ["nothing.yaml"],
        ["optimizer.name=adamv"],
        ["model.name=llama_61m"],
        ["tokens_per_step=100"],
        ["optimizer.name=dct_adamw", "optimizer.rank=0"],
        ["data.path=nobody/nothing"],
        ["resume=nowhere"],
    ],
    ids=" ".join,
)
def test_the_launcher_says_one_thing_and_exits_with_2(text: Path, tmp_path: Path, words: list[str]) -> None:
    run = Launched([*arguments(text, tmp_path / "run"), *words], tmp_path / "log")
    assert run.finish() == 2
    assert [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in run.output
    assert len(run.output.splitlines()) < 5


def test_the_launcher_shows_help(tmp_path: Path) -> None:
    run = Launched(["--help"], tmp_path / "log")
    assert run.finish() == 0
    assert "usage: launch/pretrain.py" in run.output
    assert "schedule.warmup_steps (100): " in run.output


# ---------------------------------------------------------------------------------------------- two runs in one folder


def test_a_second_run_in_a_folder_in_use_is_refused_and_the_first_goes_on(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "run", "steps=200")
    first = Launched(words, tmp_path / "log")
    while first.process.is_alive() and not losses(tmp_path / "run"):
        time.sleep(0.01)
    message = failure(words)
    assert str(tmp_path / "run") in message
    assert "run_dir" in message
    first.signal(signal.SIGTERM)
    assert first.finish() == 0, first.output
    done = len(losses(tmp_path / "run"))
    assert 0 < done < 200
    short = train_on(1, [*words, f"steps={done + 1}"])[0]  # the folder is free again, though its lock file lies there
    assert short.status == "finished"


def test_a_finished_run_does_not_take_other_settings(text: Path, tmp_path: Path) -> None:
    train_on(1, arguments(text, tmp_path, "steps=2"))
    before = (tmp_path / "config.yaml").read_text()
    message = failure(arguments(text, tmp_path, "steps=2", "optimizer.lr=0.5"))
    assert "optimizer.lr was 0.003, is 0.5" in message
    assert (tmp_path / "config.yaml").read_text() == before
