"""The table of ``python -m lowrank_train.optim``, and the benchmarks that compare optimizers without training."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train import optim
from lowrank_train.bench.steps import optimizer_step as step_benchmark
from lowrank_train.bench.steps.optimizer_step import communication
from lowrank_train.common.errors import UserError
from lowrank_train.optim.__main__ import main
from lowrank_train.optim.costs.table import aligned, compare, size_text, timing_sizes

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--rows", "32", "--columns", "48", "--rank", "4"]


def rows_of(text: str) -> dict[str, list[str]]:
    """First word of every line -> its words."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


# ---------------------------------------------------------------------------------------- python -m lowrank_train.optim


def test_every_optimizer_is_in_the_table_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--no-timing"]) == 0
    out = capsys.readouterr().out
    table, described = out.split("\n\n")[1:3]
    for name in optim.names(of_matrices=True):
        (line,) = [line for line in table.splitlines() if line.split()[0] == name]
        assert line.endswith(optim.find(name).published.paper)
    assert [line.split()[0] for line in described.splitlines()] == optim.names(of_matrices=True)
    assert "8.003" in rows_of(table)["adamw"], "two float32 moments and a step count of 4 bytes over 32 x 48"


def test_figures_of_one_matrix() -> None:
    rows = {row.name: row for row in compare(64, 32, 8, world_size=4)}
    assert rows["adamw"].state_bytes == 2 * 64 * 32 * 4 + 4
    assert rows["dct_adamw"].refresh_sent_bytes == 32 * 4 * 2 * 3 / 4
    assert rows["dct_adamw"].mean_sent_bytes == rows["dct_adamw"].refresh_sent_bytes / 100
    assert rows["dct_adamw"].interval == 100
    assert rows["apollo_mini"].state_bytes < 3 * 64 * 4, "rank 1, whatever is asked of the others"
    assert all(row.time is None for row in rows.values())


def test_step_times_are_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "on 32 x 48 at rank 4 (CPU" in out
    table = out.split("\n\n")[1]
    assert all(any(word.endswith("x") for word in line.split()) for line in table.splitlines()[1:])


def test_a_cpu_is_timed_on_a_smaller_matrix() -> None:
    cpu = torch.device("cpu")
    assert timing_sizes(4096, 4096, 1024, cpu) == (1024, 1024, 256)
    assert timing_sizes(11008, 4096, 512, cpu) == (1376, 512, 64)
    assert timing_sizes(1024, 1024, None, cpu) == (1024, 1024, None)
    assert timing_sizes(4096, 4096, 1024, torch.device("cuda")) == (4096, 4096, 1024)
    assert timing_sizes(2**30, 1, 1, cpu) == (2**30, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rows", "32", "--columns", "48", "--rank", "33"],
            "--rank 33 does not fit a 32 x 48 matrix; expected 1 to 32",
        ),
        (["--rank", "0"], "--rank 0 does not fit a 4096 x 4096 matrix; expected 1 to 4096"),
        (["--rows", "0"], "--rows 0; expected a whole number >= 1"),
        (["--world-size", "0"], "--world-size 0; expected a whole number >= 1"),
        (["--device", "abacus"], "Expected one of cpu, cuda"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_text_is_aligned() -> None:
    assert (
        aligned([["name", "n"], ["a", "100"], ["long name", "7"]]) == "name         n\na          100\nlong name    7"
    )
    sizes = [0, 7, 999, 0.5, 3584, 6_422_528, 26.3e9, 26.3e12, 999_900]
    words = ["0 B", "7 B", "999 B", "0.5 B", "3.58 kB", "6.42 MB", "26.3 GB", "2.63e+04 GB", "1 MB"]
    assert [size_text(size) for size in sizes] == words


# ----------------------------------------------------------------------------------------------------------- the launch


@pytest.fixture(scope="module")
def launch() -> Callable[[list[str]], int]:
    """``python launch/benchmark.py`` without the seconds that a new process takes to import everything."""
    script: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "launch" / "benchmark.py"))["main"]
    return script


def test_list_is_the_same_table(launch: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["--list", *TINY, "--no-timing"]) == 0
    listed = capsys.readouterr().out
    assert main([*TINY, "--no-timing"]) == 0
    assert listed == capsys.readouterr().out


def test_commands_and_their_errors(launch: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([]) == 0
    commands = capsys.readouterr().out
    assert {"quality", "optimizer-step", "communication"} <= {word.rstrip(":") for word in commands.split()}
    assert launch(["optimizer-step", "--shapes", "12by12"]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: --shapes 12by12; expected matrices like 2048x2048,5504x2048 or one of llama")


def test_step_benchmark_writes_a_table_and_a_record(tmp_path: Path) -> None:
    names = ["adamw", "dct_adamw", "ldadam", "apollo_mini"]
    arguments = ["--shapes", "24x16,16x24,24x16", "--rank", "4", "--rounds", "2", "--interval", "40", "--device", "cpu"]
    table = step_benchmark.measure([*arguments, "--optimizers", *names, "--out", str(tmp_path / "new" / "folder")])
    record = json.loads((tmp_path / "new" / "folder" / "step.json").read_text())
    report = (tmp_path / "new" / "folder" / "step.md").read_text()
    assert table in report
    assert "2 of 24 x 16, 1 of 16 x 24; float32, rank 4" in report
    assert {"command", "commit", "versions", "device", "threads"} <= record["provenance"].keys()
    rows = {row["name"]: row for row in record["rows"]}
    assert sorted(rows) == sorted(names)
    assert rows["adamw"]["state_bytes_per_parameter"] == pytest.approx((3 * 384 * 8 + 12) / (3 * 384))
    assert rows["dct_adamw"]["interval"] == 40
    refresh = 3 * 16 * 4 * 1.75
    sent = {"mean": pytest.approx(refresh / 40), "ordinary_step": 0, "refresh_step": refresh}
    assert rows["dct_adamw"]["sent_bytes"] == sent
    assert rows["ldadam"]["interval"] is None
    for row in record["rows"]:
        assert {"fused", "foreach"} == row["amortised_ratio"].keys() == row["ordinary_ratio"].keys()
    order = [row["amortised_ratio"]["fused"] for row in record["rows"]]
    assert order == sorted(order)
    lines = table.splitlines()
    assert len(lines) == 2 + len(names)
    assert len({line.count("|") for line in lines}) == 1


def test_models_are_measured_by_their_matrices() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    layer = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    assert step_benchmark._shapes("llama_1b", None, cpu) == layer, "one layer, on a CPU"
    assert step_benchmark._shapes("llama_1b", None, cuda) == layer * 24
    assert step_benchmark._shapes("llama_1b", 2, cuda) == layer * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "llama_2b"], "--shapes llama_2b; expected matrices like"),
        (["--shapes", "0x4"], "--shapes 0x4; expected matrices like"),
        (["--shapes", "8x8", "--layers", "2"], "--layers goes with a model"),
        (["--shapes", "llama_60m", "--layers", "9"], "--layers 9; llama_60m has 8"),
        (["--shapes", "8x8", "--rank", "9"], "rank=9 exceeds"),
        (["--shapes", "8x8", "--rounds", "0"], "--rounds 0; expected a whole number >= 1"),
        (["--shapes", "8x8", "--interval", "0"], "--interval 0; expected a whole number >= 1"),
        (["--shapes", "8x8", "--world-size", "0", "--rounds", "1"], "--world-size 0; expected a whole number >= 1"),
        (["--shapes", "8x8", "--optimizers", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'"),
        (["--shapes", "8x8", "--device", "abacus"], "--device abacus; expected cpu or cuda"),
        (["--shapes", "8x8", "--device", "meta"], "--device meta is not available here"),
        (["--shapes", "3000000x100000", "--rank", "4"], "parameters with the state of"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_measured(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        step_benchmark.measure(["--device", "cpu", *arguments, "--out", str(tmp_path / "out")])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_communication_of_llama_7b() -> None:
    text = communication([])
    assert text.startswith("llama_7b (224 matrices, 6,738,415,616 parameters) in float32 on 8 ranks, rank 512")
    rows = rows_of(text)
    assert set(optim.names(of_matrices=True)) <= rows.keys()
    assert rows["dct_adamw"][1:] == ["3.67", "MB", "6.42", "MB", "0", "B", "100", "64.2", "kB"]
    assert "35.4 GB" in text
    assert "By formula" in text


def test_communication_reports_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="unknown model 'llama_8b'; did you mean"):
        communication(["--model", "llama_8b"])
    with pytest.raises(UserError, match="rank=600 exceeds"):
        communication(["--model", "llama_60m", "--rank", "600"])
    with pytest.raises(UserError, match="--world-size 0"):
        communication(["--world-size", "0"])
