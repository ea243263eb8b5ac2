"""Stopping and going on: signals, kills at any instant, other numbers of ranks, damaged and foreign checkpoints."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lowrank_train import optim
from lowrank_train.train import checkpoint as checkpoint_module
from lowrank_train.train import run as run_module
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
    exact_history,
    failure,
    losses,
    send,
    train_on,
    write_jsonl,
)
from tests.tiers import only_first_quick

STEPS = 12


# ------------------------------------------------------------------------------------------------------- the same ranks

CASES = {
    "llama, adamw, 1 rank": (1, {"optimizer": "adamw"}, []),
    "opt with dropout, streamed, dct_adamw, bfloat16, 2 ranks, hybrid": (
        2,
        {"model": "opt", "optimizer": "dct_adamw", "precision": "bfloat16"},
        ["model.overrides.dropout=0.3", "data.streaming=true", "data.streams=4", "parallel.replicas=2"],
    ),
    "int8 weights, updates in backward, 8-bit state, 2 ranks": (
        2,
        {"optimizer": "dct_adamw", "precision": "bfloat16"},
        ["weights=int8", "fused_backward=true", "optimizer.state_dtype=8bit", "optimizer.offload_state=true"],
    ),
}


@pytest.mark.parametrize("case", only_first_quick(CASES))
def test_a_resumed_run_is_bit_identical(text: Path, tmp_path: Path, case: str) -> None:
    """Stopped by a signal at step 5, in the middle of a refresh interval; then killed at step 10 after checkpoint 9."""
    world_size, kwargs, more = CASES[case]
    more = [*more, f"steps={STEPS}", "evaluation.every=4", "checkpoint.every=3"]
    whole = train_on(world_size, arguments(text, tmp_path / "whole", *more, **kwargs))[0]

    words = arguments(text, tmp_path / "cut", *more, **kwargs)
    stopped = train_on(world_size, words, at_step(5, send(signal.SIGTERM), rank=world_size - 1))[0]
    assert (stopped.status, stopped.steps) == ("interrupted", 5)
    assert checkpoints(tmp_path / "cut") == ["step-3", "step-5"]
    with pytest.raises(DistributedFailure, match="died without an answer"):
        train_on(world_size, words, at_step(11, send(signal.SIGKILL)))
    resumed = train_on(world_size, words)[0]

    assert exact_history(tmp_path / "cut") == exact_history(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == STEPS
    assert (resumed.status, resumed.tokens) == ("finished", STEPS * 8 * SEQUENCE)
    assert resumed.validation_loss == whole.validation_loss
    assert resumed.initial_validation_loss == whole.initial_validation_loss
    ends = [tmp_path / name / "checkpoints" / f"step-{STEPS}" for name in ("cut", "whole")]
    assert_equal_tensors(*(checkpoint_tensors(end, "model.") for end in ends))
    assert_equal_tensors(*(checkpoint_tensors(end, "optimizer.") for end in ends))
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_a_finished_run_started_again_trains_no_further(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path, "steps=4")
    first = train_on(1, words)[0]
    history = exact_history(tmp_path)
    again = train_on(1, words)[0]
    assert (again.status, again.steps, again.tokens) == ("finished", first.steps, first.tokens)
    assert again.validation_loss == first.validation_loss
    assert exact_history(tmp_path) == history


def test_a_longer_run_continues_a_finished_one(text: Path, tmp_path: Path) -> None:
    constant = "schedule.name=constant"
    train_on(1, arguments(text, tmp_path / "long", "steps=8", constant))
    train_on(1, arguments(text, tmp_path / "short", "steps=4", constant))
    train_on(1, arguments(text, tmp_path / "short", "steps=8", constant))
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(text: Path, tmp_path: Path) -> None:
    """An earlier version saved fewer settings of the parameter groups, and the run goes on bit for bit."""

    def save_fewer() -> None:
        original = optim.MatrixOptimizer.state_dict

        def state_dict(self: optim.MatrixOptimizer) -> dict[str, Any]:
            saved = original(self)
            for group in saved["param_groups"]:
                del group["weight_layout"], group["stochastic_rounding"]
            return saved

        optim.MatrixOptimizer.state_dict = state_dict  # type: ignore[method-assign]

    train_on(1, arguments(text, tmp_path / "whole", "steps=4", optimizer="dct_adamw"))
    words = arguments(text, tmp_path / "old", "steps=4", optimizer="dct_adamw")
    train_on(1, words, lambda: [save_fewer(), at_step(2, send(signal.SIGTERM))()])  # type: ignore[arg-type, func-returns-value]
    train_on(1, words)
    assert_equal_tensors(*(checkpoint_tensors(tmp_path / name / "checkpoints" / "step-4") for name in ("old", "whole")))


def test_the_configuration_decides_hyperparameters_after_a_resume(text: Path, tmp_path: Path) -> None:
    train_on(1, arguments(text, tmp_path, "steps=2", "schedule.name=constant", "schedule.warmup_steps=0"))
    train_on(
        1, arguments(text, tmp_path, "steps=4", "schedule.name=constant", "schedule.warmup_steps=0", "optimizer.lr=0.5")
    )
    rates = [row["train/learning_rate"] for row in read_metrics(tmp_path) if "train/learning_rate" in row]
    assert rates == [3e-3, 3e-3, 0.5, 0.5]


# ---------------------------------------------------------------------------------------------------------- other ranks


@pytest.mark.slow
def test_a_streamed_run_of_two_ranks_is_resumed_on_others(text: Path, tmp_path: Path) -> None:
    more = [f"steps={STEPS}", "data.streaming=true", "data.streams=8"]
    train_on(2, arguments(text, tmp_path / "whole", *more, optimizer="dct_adamw"))
    expected = losses(tmp_path / "whole")

    stopped = arguments(text, tmp_path / "stopped", *more, optimizer="dct_adamw")
    train_on(2, stopped, at_step(6, send(signal.SIGINT)))
    for world_size, others in ((1, []), (4, ["parallel.replicas=2"])):
        run_dir = tmp_path / f"on-{world_size}"
        shutil.copytree(tmp_path / "stopped", run_dir)
        train_on(world_size, arguments(text, run_dir, *more, *others, optimizer="dct_adamw"))
        assert losses(run_dir)[:6] == expected[:6]
        assert losses(run_dir) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_resharding_twice(text: Path, tmp_path: Path) -> None:
    """4, 1 and 2 ranks; in float64, where nothing but the order of sums may differ."""
    case = {"model": "opt", "optimizer": "dct_adamw", "precision": "float64"}
    train_on(1, arguments(text, tmp_path / "whole", f"steps={STEPS}", **case))
    words = arguments(text, tmp_path / "cut", f"steps={STEPS}", **case)
    for world_size, stop in ((4, 4), (1, 8)):
        train_on(world_size, words, at_step(stop, send(signal.SIGTERM), rank=0))
    train_on(2, words)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert Launched(long_run(text, run_dir), run_dir / "log").finish() == 0
    return run_dir


def long_run(text: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(text, run_dir, "steps=60", "checkpoint.every=3", "checkpoint.keep=2", *more, optimizer="dct_adamw")


def wait_for_checkpoint(run: Launched, run_dir: Path, after: int = 0) -> None:
    deadline = time.monotonic() + 60
    while run.process.is_alive() and time.monotonic() < deadline:
        steps = [p.name for p in run_dir.glob("checkpoints/step-*") if p.name[5:].isdigit()]
        if any(int(name[5:]) > after for name in steps):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint came\n{run.output}")


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_as_if_nothing_had_been(
    text: Path, tmp_path: Path, whole: Path, background: str
) -> None:
    words = long_run(text, tmp_path / "run", f"checkpoint.asynchronous={background}")
    moments = random.Random(background)
    reached = 0
    for _ in range(2):
        run = Launched(words, tmp_path / "log")
        wait_for_checkpoint(run, tmp_path / "run", after=reached)
        time.sleep(moments.uniform(0, 0.1))
        run.signal(signal.SIGKILL)
        if run.finish() == 0:
            break  # it was faster
        published = [name for name in checkpoints(tmp_path / "run") if name[5:].isdigit()]
        reached = max(int(name[5:]) for name in published)
    assert reached > 0
    final = Launched(words, tmp_path / "log")
    assert final.finish() == 0, final.output
    assert exact_history(tmp_path / "run") == exact_history(whole)
    assert checkpoints(tmp_path / "run") == ["step-57", "step-60"]
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_killed_at_any_instant_of_publishing_a_checkpoint_one_is_left(text: Path, tmp_path: Path) -> None:
    """The second checkpoint, with only one kept: before it has its name, and in the middle of deleting the first."""
    words = arguments(text, tmp_path / "whole", "steps=8", "checkpoint.every=2", "checkpoint.keep=1")
    train_on(1, words)

    def die_before_naming() -> None:
        original = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name == "step-4.tmp":
                send(signal.SIGKILL)()
            return original(self, target)

        Path.rename = rename  # type: ignore[method-assign, assignment]

    def die_while_deleting() -> None:
        original = shutil.rmtree

        def rmtree(path: Path, *args: object, **kwargs: object) -> None:
            if "step-2" in str(path):
                next(Path(path).glob("*.distcp")).unlink()
                send(signal.SIGKILL)()
            original(path, *args, **kwargs)  # type: ignore[arg-type]

        shutil.rmtree = rmtree  # type: ignore[assignment]
        checkpoint_module.shutil.rmtree = rmtree  # type: ignore[attr-defined, assignment]

    for name, die, left in (("naming", die_before_naming, "step-2"), ("deleting", die_while_deleting, "step-4")):
        run_dir = tmp_path / name
        words = arguments(text, run_dir, "steps=8", "checkpoint.every=2", "checkpoint.keep=1")
        with pytest.raises(DistributedFailure, match="died without an answer"):
            train_on(1, words, die)
        names = checkpoints(run_dir)
        assert left in names
        assert [n for n in names if not n.endswith(".tmp")] == [left]
        assert len(names) == 2  # something half done lies beside it
        train_on(1, words)
        assert exact_history(run_dir) == exact_history(tmp_path / "whole")
        assert checkpoints(run_dir) == ["step-8"]


def test_killed_before_its_first_checkpoint_it_starts_over(text: Path, tmp_path: Path) -> None:
    words = arguments(text, tmp_path / "cut", "steps=5")
    with pytest.raises(DistributedFailure, match="died without an answer"):
        train_on(1, words, at_step(4, send(signal.SIGKILL)))
    assert checkpoints(tmp_path / "cut") == []
    train_on(1, words)
    train_on(1, arguments(text, tmp_path / "whole", "steps=5"))
    assert exact_history(tmp_path / "cut") == exact_history(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------------- signals


def test_a_signal_ends_the_run_well_and_the_printed_command_resumes_it(text: Path, tmp_path: Path, whole: Path) -> None:
    run = Launched(long_run(text, tmp_path / "run"), tmp_path / "log")
    wait_for_checkpoint(run, tmp_path / "run")
    run.signal(signal.SIGINT)
    run.signal(signal.SIGINT)  # a launcher and a terminal both send it
    assert run.finish() == 0, run.output
    assert "SIGINT: finishing" in run.output
    assert "Traceback" not in run.output
    found = re.search(r"stopped at step (\d+); resume with: (.*)", run.output)
    assert found is not None
    step, command = int(found[1]), shlex.split(found[2])
    assert 3 <= step < 60
    assert checkpoints(tmp_path / "run")[-1] == f"step-{step}"
    assert "interrupted" in (tmp_path / "run" / "report.md").read_text()

    assert command[0] == "python"
    assert command[1].endswith("launch/pretrain.py")
    again = Launched(command[2:], tmp_path / "log")
    assert again.finish() == 0
    assert "resuming from" in again.output
    assert exact_history(tmp_path / "run") == exact_history(whole)


@pytest.mark.slow
def test_a_signal_to_one_rank_during_the_first_step(text: Path, tmp_path: Path) -> None:
    """Both stop together, and what was done is kept."""
    words = arguments(text, tmp_path, "steps=9")
    records = train_on(2, words, at_step(1, send(signal.SIGTERM), rank=1))
    assert [(record.status, record.steps) for record in records] == [("interrupted", 1)] * 2
    assert train_on(2, words)[0].status == "finished"
    assert len(losses(tmp_path)) == 9


def test_a_signal_before_training_ends_the_process_at_once(text: Path, tmp_path: Path) -> None:
    """Reading text may take hours, and there is nothing to keep yet but what was there before."""

    def while_reading() -> None:
        run_module.prepare_data = lambda *_: send(signal.SIGTERM)()  # type: ignore[assignment]

    with pytest.raises(DistributedFailure, match="died without an answer"):
        train_on(1, arguments(text, tmp_path, "steps=9"), while_reading)
    assert train_on(1, arguments(text, tmp_path, "steps=9"))[0].status == "finished"


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.slow
def test_a_signal_to_one_rank_while_a_checkpoint_is_written(text: Path, tmp_path: Path, background: str) -> None:
    """All ranks must agree on the last step, whatever the instant: else one waits for the other for ever."""

    def during_save() -> None:
        original = checkpoint_module.Checkpoints.save

        def save(self: object, step: int, *args: object) -> None:
            original(self, step, *args)  # type: ignore[arg-type]
            if step == 4 and dist.get_rank() == 0:
                send(signal.SIGTERM)()

        checkpoint_module.Checkpoints.save = save  # type: ignore[method-assign, assignment]

    words = arguments(text, tmp_path, "steps=9", "checkpoint.every=4", f"checkpoint.asynchronous={background}")
    records = train_on(2, words, during_save)
    assert {(record.status, record.steps) for record in records} == {("interrupted", 5)}
    assert checkpoints(tmp_path) == ["step-4", "step-5"]


# ---------------------------------------------------------------------------------------------- choosing a checkpoint


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(text: Path, tmp_path: Path, keep: int) -> None:
    train_on(1, arguments(text, tmp_path, "steps=11", "checkpoint.every=2", f"checkpoint.keep={keep}"))
    assert checkpoints(tmp_path) == ["step-8", "step-10", "step-11"][-keep:]


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with several checkpoints; to be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    words = arguments(text, run_dir, "steps=8", "checkpoint.every=2", "checkpoint.keep=9", optimizer="dct_adamw")
    train_on(1, words)
    return run_dir


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def go_on(text: Path, run_dir: Path, *more: str, optimizer: str = "dct_adamw", model: str = "llama") -> list[str]:
    return arguments(text, run_dir, "steps=8", *more, optimizer=optimizer, model=model)


def test_resume_never_refuses_to_overwrite(text: Path, copy: Path, tmp_path: Path) -> None:
    assert "resume=never, but" in failure(go_on(text, copy, "resume=never"))
    assert checkpoints(copy) == ["step-2", "step-4", "step-6", "step-8"]
    train_on(1, go_on(text, tmp_path / "fresh", "resume=never", "steps=2"))
    assert len(losses(tmp_path / "fresh")) == 2


@pytest.mark.parametrize("what", ["checkpoint", "run folder"])
def test_resume_from_a_path_in_another_run_folder(text: Path, source: Path, tmp_path: Path, what: str) -> None:
    path = source / "checkpoints" / "step-4" if what == "checkpoint" else source
    done = 4 if what == "checkpoint" else 8
    words = go_on(text, tmp_path / "branch", f"resume={path}")
    record = train_on(1, words)[0]
    assert record.tokens == 8 * 8 * SEQUENCE
    rows = [row for row in read_metrics(tmp_path / "branch") if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(done + 1, 9))
    assert [row["train/loss"] for row in rows] == losses(source)[done:]


def test_going_back_where_later_checkpoints_lie_is_refused(text: Path, source: Path, copy: Path) -> None:
    """Those of the two ways could not be told apart afterwards, and the new ones would be the first to be deleted."""
    for path in (copy / "checkpoints" / "step-2", source / "checkpoints" / "step-6"):
        message = failure(go_on(text, copy, f"resume={path}"))
        assert "up to step-8" in message
        assert "run_dir" in message
    assert checkpoints(copy) == ["step-2", "step-4", "step-6", "step-8"]
    assert losses(copy) == losses(source)


def test_the_newest_checkpoint_may_be_given_by_path(text: Path, source: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-8")
    train_on(1, go_on(text, copy, f"resume={copy / 'checkpoints' / 'step-6'}"))
    assert losses(copy) == losses(source)


@pytest.mark.parametrize("where", ["nothing here", "an empty folder", "a text file"])
def test_resume_from_what_is_no_checkpoint(text: Path, tmp_path: Path, where: str) -> None:
    path = tmp_path / "given"
    if where == "an empty folder":
        path.mkdir()
    if where == "a text file":
        path.write_text("no")
    message = failure(go_on(text, tmp_path / "run", f"resume={path}"))
    assert f"resume={path}: no checkpoint there" in message


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(
    text: Path, source: Path, tmp_path: Path
) -> None:
    resume = f"resume={source / 'checkpoints' / 'step-8'}"
    other_text = write_jsonl(tmp_path / "other.jsonl", documents(300, seed=5))
    refused = {
        "hidden_size = 32; expected 64": go_on(text, tmp_path / "1", resume, "model.overrides.hidden_size=64"),
        "num_hidden_layers = 2; expected 3": go_on(text, tmp_path / "2", resume, "model.overrides.num_hidden_layers=3"),
        "model_type = llama; expected opt": go_on(text, tmp_path / "3", resume, model="opt"),
        r"optimizer\.name = dct_adamw; expected adamw": go_on(text, tmp_path / "4", resume, optimizer="adamw"),
        r"optimizer\.state.*shape.*rank": go_on(text, tmp_path / "5", resume, "optimizer.rank=4"),
        "train_tokens = |sha1 = ": go_on(other_text, tmp_path / "6", resume),
        "seq_len = 16; expected 8": go_on(text, tmp_path / "7", resume, "seq_len=8", "tokens_per_step=128"),
    }
    for expected, words in refused.items():
        message = failure(words)
        assert re.search(expected, message), message
        assert str(source) in message


def test_fewer_layers_than_the_checkpoint_has(text: Path, source: Path, tmp_path: Path) -> None:
    """Nothing is missing then, but the weights that are left out would be lost without a word."""
    resume = f"resume={source / 'checkpoints' / 'step-8'}"
    message = failure(go_on(text, tmp_path, resume, "model.overrides.num_hidden_layers=1"))
    assert "num_hidden_layers = 2; expected 1" in message


def damage(path: Path, how: str) -> None:
    match how:
        case "metadata deleted":
            (path / ".metadata").unlink()
        case "metadata cut":
            (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:50])
        case "metadata empty":
            (path / ".metadata").write_bytes(b"")
        case "weights cut":
            file = max(path.glob("*.distcp"), key=lambda f: f.stat().st_size)
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "weights deleted":
            next(path.glob("*.distcp")).unlink()
        case "facts cut":
            (path / "about.json").write_text('{"step":')
        case "facts deleted":
            (path / "about.json").unlink()
        case "no folder":
            shutil.rmtree(path)
            path.write_text("")


def test_a_checkpoint_that_is_not_complete_is_passed_over(text: Path, source: Path, copy: Path) -> None:
    damage(copy / "checkpoints" / "step-8", "metadata deleted")
    (copy / "checkpoints" / "step-notes").mkdir()
    damage(copy / "checkpoints" / "step-notes", "facts cut")
    record = train_on(1, go_on(text, copy))[0]
    assert record.status == "finished"
    assert losses(copy) == losses(source)


@pytest.mark.parametrize(
    "how", ["metadata cut", "metadata empty", "weights cut", "weights deleted", "facts cut", "facts deleted"]
)
def test_a_damaged_checkpoint_is_set_aside(text: Path, source: Path, copy: Path, how: str) -> None:
    damage(copy / "checkpoints" / "step-8", how)
    train_on(1, go_on(text, copy, "checkpoint.keep=9"))
    assert losses(copy) == losses(source)
    assert checkpoints(copy) == ["step-2", "step-4", "step-6", "step-8", "step-8.damaged"]  # nothing was lost


@pytest.mark.slow
def test_a_damaged_checkpoint_given_by_path(text: Path, copy: Path, tmp_path: Path) -> None:
    damage(copy / "checkpoints" / "step-8", "metadata deleted")
    message = failure(go_on(text, tmp_path / "run", f"resume={copy / 'checkpoints' / 'step-8'}"), world_size=2)
    assert "step-8 is damaged" in message


def test_a_step_by_another_name_is_not_taken_for_a_checkpoint(text: Path, source: Path, copy: Path) -> None:
    """Such as the copy somebody made."""
    shutil.copytree(copy / "checkpoints" / "step-4", copy / "checkpoints" / "step-4-good")
    damage(copy / "checkpoints" / "step-8", "metadata deleted")
    train_on(1, go_on(text, copy, "checkpoint.keep=9"))
    assert losses(copy) == losses(source)
    assert "step-4-good" in checkpoints(copy)
