"""What fits a memory budget, from formulas: tables, single settings, and errors a person can mend."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.memory import budget as budget_run
from lowrank_train.memory.budget import Fit, explain, measured_against, solve
from lowrank_train.memory.question import BudgetConfig, load_budget
from lowrank_train.memory.report import table, write_budget
from tests.runs import ROOT

ONE = ["--model", "llama_60m", "--seq-len", "256"]


def fit(*arguments: str) -> Fit:
    (found,) = solve(load_budget([*ONE, *arguments])).fits
    return found


def test_words_after_models_are_models() -> None:
    given = ["--budget", "24GiB", "--models", "llama", "opt", "--seq-len", "1024", "--world-size", "1"]
    assert load_budget(given) == BudgetConfig(models=["llama", "opt"], seq_len=1024)
    assert load_budget(["--models=llama,opt", "--optimizers", "scale", "adamw"]).optimizers == ["scale", "adamw"]


def test_the_table_holds_the_largest_model_and_batch() -> None:
    config = load_budget(["--budget", "4GiB", "--models", "llama", "--optimizers", "adamw", "scale"])
    fits = {found.optimizer: found for found in solve(config).fits}
    assert (fits["adamw"].model, fits["scale"].model) == ("llama_130m", "llama_350m")
    for found in fits.values():
        assert 0 <= found.headroom < found.budget
        more = replace(config, model=found.model, optimizer=found.optimizer, micro_batch=found.micro_batch + 1)
        assert explain(more).headroom < 0


@pytest.mark.parametrize("name", [name for name in methods.names() if methods.find(name).needs_rank])
def test_a_rank_that_nobody_chose_is_said(name: str) -> None:
    asked = ["--budget", "1GiB", "--model", "llama_9m", "--seq-len", "64", "--optimizer", name]
    said = f"rank 128 was assumed for {name}, which need one: choose it with --rank"
    assert said in table(solve(load_budget(asked)))
    assert "was assumed" not in table(solve(load_budget([*asked, "--rank", "128"])))


def test_three_methods_need_a_rank() -> None:
    assert [name for name in methods.names() if methods.find(name).needs_rank] == ["lora", "relora", "sst"]


def test_one_setting_is_explained_whether_it_fits_or_not() -> None:
    found = fit("--optimizer", "dct_adamw", "--rank", "64", "--micro-batch", "2", "--budget", "1MiB")
    assert (found.optimizer, found.rank, found.micro_batch) == ("dct_adamw", 64, 2)
    assert found.headroom < 0
    assert "does not fit" in table(solve(load_budget([*ONE, "--budget", "1MiB"])))


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    budget = ["--optimizer", "scale", "--budget", "2GiB"]
    batch = fit(*budget, "--largest", "batch").micro_batch
    assert (
        fit(*budget, "--micro-batch", str(batch)).headroom >= 0 > fit(*budget, "--micro-batch", str(batch + 1)).headroom
    )


def test_the_largest_rank_fits_and_one_more_does_not() -> None:
    budget = ["--optimizer", "galore_adamw", "--budget", "1000MiB"]
    rank = fit(*budget, "--largest", "rank").rank
    assert rank is not None
    assert 1 < rank < 512
    assert fit(*budget, "--rank", str(rank)).headroom >= 0 > fit(*budget, "--rank", str(rank + 1)).headroom


def test_the_largest_model_of_a_family() -> None:
    (found,) = solve(load_budget(["--model", "opt_125m", "--largest", "model", "--budget", "12GiB"])).fits
    assert found.model == "opt_350m"


def test_techniques_make_more_fit() -> None:
    plain = fit("--micro-batch", "1").memory.peak
    kept = ["--weights", "int8", "--precision", "bfloat16"]
    for technique in (kept, ["--fused-backward"], ["--offload-state"], ["--state-dtype", "4bit"]):
        assert fit("--micro-batch", "1", "--accumulate", "1", *technique).memory.peak < plain, technique
    shared = ["--micro-batch", "1", "--world-size", "2"]
    assert fit(*shared, "--replicas", "2").memory.peak >= fit(*shared).memory.peak


def test_a_recipe_is_explained_whole() -> None:
    path = str(ROOT / "configs" / "budget" / "opt_1.3b_12gib.yaml")
    (found,) = solve(load_budget(["--recipe", path, "--budget", "12GiB"])).fits
    assert (found.model, found.optimizer, found.state_dtype, found.micro_batch) == ("opt_1.3b", "adamw", "8bit", 8)
    assert 0 < found.headroom < found.budget / 2
    with pytest.raises(UserError, match="says which model; leave out --model"):
        load_budget(["--recipe", path, *ONE])


def test_the_time_of_a_step_is_that_of_a_recorded_run_with_the_same_work(tmp_path: Path) -> None:
    asked = ["--micro-batch", "2", "--precision", "float32", "--records", str(tmp_path)]
    assert fit(*asked).time is None
    run = budget_run._run(load_budget([*ONE, *asked]), "adamw", None, "llama_60m", 2)
    record = {"config": asdict(run), "world_size": 1, "tokens_per_second": 512.0, "provenance": {"device": "a CPU"}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").write_text(json.dumps(record))
    (tmp_path / "record.json").write_text("not a record")
    found = solve(load_budget([*ONE, *asked]))
    assert found.fits[0].time is not None
    assert (found.fits[0].time.seconds, found.fits[0].time.device) == (2 * 2 * 256 / 512.0, "a CPU")
    assert "| 2 (a CPU) |" in table(found)
    for other in (["--optimizer", "scale"], ["--seq-len", "128"], ["--state-dtype", "8bit"]):
        assert solve(load_budget([*ONE, *asked, *other])).fits[0].time is None, other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "lama"], "unknown model 'lama'; did you mean 'llama'"),
        (["--model", "llama_8b"], "unknown model 'llama_8b'"),
        (["--budget", "24 potatoes"], "is not a size"),
        (["--optimizer", "adamv"], "unknown optimizer 'adamv'"),
        (["--seq-len", "0"], "expected a number >= 1"),
        (["--largest", "batch"], "give --model"),
        ([*ONE, "--largest", "batch", "--micro-batch", "2"], "leave one out"),
        ([*ONE, "--largest", "rank", "--rank", "2"], "leave one out"),
    ],
)
def test_what_cannot_be_asked(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_budget(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "200MiB", "--optimizers", "scale"], "nothing fits in 200MiB; scale: llama_60m alone needs"),
        ([*ONE, "--budget", "200MiB", "--largest", "batch"], "too small: llama_60m with adamw .* needs .* GiB"),
        ([*ONE, "--optimizer", "galore_adamw", "--rank", "600"], "rank=600 exceeds"),
        ([*ONE, "--optimizer", "scale", "--largest", "rank"], "has no rank"),
        ([*ONE, "--state-dtype", "2bit"], "state_dtype='2bit'; expected None or one of float32, bfloat16, 8bit, 4bit"),
    ],
)
def test_what_has_no_answer(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(load_budget(arguments))


def test_files_hold_the_same_figures(tmp_path: Path) -> None:
    outcome = solve(load_budget([*ONE, "--budget", "2GiB", "--largest", "batch"]))
    write_budget(outcome, tmp_path / "new")
    (found,) = outcome.fits
    (row,) = csv.DictReader((tmp_path / "new" / "budget.csv").open())
    (full,) = json.loads((tmp_path / "new" / "budget.json").read_text())["fits"]
    assert int(row["peak_bytes"]) == full["peak_bytes"] == found.memory.peak
    assert sum(int(row[f"{term}_bytes"]) for term in found.memory.terms) == found.memory.peak
    assert (tmp_path / "new" / "budget.png").stat().st_size > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_budget(outcome, tmp_path / "file")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "launch" / "memory_budget.py"
    spec = importlib.util.spec_from_file_location("memory_budget", path)
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    assert command.main([*ONE, "--out", str(tmp_path)]) == 0
    assert "llama_60m" in capsys.readouterr().out
    assert command.main(["--help"]) == 0
    assert "--largest batch" in capsys.readouterr().out
    assert command.main(["--budget", "1 parsec"]) == 2
    assert "error: budget" in capsys.readouterr().err


def test_a_family_with_too_few_positions_does_not_spoil_the_table() -> None:
    outcome = solve(load_budget(["--models", "llama", "opt", "--optimizers", "adamw", "--seq-len", "4096"]))
    assert [fit.model.split("_")[0] for fit in outcome.fits] == ["llama"]
    assert outcome.missing == [next(line for line in outcome.missing if "2048 learned positions of opt_125m" in line)]


def test_measured_steps_stand_beside_the_prediction(tmp_path: Path) -> None:
    words = ["--model", "llama_9m", "--optimizer", "galore_adamw", "--rank", "8", "--seq-len", "32", "--device", "cpu"]
    words += ["--precision", "float32", "--measure", "--micro-batch", "2"]
    config = load_budget(words)
    (fit,) = solve(config).fits
    rows = {row.split()[0]: row for row in measured_against(config, fit).splitlines()}
    assert rows.keys() == {"phase", "forward", "backward", "step", "peak"}
    assert abs(float(rows["peak"].split()[-2])) < 2
    with pytest.raises(UserError, match="measure=true of what"):
        load_budget(["--measure"])
