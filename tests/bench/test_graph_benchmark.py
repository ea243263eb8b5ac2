"""The table of graph tasks: every training once, both protocols named, goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lowrank_train.bench import graphs as graph_benchmark
from lowrank_train.bench.graphs import PUBLISHED
from lowrank_train.common.errors import UserError
from tests.distributed import run_distributed
from tests.hyperbolic.helpers import at_call, tree_arrays, tree_folder
from tests.runs import ROOT

pytestmark = pytest.mark.slow

ROWS = "rows: {full: [], sst: [optimizer.name=sst, optimizer.rank=2]}\nseeds: {clean: [1, 2], inherited: [1, 2]}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tree.npz and two recipes, one of them with a name that figures are published for."""
    folder = tree_folder(tmp_path_factory.mktemp("graphs"))
    (folder / "links.yaml").write_text("data: {graph: tree}\nmodel: {width: 4, convolutions: 1}\n")
    (folder / "nodes.yaml").write_text("data: {graph: tree, task: node_classification}\nmodel: {width: 4}\n")
    recipes = f"recipes: {{tree_lp: {folder / 'links.yaml'}, cora_nc: {folder / 'nodes.yaml'}}}\n"
    (folder / "benchmark.yaml").write_text(f"{recipes}{ROWS}folder: {folder}\noverrides: [epochs=2]\n")
    return folder


def measure(words: list[str], *, training: bool = True) -> str:
    """In a forked process; without ``training``, one that begins to train dies."""
    return str(run_distributed(_measure, 1, words, training)[0])


def _measure(words: list[str], training: bool, before: Callable[[], None] | None = None) -> str:
    if before is not None:
        before()
    os.environ.update(RANK="0", WORLD_SIZE="1")
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    if not training:
        graph_benchmark.train_graph = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    try:
        return graph_benchmark.measure(graph_benchmark.load(words))
    except UserError as error:
        return f"error: {error}"


def test_the_table_has_every_training_once(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "benchmark.yaml"), f"output={tmp_path / 'out'}"]
    table = measure(words)
    saved = json.loads((tmp_path / "out" / "hyperbolic.json").read_text())
    runs = saved["runs"]
    keys = {(run["protocol"], run["recipe"], run["row"], run["seed"]) for run in runs}
    assert len(keys) == len(runs) == 2 * 2 * 2 * 2
    assert "**clean protocol**" in table
    assert "**inherited protocol**" in table
    assert "| method | tree_lp, average precision | cora_nc, F1 (micro) |" in table
    own = [run for run in runs if (run["protocol"], run["recipe"], run["row"]) == ("clean", "tree_lp", "sst")]
    scores = sorted(100 * run["test"]["ap"] for run in own)
    cell = f"{sum(scores) / 2:.2f} ({scores[0]:.2f} to {scores[1]:.2f}), {own[0]['trainable_parameters']}"
    assert cell in table
    assert f"| sst | {PUBLISHED['cora_nc']['sst']:.2f} |" in table
    assert "run_dir" not in json.dumps(runs)  # no paths
    assert (tmp_path / "out" / "hyperbolic.md").read_text().startswith(f"# Graphs\n\n{table}\n")

    assert measure(words, training=False) == table  # taken from the folder
    message = measure([*words, "overrides=[epochs=3]"], training=False)
    assert "holds a training with other settings: epochs was 2, is 3; give another output" in message


def test_a_signal_stops_the_benchmark_and_it_goes_on(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "benchmark.yaml"), f"output={tmp_path / 'out'}"]

    def stop_in_the_second() -> None:
        at_call(3, lambda: os.kill(os.getpid(), signal.SIGTERM))()  # two epochs a training

    message = run_distributed(_measure, 1, words, True, stop_in_the_second)[0]
    assert "-full-clean-2 was stopped; start the benchmark again to go on" in message
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert "**inherited protocol**" in measure(words)


def test_a_graph_with_a_split_of_its_own_is_trained_once_for_both_protocols(folder: Path, tmp_path: Path) -> None:
    split = {"train_index": np.arange(60), "val_index": np.arange(60, 90), "test_index": np.arange(90, 121)}
    np.savez(tmp_path / "tree.npz", **tree_arrays(), **split)
    words = [str(folder / "benchmark.yaml"), f"output={tmp_path / 'out'}", f"folder={tmp_path}"]
    words += ["seeds={clean: [1], inherited: [1]}"]
    measure(words)
    folders = {path.name for path in (tmp_path / "out").glob("*-sst-*")}
    assert folders == {"tree_lp-sst-clean-1", "tree_lp-sst-inherited-1", "cora_nc-sst-clean-1"}
    runs = json.loads((tmp_path / "out" / "hyperbolic.json").read_text())["runs"]
    scores = {run["protocol"]: run["test"] for run in runs if (run["recipe"], run["row"]) == ("cora_nc", "sst")}
    assert scores["clean"] == scores["inherited"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["recipes={}", "rows={}"], "recipes is empty; expected at least one, as in configs/benchmark/hyperbolic.yaml"),
        (["seeds={dirty: [1]}"], "seeds: unknown protocol 'dirty'; expected clean or inherited"),
        (["seeds={clean: []}"], "seeds.clean is empty; expected at least one number, or leave the protocol out"),
        (["rows.full=[model.widht=3]"], "recipe 'tree_lp', row 'full': unknown key 'model.widht'"),
        (["recipes.tree_lp=nowhere.yaml"], "recipe 'tree_lp', row 'full': there is no file 'nowhere.yaml'"),
        (["seed=3"], "unknown key 'seed'"),
    ],
)
def test_what_the_user_must_mend_is_said(folder: Path, tmp_path: Path, change: list[str], message: str) -> None:
    words = [str(folder / "benchmark.yaml"), f"output={tmp_path / 'out'}", *change]
    if change[0] == "recipes={}":
        words = change
    assert message in measure(words, training=False)


def test_the_recipe_of_the_record_is_complete() -> None:
    settings = graph_benchmark.load([str(ROOT / "configs" / "benchmark" / "hyperbolic.yaml")])
    assert set(settings.recipes) == set(PUBLISHED)
    assert set(settings.rows) >= {"full", "sst", "lora", "relora", "euclidean"}
    assert set(settings.seeds) == {"clean", "inherited"}
    assert all((ROOT / path).is_file() for path in settings.recipes.values())
