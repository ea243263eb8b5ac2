"""Spectra over the checkpoints of a run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train.common.errors import UserError
from lowrank_train.models.folders import load_model
from lowrank_train.spectra.command import load_settings, measure
from lowrank_train.spectra.history import history
from lowrank_train.spectra.spectrum import spectra
from tests.runs import arguments, train_on

SST = ["optimizer.name=sst", "optimizer.rank=8", "optimizer.resample_every=5"]


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of 2 ranks and a spectral one, each with checkpoints after 10 and 20 steps."""
    root = tmp_path_factory.mktemp("runs")
    for name, more, ranks in (("dense", [], 2), ("sst", SST, 1)):
        train_on(ranks, arguments(text, root / name, "checkpoint.every=10", *more))
    return root


@pytest.mark.parametrize("name", ["dense", "sst"])
def test_the_last_checkpoint_has_the_spectra_of_the_exported_model(runs: Path, name: str) -> None:
    snapshots = history(runs / name, None)
    assert [snapshot.step for snapshot in snapshots] == [10, 20]
    exported = spectra(load_model(runs / name / "huggingface"))
    assert snapshots[1].sigma.keys() == exported.keys()
    for key, sigma in exported.items():
        torch.testing.assert_close(snapshots[1].sigma[key], sigma, rtol=0, atol=1e-6 * float(sigma[0]))
        assert not torch.allclose(snapshots[0].sigma[key], sigma, rtol=1e-6)


def test_the_command_writes_a_row_for_every_matrix_and_checkpoint(runs: Path) -> None:
    table = measure(*load_settings([str(runs / "dense"), "checkpoints=true"]))
    assert [line.split()[0] for line in table.splitlines()[-2:]] == ["10", "20"]
    folder = runs / "dense" / "spectrum"
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 14
    assert json.loads((folder / "history.json").read_text())["rows"][0]["step"] == 10
    assert (folder / "history.png").stat().st_size > 5_000


def no_run(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def no_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def a_damaged_one(folder: Path) -> None:
    for shard in (folder / "checkpoints" / "step-10").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "layers", "message"),
    [
        (no_run, "", "is not a run folder"),
        (no_checkpoint, "", "holds no checkpoint; keep some with checkpoint.every"),
        (a_damaged_one, "", "step-10 is damaged"),
        (None, "no_such", "layers='no_such' matches no matrix"),
    ],
)
def test_bad_input(runs: Path, tmp_path: Path, spoil: Callable[[Path], None] | None, layers: str, message: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / "dense", folder)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(UserError, match=message):
        history(folder, layers or None)


def test_one_run_at_a_time(runs: Path) -> None:
    with pytest.raises(UserError, match="2 folders with checkpoints=true; expected one"):
        load_settings([str(runs / "dense"), str(runs / "sst"), "checkpoints=true"])
