"""Sizes typed at a command: a unit is asked for, what does not fit is not taken for success."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT

BUDGET = runpy.run_path(str(ROOT / "launch" / "memory_budget.py"))["main"]
COMPRESS = runpy.run_path(str(ROOT / "launch" / "compress.py"))["main"]
SMALL = ["--model", "llama_60m", "--seq-len", "256"]
RECIPE = ["--recipe", str(ROOT / "configs" / "budget" / "opt_1.3b_12gib.yaml")]


def ask(capsys: pytest.CaptureFixture[str], main: Any, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


@pytest.mark.parametrize("size", ["24", "0", "0GiB", "-1", "-24GiB", "nan", "inf", "24 potatoes"])
def test_a_size_without_a_unit_or_of_nothing_is_refused_by_every_command(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], SMALL, RECIPE, [*SMALL, "--largest", "batch"]):
        code, out, err = ask(capsys, BUDGET, *words, f"--budget={size}", "--out", str(tmp_path / "budget"))
        assert (code, out) == (2, "")
        assert err.startswith("error: budget: ")
        assert "GiB (2^30 bytes" in err
        assert err.count("\n") == 1
    code, _, err = ask(capsys, COMPRESS, str(tmp_path), f"size={size}", f"out={tmp_path / 'small'}")
    assert code == 2
    assert err.startswith("error: ")
    assert "size" in err
    assert "GiB (2^30 bytes" in err


def test_units_are_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"24G": "24.00 GiB", "24GiB": "24.00 GiB", "24 GB": "22.35 GiB", "24000000000B": "22.35 GiB"}
    for size, in_words in shown.items():
        code, out, _ = ask(capsys, BUDGET, *SMALL, "--budget", size, "--out", str(tmp_path))
        assert code == 0
        assert f"against {in_words} per rank" in out


def test_a_setting_that_does_not_fit_ends_with_2_and_says_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, budget in ((SMALL, "100MiB"), (RECIPE, "3GiB")):
        code, out, err = ask(capsys, BUDGET, *words, "--budget", budget, "--out", str(tmp_path))
        assert code == 2
        assert "does not fit" in out  # the table is shown all the same, and written
        assert (tmp_path / "budget.csv").exists()
        assert err.startswith("error: ")
        for expected in ("does not fit: it needs", "weights", "more than the budget of", "--largest"):
            assert expected in err
        assert err.count("\n") == 1
        assert ask(capsys, BUDGET, *words, "--budget", "40GiB", "--out", str(tmp_path))[0] == 0
    table = ["--models", "llama", "--optimizers", "scale", "--budget", "100MiB", "--out", str(tmp_path)]
    code, _, err = ask(capsys, BUDGET, *table)
    assert code == 2
    assert "nothing fits in 100MiB" in err
