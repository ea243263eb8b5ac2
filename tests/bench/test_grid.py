"""The one engine of all benchmarks: what it trains, what it takes from an earlier session, and what it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowrank_train.bench import (
    compression,
    digits,
    graphs,
    quality,
    trainings,
    translation,
    tree,
)
from lowrank_train.bench.grid import Grid, Group, Row, failures, groups
from lowrank_train.bench.report import Panel, Report, publish
from lowrank_train.bench.steps import cost, optimizer_step, training_step
from lowrank_train.bench.trainings import Trainer, check_same, keep_record
from lowrank_train.benchmarks import COMMANDS
from lowrank_train.common.errors import Diverged, UserError
from lowrank_train.config.settings import setting
from tests.runs import ROOT

RECORDS = ROOT / "docs" / "records"


@dataclass
class Toy:
    """A training that ends as it is told."""

    fate: str = setting("finished", "how it ends")
    lr: float = setting(0.1, "also its score")
    seed: int = setting(0, "added to its score")
    size: int = setting(1, "a setting")
    run_dir: str | None = setting(None, "folder", path=True)


def train_toy(config: Toy) -> None:
    folder = Path(str(config.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls").open("a") as calls:
        calls.write("x")
    if config.fate == "diverged":
        raise Diverged("the loss is inf; lower lr")
    if config.fate == "failed":
        raise UserError("the disk is full")
    keep_record(config, {"score": config.lr + config.seed, "text": "a", "status": config.fate, "config": vars(config)})


def grid(folder: Path, *rows: Row, size: int = 1, jobs: int | None = None) -> Grid[Toy]:
    def config(fate: str, seed: int, lr: float = 0.1) -> Toy:
        return Toy(fate, lr, seed, size, str(folder / f"{fate}-{lr}-{seed}"))

    trainer = Trainer(train_toy, ["score"], jobs, no_more_use=["calls.tmp"])
    return Grid(rows, config, trainer, score=lambda record: record["score"])


def calls(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/calls")}


FINISHED, DIVERGED = Row({"fate": "finished"}, [0.1, 0.2], [1, 2]), Row({"fate": "diverged"}, [0.1], [1])


@pytest.mark.parametrize("jobs", [None, 2])
def test_what_ended_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int | None) -> None:
    monkeypatch.setattr(trainings, "_START", "fork")  # another server would take seconds to import everything
    for _ in range(2):
        results = grid(tmp_path, FINISHED, DIVERGED, jobs=jobs).train()
        assert [result.outcome.status for result in results] == ["finished"] * 4 + ["diverged"]
        assert set(calls(tmp_path).values()) == {1}
    assert results[-1].run() == {
        "fate": "diverged",
        "lr": 0.1,
        "seed": 1,
        "status": "diverged",
        "message": "the loss is inf",
    }
    assert results[1].run()["score"] == 2.1
    with pytest.raises(UserError, match=r"finished-0.1-1 holds a training with other settings: size was 1, is 2; give"):
        grid(tmp_path, FINISHED, size=2, jobs=jobs).train()
    (tmp_path / "finished-0.1-1" / "record.json").unlink()
    grid(tmp_path, FINISHED, jobs=jobs).train()
    assert calls(tmp_path)["finished-0.1-1"] == 2


def test_a_process_that_fails_is_shown_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainings, "_START", "fork")
    row = Row({"fate": "failed"}, [0.1], [1])
    for count in (1, 2):
        with capfd.disabled():  # what the process says goes to its log
            (result,) = grid(tmp_path, row, jobs=1).train()
        assert result.outcome.status == "failed"
        assert "error: the disk is full (all of it: " in result.outcome.message
        assert calls(tmp_path) == {"failed-0.1-1": count}


@pytest.mark.parametrize(("fate", "message"), [("failed", "the disk is full"), ("interrupted", "was stopped; start")])
def test_in_place_an_error_ends_the_benchmark_and_it_goes_on(tmp_path: Path, fate: str, message: str) -> None:
    rows = [FINISHED, Row({"fate": fate}, [0.1], [1])]
    for count in (1, 2):
        with pytest.raises(UserError, match=message):
            grid(tmp_path, *rows).train()
        assert calls(tmp_path) == {**dict.fromkeys([f"finished-{lr}-{s}" for lr in (0.1, 0.2) for s in (1, 2)], 1)} | {
            f"{fate}-0.1-1": count
        }


def test_more_seeds_train_the_best_rate_alone(tmp_path: Path) -> None:
    row = Row({"fate": "finished"}, [0.1, 0.3, 0.2], [1], more_seeds=[7, 8])
    results = grid(tmp_path, row, DIVERGED._replace(more_seeds=[5])).train()
    assert [(r.keys["lr"], r.keys["seed"]) for r in results[-2:]] == [(0.3, 7), (0.3, 8)]
    assert len(results) == 3 + 1 + 2
    (best, _) = groups([r.run() for r in results], "fate", score=lambda run: -run["score"])
    assert (best.rate, best.scores) == (0.1, [-1.1, -1.2, -1.3])  # seeds of one rate alone do not choose


def test_one_folder_is_trained_once_and_never_for_two(tmp_path: Path) -> None:
    same = [Row({"fate": "finished"}, [0.1], [1])] * 2
    assert len(grid(tmp_path, *same).train()) == 2
    assert calls(tmp_path) == {"finished-0.1-1": 1}
    one, two = Toy(run_dir=str(tmp_path / "x")), Toy(lr=0.2, run_dir=str(tmp_path / "x"))
    with pytest.raises(UserError, match="two different trainings would be written to"):
        Trainer(train_toy).train_each([one, two])


def test_records_of_sessions_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    results = grid(tmp_path, FINISHED, DIVERGED).train()
    check_same([r.outcome for r in results], "text", lambda record: record["text"])
    with pytest.raises(UserError, match=r"0.1-2 was trained on another text than .*0.1-1: 2.1, not 1.1; delete one"):
        check_same([r.outcome for r in results], "text", lambda record: record["score"])


# ------------------------------------------------------------------------------------------------------------ the best


def group(scores: Mapping[float, Sequence[float | None]]) -> Group:
    runs = [
        {"lr": lr, "seed": seed, "score": score, "status": "finished" if score is not None else "diverged"}
        for lr, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    ]
    return Group(["row"], runs, lambda run: run["score"])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1e-3: [3.0], 2e-3: [4.0], 4e-3: [2.0]}, 2e-3),
        ({4e-3: [4.0], 1e-3: [7.0], 2e-3: [2.0]}, 1e-3),
        ({1e-3: [3.0, 3.4], 2e-3: [4.0, 2.6]}, 2e-3),  # of means
        ({1e-3: [3.0], 2e-3: [3.0]}, 1e-3),  # the lower of equals
        ({1e-3: [3.0, 3.0], 2e-3: [9.0, None]}, 1e-3),  # every seed must finish
        ({1e-3: [3.0], 2e-3: [math.nan]}, 1e-3),
        ({1e-3: [None], 2e-3: [None]}, None),
    ],
)
def test_the_best_rate(scores: Mapping[float, Sequence[float | None]], best: float | None) -> None:
    found = group(scores)
    assert found.rate == best
    assert found.rates == sorted(scores)
    assert found.status == ("diverged" if best is None else "finished")
    assert [run["lr"] for run in found.best] == ([] if best is None else [best] * len(scores[best]))


def test_runs_that_did_not_finish_are_noted() -> None:
    finished, failed = {"row": 1, "status": "finished"}, {"row": 2, "status": "failed", "message": "why"}
    assert failures([finished, {"row": 3}]) == []
    (note,) = failures([finished, failed])
    assert note.endswith(":\n\n- row 2: failed, why")


# ----------------------------------------------------------------------------------------------------------- the report


def record(name: str, *path: str | int) -> Any:
    found = json.loads((RECORDS / f"{name}.json").read_text())
    for key in path:
        found = found[key]
    return found


COMMITTED: dict[str, tuple[Callable[[Mapping[str, Any]], Report], Any, int, str]] = {
    "quality": (quality.report, record("quality"), 13, "| ldadam | 105.5 | -4.4 % |"),
    "ranks": (quality.report, record("ranks"), 4, "| **adamw** | **70.13** | **+0.0 %** |"),
    "spectral_quality": (quality.report, record("spectral_quality"), 6, "| **adamw** | **61.47** | **+0.0 %** |"),
    "finetuning": (quality.report, record("finetuning", "reduction_50"), 5, "| welore | 68.02 | -0.0 % |"),
    "compression": (compression.report, record("compression"), 12, "| uniform | 70.84 |"),
    "hyperbolic": (graphs.report, record("hyperbolic"), 5 + 3 + 2 + 5 + 2, "| full | 95.77 |"),
    "multi30k": (translation.report, record("multi30k"), 8, "| lorentz | sst | "),
    "digits": (digits.report, record("digits"), 4, "| full | "),
    "tree": (tree.report, record("tree"), 6, "| geoopt, float64 | "),
    "optimizer_step_cpu": (optimizer_step.report, record("optimizer_step_cpu"), 12, "| adamw | 0.97 | 0.15 |"),
    "step_cost": (cost.report, record("step_cost"), 16, "| adamw | "),
    "training_step_cpu": (training_step.report, record("training_step_cpu", "measurements", 0), 2, "| adamw | 7.716 |"),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_record_gives_its_report_again(name: str, tmp_path: Path) -> None:
    make, figures, rows, line = COMMITTED[name]
    table = publish(tmp_path, "again", figures, make(figures))
    lines = [text for text in table.splitlines() if text.startswith("|")]
    assert len(lines) - 2 == rows
    assert any(text.startswith(line) for text in lines), table
    assert len({text.count(" | ") for text in lines}) == 1 or name == "hyperbolic"
    page = (tmp_path / "again.md").read_text()
    assert table in page
    assert "Command: `" in page
    assert json.loads((tmp_path / "again.json").read_text()) == figures
    has_plot = name not in ("optimizer_step_cpu", "training_step_cpu")
    assert (tmp_path / "again.png").exists() == has_plot == ("![plot](again.png)" in page)


def test_every_training_benchmark_has_a_record_that_is_checked_here() -> None:
    reports = {make.__module__ for make, *_ in COMMITTED.values()}
    assert len(reports) == len(COMMANDS) - 1, "all but communication, which writes no file"


def test_infinite_figures_and_rows_without_a_line_are_written(tmp_path: Path) -> None:
    panel = Panel("t", "x", "y", {"a": ([1.0, 2.0], [3.0, 4.0])}, {"b": [1.0]}, log_x=True, log_y=True, top=5.0)
    publish(tmp_path, "n", {"a": [math.inf, {"b": math.nan}]}, Report("T", "| t |", ["note"], [panel]))
    assert json.loads((tmp_path / "n.json").read_text()) == {"a": [None, {"b": None}]}
    assert (tmp_path / "n.md").read_text() == "# T\n\n| t |\n\nnote\n\n![plot](n.png)\n"
    with pytest.raises(UserError, match=r"cannot write to .*nowhere"):
        publish(tmp_path / "nowhere", "n", {}, Report("T", ""))


# ----------------------------------------------------------------------------------- benchmarks of a command line alone

LINES = {
    "digits": (digits.measure, digits, "train_digits", ["--epochs", "1"], ["--epochs", "2"], "epochs was 1, is 2"),
    "tree": (tree.measure, tree, "embed_tree", ["--depth", "2", "--steps", "2"], ["--depth", "1"], "depth was 2, is 1"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_sweep_goes_on_where_it_was_stopped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, module, function, words, others, message = LINES[name]
    words = [*words, "--lr", "0.1", "--seeds", "0", "--out", str(tmp_path)]
    train, trained = getattr(module, function), []

    def stopped_in_the_third(*given: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(given)
        return train(*given)

    monkeypatch.setattr(module, function, stopped_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        measure(words)
    monkeypatch.setattr(module, function, lambda *given: trained.append(given) or train(*given))
    table = measure(words)
    assert len(trained) == len(module.METHODS)
    assert measure(words) == table
    assert len(trained) == len(module.METHODS)
    with pytest.raises(UserError, match=message):
        measure([*words, *others])
