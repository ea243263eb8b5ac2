"""The quality benchmark: same tokens and as many rates for all, nothing trained twice, nothing lost by a kill."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from lowrank_train import optim
from lowrank_train.bench import quality_report, trainings
from lowrank_train.bench.grid import Result
from lowrank_train.bench.quality import help_text, load, measure, plan
from lowrank_train.bench.quality_report import quality_figures, with_baseline
from lowrank_train.bench.report import rate
from lowrank_train.bench.trainings import Outcome
from lowrank_train.common.errors import UserError
from lowrank_train.plan import Plan
from lowrank_train.train.metrics import read_metrics
from lowrank_train.train.run_folder import RunFolder
from tests.runs import ROOT, arguments, losses

RECIPE = str(ROOT / "configs" / "benchmark" / "quality.yaml")
LAUNCHER = str(ROOT / "launch" / "benchmark.py")


def words(text: Path, output: Path, *more: str) -> list[str]:
    """Two optimizers with two rates each, three steps of a tiny model."""
    base = [w for w in arguments(text, output) if not w.startswith(("optimizer.", "run_dir="))]
    return [
        *(f"base.{word}" for word in base),
        "base.steps=3",
        "base.max_bad_steps=1",
        "optimizers.adamw={name: adamw, lr: [1e-3, 2e-3]}",
        "optimizers.dct={name: dct_adamw, lr: [2e-3, 1e-3], rank: 8}",
        "other_lr=3e-3",
        "jobs=2",
        f"output={output}",
        *more,
    ]


def measured(text: Path, output: Path, *more: str) -> tuple[str, dict[str, Any]]:
    """The table and quality.json."""
    table = measure(load(words(text, output, *more)))
    return table, json.loads((output / "quality.json").read_text())


def error(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(load(arguments))
    return str(caught.value)


def row_of(table: str, label: str) -> list[str]:
    """The cells of a row, as numbers would be read."""
    line = next(
        line for line in table.splitlines() if line.strip("| *").startswith(f"{label} ") or f"**{label}**" in line
    )
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def benchmark(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A benchmark of three rows, one of which explodes at every rate."""
    output = tmp_path_factory.mktemp("benchmark") / "quality"
    return output, *measured(text, output, "optimizers.wild={name: adamw, lr: [1e30, 1e31]}")


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_is_sorted_by_perplexity_with_the_baseline_bold(
    benchmark: tuple[Path, str, dict[str, Any]],
) -> None:
    output, table, figures = benchmark
    rows = figures["rows"]
    assert [row["label"] for row in rows[:2]] == sorted(("adamw", "dct"), key=lambda k: _best(figures, k)["perplexity"])
    assert rows[2]["label"] == "wild"
    adamw, dct = _best(figures, "adamw"), _best(figures, "dct")
    assert row_of(table, "adamw")[0] == "**adamw**"
    assert row_of(table, "adamw")[1] == f"**{adamw['perplexity']:.4g}**"
    assert row_of(table, "dct")[1] == f"{dct['perplexity']:.4g}"
    assert row_of(table, "dct")[2] == f"{100 * (dct['perplexity'] / adamw['perplexity'] - 1):+.1f} %"
    assert row_of(table, "dct")[3] == f"{rate(dct['lr'])}*"  # of two rates each is an edge
    assert row_of(table, "dct")[4] == "1e-3, 2e-3"
    assert table in (output / "quality.md").read_text()
    assert (output / "quality.png").read_bytes()[:4] == b"\x89PNG"


def _best(figures: dict[str, Any], label: str) -> dict[str, Any]:
    mine = [run for run in figures["runs"] if run["label"] == label and run["status"] == "finished"]
    best: dict[str, Any] = min(mine, key=lambda run: run["perplexity"])
    return best


def test_the_state_is_that_of_the_runs_and_of_the_matrices(
    benchmark: tuple[Path, str, dict[str, Any]], text: Path
) -> None:
    output, table, figures = benchmark
    model = Plan.of(plan(load(words(text, output))).trials()[0].config).model
    matrices = [group for group in optim.param_groups(model) if group["role"] == "matrix"]
    for row in figures["rows"][:2]:
        label, name = row["label"], row["optimizer"]["name"]
        assert {run["optimizer_state_bytes"] for run in figures["runs"] if run["label"] == label} == {
            row["state_bytes"]
        }
        rank = {"rank": 8} if name == "dct_adamw" else {}
        assert row["matrix_state_bytes"] == optim.predicted_state_bytes(name, matrices, **rank)
        per_parameter = row["matrix_state_bytes"] / sum(p.numel() for group in matrices for _, p in group["params"])
        assert row_of(table, label)[7].strip("*") == f"{per_parameter:.2f}"
    assert row_of(table, "adamw")[7] == "**8.00**"


def test_a_row_that_diverges_says_so_and_ends_nothing(benchmark: tuple[Path, str, dict[str, Any]]) -> None:
    output, table, figures = benchmark
    assert row_of(table, "wild")[:5] == ["wild", "diverged", "", "", "1e30 (none), 1e31 (none)"]
    assert "not finite" in (output / "quality.md").read_text()
    assert [run["status"] for run in figures["runs"] if run["label"] == "wild"] == ["diverged"] * 2


def test_figures_are_stated_with_where_they_come_from(benchmark: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, figures = benchmark
    assert figures["steps"] == 3
    assert figures["seeds"] == [0]
    assert figures["other_lr"] == 3e-3
    assert figures["provenance"]["threads"] == 1
    assert {"torch", "transformers"} <= set(figures["provenance"]["versions"])
    assert len(figures["data"]["sha1"]) == 40
    assert figures["config"]["steps"] == 3
    for run in figures["runs"]:
        if run["status"] == "finished":
            assert 0 < run["optimizer_seconds"] < run["seconds"]


# ----------------------------------------------------------------------------------------------------------- trainings


def test_all_start_alike_and_read_the_same_tokens_which_are_made_once(
    benchmark: tuple[Path, str, dict[str, Any]],
) -> None:
    output, _, figures = benchmark
    finished = [Path(run["run_dir"]) for run in figures["runs"] if run["status"] == "finished"]
    assert len(finished) == 4
    assert len({losses(folder)[0] for folder in finished}) == 1  # before any update, bit for bit
    assert len({losses(folder)[2] for folder in finished}) == 4
    assert (output / "data" / "train.bin").exists()
    assert not list(output.glob("*/*/data"))


def test_models_are_deleted_and_figures_stay(benchmark: tuple[Path, str, dict[str, Any]]) -> None:
    output = benchmark[0]
    for folder in (output / "adamw").iterdir():
        names = {path.name for path in folder.iterdir()}
        assert {"record.json", "metrics.jsonl", "config.yaml", "log.txt"} <= names
        assert not {"checkpoints", "huggingface"} & names


def test_what_was_trained_is_not_trained_again(
    benchmark: tuple[Path, str, dict[str, Any]], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, table, _ = benchmark
    monkeypatch.setattr(trainings.multiprocessing, "get_context", lambda _: _NoProcesses())
    assert measured(text, output, "optimizers.wild={name: adamw, lr: [1e30, 1e31]}", "jobs=1")[0] == table


class _NoProcesses:
    def set_forkserver_preload(self, names: list[str]) -> None:
        pass

    def Process(self, **_: Any) -> None:
        pytest.fail("something was trained again")


@pytest.mark.parametrize(
    ("word", "key"), [("base.steps=4", "steps was 3, is 4"), ("optimizers.dct.rank=4", "optimizer.rank was 8, is 4")]
)
def test_a_training_with_other_settings_is_not_mixed_in(
    benchmark: tuple[Path, str, dict[str, Any]], text: Path, word: str, key: str
) -> None:
    with pytest.raises(UserError, match=key):
        measured(text, benchmark[0], word)


def test_a_training_that_fails_is_tried_again(text: Path, tmp_path: Path) -> None:
    more = ["optimizers.dct=null", "base.steps=1"]
    busy = RunFolder(tmp_path / "adamw" / "lr=2e-3-seed=0")
    table, figures = measured(text, tmp_path, *more)
    assert [run["status"] for run in figures["runs"]] == ["finished", "failed"]
    assert "another run is at work" in figures["runs"][1]["message"]
    assert "2e-3 (none)" in row_of(table, "adamw")[4]
    del busy
    assert [run["status"] for run in measured(text, tmp_path, *more)[1]["runs"]] == ["finished", "finished"]


@pytest.mark.slow
def test_a_benchmark_that_is_killed_stops_its_trainings_and_goes_on_later(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "_START", "fork")  # another server would take seconds to import everything
    more = ["base.steps=150", "optimizers.dct=null", "optimizers.adamw.lr=[1e-3]"]
    process = multiprocessing.get_context("fork").Process(target=measured, args=(text, tmp_path, *more))
    process.start()
    run_dir = tmp_path / "adamw" / "lr=1e-3-seed=0"
    while process.is_alive() and len(read_metrics(run_dir)) < 10:
        time.sleep(0.01)
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while _is_busy(run_dir):
        assert time.monotonic() < deadline, "the training goes on without the benchmark"
        time.sleep(0.05)
    record = json.loads((run_dir / "record.json").read_text())
    assert record["status"] == "interrupted"
    before = losses(run_dir)[: record["steps"]]
    measured(text, tmp_path, *more)
    assert len(losses(run_dir)) == 150
    assert losses(run_dir)[: record["steps"]] == before


def _is_busy(run_dir: Path) -> bool:
    try:
        RunFolder(run_dir)
    except UserError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------ mistakes

GOOD = ["optimizers.adamw={name: adamw, lr: [1e-3]}"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "optimizers.dct={name: dct_adamw, lr: [1e-3, 2e-3]}",
            "swept equally for all; got rates per optimizer: adamw 1",
        ),
        ("bse.steps=3", "unknown key 'bse'"),
        ("base.stpes=3", "did you mean 'base.steps'"),
        ("steps=3", "did you mean 'base.steps'"),
        ("seed=3", "did you mean"),
        ("optimizers.dct={name: dct_adam, lr: [1e-3]}", "did you mean 'dct_adamw'"),
        ("optimizers.dct={name: dct_adamw, lr: [1e-3], rnk: 3}", "optimizers.dct: in optimizer: optimizer 'dct_adamw'"),
        ("optimizers.dct={name: dct_adamw, lr: [1e-3], rank: 9999}", "optimizers.dct: in optimizer: rank=9999 exceeds"),
        ("optimizers.dct={lr: [1e-3]}", "expected the keys name"),
        ("optimizers.dct=adamw", "expected the keys name"),
        ("optimizers.dct={name: dct_adamw, lr: 1e-3}", "expected a list of numbers"),
        ("optimizers.dct={name: dct_adamw, lr: []}", "expected a list of numbers"),
        ("optimizers.dct={name: dct_adamw, lr: [fast]}", "expected a list of numbers"),
        ("optimizers.dct={name: dct_adamw, lr: [-1.0]}", "expected a list of numbers"),
        ("optimizers.adamw.lr=[1e-3,0.001]", "expected each rate once"),
        ("optimizers.adamw.other_lr=1e-3", "give other_lr at the top"),
        ("optimizers={a/b: {name: adamw, lr: [1e-3]}}", "expected letters"),
        ("optimizers.adamw=null", "there are no optimizers"),
        ("other_lr=-1", "optimizer.other_lr=-1.0; expected a number >= 0"),
        ("base.optimizer.lr=1e-4", "use optimizers.LABEL.lr"),
        ("base.seed=3", "use seeds"),
        ("base.run_dir=here", "use output"),
        ("base.seq_len=0", "seq_len=0; expected"),
        ("seeds=[]", "seeds=[]"),
        ("seeds=[1,1]", "each once"),
        ("jobs=0", "jobs=0"),
    ],
)
def test_mistakes_are_named_before_any_training(word: str, expected: str) -> None:
    assert expected in error(*GOOD, word)


def test_the_recipe_is_valid_and_sweeps_alike() -> None:
    trials = plan(load([RECIPE])).trials()
    assert {trial.keys["label"] for trial in trials} >= {"adamw", "dct_adamw"}
    assert all(trial.config.optimizer["weight_decay"] == 0 for trial in trials)
    assert all(trial.config.optimizer["other_lr"] == 3e-3 for trial in trials)
    assert trials[0].config.schedule.warmup_steps == trials[0].config.steps // 10


def test_help_lists_every_key() -> None:
    for key in ("base.steps", "optimizers", "other_lr", "seeds", "output", "jobs"):
        assert f"  {key} (" in help_text()


def test_the_command_says_what_it_knows_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(LAUNCHER)["main"]
    assert main(["qualty"]) == 2
    assert "did you mean 'quality'" in capsys.readouterr().err
    assert main(["quality", RECIPE, "base.stpes=3"]) == 2
    assert main([]) == 0
    assert "quality: Train the same model" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what a sweep comes to


def rows_of(text: Path, output: Path, losses: dict[tuple[float, int], float | None]) -> list[dict[str, Any]]:
    """The rows for validation losses by rate and seed of one optimizer."""
    more = ["optimizers.dct=null", "seeds=[0,1]", f"optimizers.adamw.lr={sorted({lr for lr, _ in losses})}"]
    figures = dict.fromkeys(quality_report.KEPT, 2.0) | {"optimizer_state_bytes": 10, "optimizer_seconds": 0.5}
    about = dict.fromkeys(("model", "parameters", "steps", "tokens", "validation_tokens", "initial_perplexity"), 1)
    about |= {"provenance": {"commit": "0"}, "optimizer": {}, "data": {}, "config": {}}
    results = []
    for trial in plan(load(words(text, output, *more))).trials():
        loss = losses[trial.keys["lr"], trial.keys["seed"]]
        record = None if loss is None else {**about, **figures, "validation_loss": loss}
        results.append(Result(trial.keys, trial.config, Outcome("finished" if record else "diverged", record)))
    rows: list[dict[str, Any]] = quality_figures(results)["rows"]
    return rows


def test_a_row_has_the_figures_of_its_best_rate(text: Path, tmp_path: Path) -> None:
    losses = {(1e-3, 0): 3.0, (1e-3, 1): 3.4, (2e-3, 0): 2.0, (2e-3, 1): None, (4e-3, 0): 4.0, (4e-3, 1): 4.0}
    (row,) = rows_of(text, tmp_path, losses)
    assert (row["best_lr"], row["best"], row["is_on_edge"], row["status"]) == (1e-3, 0, True, "finished")
    assert row["losses"] == [pytest.approx(3.2), None, 4.0]
    assert row["perplexity"] == pytest.approx(2.718281828**3.2)
    assert row["lowest_perplexity"] == pytest.approx(2.718281828**3.0)
    assert row["highest_perplexity"] == pytest.approx(2.718281828**3.4)
    assert row["optimizer_share"] == 0.25


def test_rows_are_compared_with_the_baseline_wherever_it_stands() -> None:
    def row(name: str, perplexity: float | None) -> dict[str, Any]:
        return {"label": name, "optimizer": {"name": name}, "perplexity": perplexity}

    rows = with_baseline([row("wild", None), row("adamw", 20.0), row("other", 10.0)])
    assert [r["label"] for r in rows] == ["other", "adamw", "wild"]
    assert [r["versus_baseline_percent"] for r in rows] == [-50, 0, None]
    assert with_baseline([row("other", 10.0)])[0]["versus_baseline_percent"] is None


@pytest.mark.parametrize(
    ("lr", "text"), [(2.5e-4, "2.5e-4"), (1e-3, "1e-3"), (0.02, "2e-2"), (1.0, "1e0"), (3.0, "3e0")]
)
def test_rates_are_written_shortly(lr: float, text: str) -> None:
    assert rate(lr) == text
