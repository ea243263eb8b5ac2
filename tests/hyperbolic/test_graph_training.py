"""Graph runs from end to end: they learn, stop, go on bit for bit, and leave a plain network."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic import run as network_run
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.data import load_graph
from lowrank_train.hyperbolic.graphs.network import NodeFeatures
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.run import build_graph_run, load_network
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.train.metrics import read_metrics
from tests.distributed import DistributedFailure
from tests.hyperbolic.helpers import at_call, failure, train, tree_folder, words
from tests.runs import ROOT, Launched, assert_equal_tensors, checkpoint_tensors, checkpoints, send
from tests.tiers import only_first_quick

NODES = ["data.task=node_classification", "data.test_share=0.3"]
METHODS = {
    "adamw": [],
    "sst": ["optimizer.name=sst", "optimizer.rank=2", "optimizer.resample_every=7", "optimizer.warmup_steps=2"],
    "lora": ["optimizer.name=lora", "optimizer.rank=2"],
    "relora": ["optimizer.name=relora", "optimizer.rank=2", "optimizer.restart_every=7", "optimizer.warmup_steps=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tree.npz."""
    return tree_folder(tmp_path_factory.mktemp("graphs"))


def history(run_dir: Path) -> list[dict[str, object]]:
    """Rows of metrics.jsonl without what depends on the clock and the machine."""
    clock = ("throughput/", "memory/", "optimizer/resvd_time_share")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in read_metrics(run_dir)]


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("geometry", only_first_quick(["lorentz", "euclidean"]))
def test_classes_are_learned(folder: Path, tmp_path: Path, geometry: str) -> None:
    """A node's class is that of all but one of its neighbours; chance is a third."""
    record = train(words(folder, tmp_path / "run", *NODES, "epochs=60", f"model.geometry={geometry}"))
    assert record.status == "finished"
    assert record.test["f1"] > 0.9
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.1 * losses[0]
    assert record.manifold_error < (1e-4 if geometry == "lorentz" else 1e-30)


@pytest.mark.parametrize("protocol", only_first_quick(["clean", "inherited"]))
def test_links_are_learned(folder: Path, tmp_path: Path, protocol: str) -> None:
    record = train(
        words(folder, tmp_path / "run", "epochs=60", "data.test_share=0.3", "margin=0.5", f"data.protocol={protocol}")
    )
    assert record.protocol == protocol
    assert record.test["roc_auc"] > 0.66  # random scores: 0.5, standard deviation 0.07
    assert record.data["test_pairs_possible_in_training"] == (
        0 if protocol == "clean" else 2 * record.data["test_edges"]
    )


@pytest.mark.parametrize("method", only_first_quick(METHODS, 2))
def test_every_method_trains_and_leaves_a_plain_network(folder: Path, tmp_path: Path, method: str) -> None:
    run_dir = tmp_path / "run"
    record = train(words(folder, run_dir, *NODES, "precision=float64", *METHODS[method]))
    assert record.status == "finished"
    assert record.test["f1"] > 0.5
    network, graph = load_network(run_dir), load_graph(str(folder), "tree")
    with torch.no_grad():
        features = NodeFeatures(network.geometry.enter(graph.features))
        points = network(features, _adjacency(graph))
    saved = np.load(run_dir / "points.npz")
    torch.testing.assert_close(points, torch.from_numpy(saved["points"]), rtol=1e-9, atol=1e-9)
    lorentz.check_points(points)
    plain = sum(p.numel() for p in network.parameters())
    assert record.parameters == plain
    in_maps, rank = {"maps": 6 * 10 + 6 * 6, "sides": (6 + 10) + (6 + 6), "sigma": 6 + 6}, 2
    others = plain - in_maps["maps"]
    expected = {
        "adamw": plain,
        "sst": others + rank * in_maps["sides"] + in_maps["sigma"],
        "lora": others + rank * in_maps["sides"],
        "relora": others + rank * in_maps["sides"],
    }
    assert record.trainable_parameters == expected[method]


def _adjacency(graph):  # type: ignore[no-untyped-def]
    from lowrank_train.hyperbolic.adjacency import Adjacency

    return Adjacency(graph.edges, graph.nodes, torch.float64)


def test_the_whole_gradient_is_clipped(folder: Path, tmp_path: Path) -> None:
    """What reaches the optimizer is as long as ``clip`` altogether, and longer if each gradient were clipped alone."""

    def watch() -> None:
        step = optim.AdamW.step

        def checked(self: optim.AdamW) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            assert len(gradients) > 3
            torch.testing.assert_close(float(norm), 0.01, rtol=1e-3, atol=0)
            step(self)

        optim.AdamW.step = checked  # type: ignore[method-assign, assignment]

    train(words(folder, tmp_path / "run", *NODES, "epochs=3", "clip=0.01"), watch)
    norms = [row["train/grad_norm"] for row in read_metrics(tmp_path / "run")]
    assert min(norms) > 0.1  # before clipping


def test_centres_of_classes_stay_on_the_manifold(folder: Path, tmp_path: Path) -> None:
    for method in ("adamw", "sst"):
        train(words(folder, tmp_path / method, *NODES, "model.curvature=0.5", *METHODS[method]))
        network = load_network(tmp_path / method)
        assert network.decoder is not None
        centres = network.decoder.centres
        lorentz.check_points(centres, 0.5, tolerance=1e-6)
        origin = lorentz.on_manifold(torch.zeros(6 - 1), 0.5)
        moved = (lorentz.distance(centres, origin, 0.5) - 1).abs()  # where they began
        assert moved.min() > 1e-3


def test_test_scores_are_those_of_the_best_epoch(folder: Path, tmp_path: Path) -> None:
    record = train(words(folder, tmp_path / "run"))
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    selection = {step: (row["eval/roc_auc"] + row["eval/ap"]) / 2 for step, row in rows.items()}
    assert record.best_epoch == max(selection, key=lambda step: (selection[step], -step))
    assert record.validation == {name: rows[record.best_epoch][f"eval/{name}"] for name in ("roc_auc", "ap")}


def test_training_ends_when_patience_does(folder: Path, tmp_path: Path) -> None:
    record = train(words(folder, tmp_path / "run", *NODES, "epochs=300", "patience=5", "min_epochs=20"))
    assert 20 < record.epochs < 300
    assert record.epochs == max(record.best_epoch + 5, 21)
    assert record.status == "finished"


def test_the_report_tells_what_was_done(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    record = train(words(folder, run_dir, *METHODS["sst"], "model.convolutions=1"), plot=True)
    text = (run_dir / "report.md").read_text()
    for expected in (
        "**clean protocol**",
        "name sst",
        f"| test ROC AUC | {100 * record.test['roc_auc']:.2f} % |",
        f"| test average precision | {100 * record.test['ap']:.2f} % |",
        f"{record.trainable_parameters:,} (",
        f"{record.manifold_error:.1e}",
        "root 0",
    ):
        assert expected in text
    assert all((run_dir / name).stat().st_size > 5000 for name in ("curves.png", "points.png", "depth.png"))
    saved = json.loads((run_dir / "record.json").read_text())
    assert GraphRecord(**saved) == record
    points = np.load(run_dir / "points.npz")
    assert points["depth"].max() == 4
    assert -1 <= record.depth_correlation <= 1  # type: ignore[operator]
    assert set(read_metrics(run_dir)[-1]) >= {"train/loss", "eval/ap", "points/manifold_error", "optimizer/iteration"}
    assert list((run_dir / "tensorboard").iterdir())


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("method", only_first_quick(METHODS))
def test_a_resumed_run_is_bit_identical(folder: Path, tmp_path: Path, method: str) -> None:
    """With dropout and random negatives: stopped by a signal at epoch 13, killed at 26, then to the end."""
    more = ["model.dropout=0.2", *METHODS[method]]
    whole = train(words(folder, tmp_path / "whole", *more))
    cut = words(folder, tmp_path / "cut", *more)
    stopped = train(cut, at_call(13, send(signal.SIGTERM)))
    assert (stopped.status, stopped.epochs) == ("interrupted", 13)
    with pytest.raises(DistributedFailure, match="died without an answer"):
        train(cut, at_call(13, send(signal.SIGKILL)))  # epoch 26
    assert checkpoints(tmp_path / "cut") == ["step-13", "step-20"]
    resumed = train(cut)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert (resumed.test, resumed.best_epoch) == (whole.test, whole.best_epoch)
    ends = [tmp_path / name / "checkpoints" / "step-30" for name in ("cut", "whole")]
    for section in ("model.", "optimizer.", "best."):
        assert_equal_tensors(*(checkpoint_tensors(end, section) for end in ends))


def test_points_of_classes_resume_bit_identically(folder: Path, tmp_path: Path) -> None:
    more = [*NODES, *METHODS["sst"]]
    train(words(folder, tmp_path / "whole", *more))
    train(words(folder, tmp_path / "cut", *more, "epochs=17"))
    (tmp_path / "cut" / "config.yaml").unlink()  # a run of 17 epochs is finished: go on as if it had been stopped
    record = train(
        words(folder, tmp_path / "on", *more, f"resume={tmp_path / 'cut' / 'checkpoints' / 'step-10'}"),
    )
    assert record.epochs == 30
    ends = [tmp_path / name / "checkpoints" / "step-30" for name in ("on", "whole")]
    for section in ("model.", "optimizer.", "best."):
        assert_equal_tensors(*(checkpoint_tensors(end, section) for end in ends))


def test_a_finished_run_is_not_trained_again(folder: Path, tmp_path: Path) -> None:
    first = train(words(folder, tmp_path / "run"))
    again = train(words(folder, tmp_path / "run"), at_call(1, send(signal.SIGKILL)))
    assert (again.test, again.epochs, again.seconds) == (first.test, first.epochs, first.seconds)
    message = failure(words(folder, tmp_path / "run", "margin=3"))
    assert "is finished at epoch 30; margin was 2.0, is 3.0: set run_dir" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optimizer.name=sst optimizer.rank=2", "optimizer.name = adamw; expected sst"),
        ("model.width=8", "model.width = 6; expected 8"),
        ("data.protocol=inherited", "data.protocol = clean; expected inherited"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path, change: str, key: str) -> None:
    train(words(folder, tmp_path / "run"), at_call(13, send(signal.SIGTERM)))
    assert key in failure(words(folder, tmp_path / "run", *change.split()))


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, tmp_path: Path) -> None:
    message = failure(words(folder, tmp_path / "run"), at_call(13, _spoil))
    assert message.startswith("the loss or the gradient of epoch 13 is not finite; the last good checkpoint is ")
    assert "step-10" in message
    assert "optimizer.lr" in message


def _spoil() -> None:
    lorentz_lift = lorentz.centroid

    def spoiled(total: torch.Tensor, k: float = 1.0) -> torch.Tensor:
        return lorentz_lift(total, k) * math.nan

    from lowrank_train.hyperbolic import spaces as geometry

    original = geometry.Lorentz.closeness
    geometry.Lorentz.closeness = lambda self, x, y: original(self, x, y) * math.nan  # type: ignore[method-assign]
    lorentz.centroid = spoiled


def test_a_checkpoint_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    def as_it_was() -> None:
        network_run.asdict = lambda value: (  # type: ignore[assignment]
            {**asdict(value), "epoch": 2} if isinstance(value, network_run.Progress) else asdict(value)
        )

    train(words(folder, tmp_path / "run", "epochs=2"), as_it_was)
    message = failure(words(folder, tmp_path / "run", "epochs=4"))
    assert re.search(r"step-2 was written by another version of lowrank-train \(.*'epoch'\); set run_dir to", message)


def test_two_ranks_are_refused(folder: Path, tmp_path: Path) -> None:
    message = failure(words(folder, tmp_path / "run"), world_size=2)
    assert "these networks are trained in one process, not in 2; start launch/hyperbolic.py with python" in message


def test_a_graph_in_pieces_is_refused_unless_expected(folder: Path, tmp_path: Path) -> None:
    graph = dict(np.load(folder / "tree.npz"))
    graph["edges"] = graph["edges"][3:]  # without the edges of the root
    np.savez(tmp_path / "tree.npz", **graph)
    message = failure(words(tmp_path, tmp_path / "run"))
    assert "tree is not connected: 4 pieces, of 40, 40, ... nodes; expected one." in message
    assert "data.connected=false" in message
    record = train(words(tmp_path, tmp_path / "run", "data.connected=false", "epochs=2"))
    assert record.status == "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.graph=oak", r"there is no .*oak\.npz; the folder has tree"),
        ("model.curvature=-1", r"model\.curvature=-1\.0; expected a number >= 1e-06"),
        ("model.widht=3", r"unknown key 'model\.widht' .*did you mean 'model\.width'\?"),
        ("optimizer.name=sts", r"in optimizer: unknown optimizer 'sts'; did you mean 'sst'\?"),
        ("optimizer.rank=2", r"in optimizer: optimizer 'adamw' takes no argument 'rank'"),
        ("optimizer.name=sst", r"in optimizer: rank is missing: give optimizer\.rank="),
        ("optimizer.name=sst optimizer.rank=7", r"in optimizer: .*rank=7; expected a whole number from 1 to 6"),
        ("optimizer.lr=-1", r"in optimizer: .*lr"),
        ("epochs=0", r"epochs=0; expected a number >= 1"),
        ("margin=0", r"margin=0\.0; expected a number > 0"),
        ("clip=-1", r"clip=-1\.0; expected a number > 0, or null"),
        ("data.split_seed=-1", r"data\.split_seed=-1; expected a number >= 0"),
        ("model.geometry=spherical", r"wrong value .*model\.geometry"),
        ("data.protocol=dirty", r"wrong value .*data\.protocol"),
        ("data.root=500", r"data\.root=500; expected a node of tree, 0 to 120"),
        ("data.label_column=9 data.task=node_classification", r"data\.label_column=9; expected 0 to 8"),
        ("for_optimizer.adamw=3", r"for_optimizer\.adamw=3; expected keys and values"),
    ],
)
def test_what_the_user_must_mend_is_said(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise UserError(_whole_failure(words(folder, tmp_path / "run", *change.split())))


def _whole_failure(arguments: list[str]) -> str:

    try:
        config = load_recipe(GraphConfig, arguments)
        with start("cpu") as ranks:
            build_graph_run(config, ranks)
    except UserError as error:
        return str(error)
    return "nothing was wrong"


def test_settings_for_an_optimizer_hold_unless_given(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {dropout: 0.9}\noptimizer: {name: adamw, lr: 0.5}\n"
        "for_optimizer:\n  sst: {model.dropout: 0.5, optimizer.resample_every: 100}\n"
    )
    plain = load_recipe(GraphConfig, [str(recipe)])
    assert plain.model.dropout == 0.9
    config = load_recipe(GraphConfig, [str(recipe), "optimizer.name=sst", "optimizer.rank=1"])
    assert config.model.dropout == 0.5
    assert config.optimizer == {"name": "sst", "lr": 0.5, "weight_decay": 0.0, "rank": 1, "resample_every": 100}
    given = load_recipe(GraphConfig, [str(recipe), "optimizer.name=sst", "optimizer.rank=1", "model.dropout=0.1"])
    assert given.model.dropout == 0.1
    assert given.for_optimizer == {}


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs" / "hyperbolic").glob("*_[ln][pc].yaml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_readable_with_every_method(recipe: Path, method: str) -> None:
    rank = [] if method == "adamw" else ["optimizer.rank=2"]
    config = load_recipe(GraphConfig, [str(recipe), f"optimizer.name={method}", *rank])
    assert config.data.protocol == "clean"
    assert config.optimizer.get("resample_every") == (100 if method == "sst" else None)


# ------------------------------------------------------------------------------------------------------- the front door


def test_the_launcher_trains_and_resumes_after_a_signal(folder: Path, tmp_path: Path) -> None:
    launcher = ROOT / "launch" / "hyperbolic.py"
    arguments = words(folder, tmp_path / "run", "epochs=100000", "patience=100000")
    process = Launched(["--epochs", "100000", *arguments], tmp_path / "log", launcher)
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size > 2000):
        assert process.process.is_alive(), process.output
    process.signal(signal.SIGINT)
    assert process.finish() == 0
    (stopped,) = re.findall(
        r"stopped at epoch (\d+); resume with: python .*hyperbolic\.py .*resume=auto", process.output
    )
    assert "loss" in process.output
    again = Launched([*arguments, f"epochs={int(stopped) + 3}"], tmp_path / "log", launcher)
    assert again.finish() == 0
    assert "test average precision" in again.output
    assert f"resuming from {tmp_path / 'run' / 'checkpoints'}/step-{stopped}" in again.output


def test_the_launcher_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    process = Launched(["data.folder=" + os.fspath(tmp_path)], tmp_path / "log", ROOT / "launch" / "hyperbolic.py")
    assert process.finish() == 2
    assert re.fullmatch(r"error: there is no .*disease_lp\.npz; .*data\.folder.*\n", process.output)


def test_the_launcher_lists_its_keys(tmp_path: Path) -> None:
    process = Launched(["--help"], tmp_path / "log", ROOT / "launch" / "hyperbolic.py")
    assert process.finish() == 0
    assert "model.curvature (1.0): k > 0" in process.output
    assert "  sst: " in process.output
