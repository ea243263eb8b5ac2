"""Numbers that are not finite in weights and state: said by name, never published, never exported as finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_train.files.finite import name_not_finite
from lowrank_train.hyperbolic.run import NetworkRun
from lowrank_train.optim.shards.layout import local
from lowrank_train.train import checkpoint as checkpoint_module
from lowrank_train.train.run import Run
from tests.distributed import DistributedFailure
from tests.hyperbolic import helpers as graphs
from tests.runs import ROOT, Launched, arguments, at_step, checkpoints, failure, train_on

NAME = "model.layers.1.mlp.up_proj.weight"


def words(text: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(text, run_dir, "steps=8", "checkpoint.every=2", "checkpoint.keep=1", "max_bad_steps=20", *more)


def spoiled_after(step: int, what: str, value: float, rank: int = 0) -> Callable[[], None]:
    """What a broken kernel or memory does: a number of a weight, or of a moment, is not finite after a step."""

    def install() -> None:
        original = Run.save

        def save(self: Run) -> None:
            if self.progress.step == step and self.ranks.rank == rank:
                param = self.model.get_parameter(NAME)
                tensor = param if what == "weight" else self.optimizer.state[param][what]
                with torch.no_grad():
                    local(tensor).view(-1)[-1] = value
            original(self)

        Run.save = save  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize(
    ("what", "value", "background"), [("weight", float("nan"), "true"), ("exp_avg", float("inf"), "false")]
)
def test_what_is_not_finite_is_never_a_checkpoint(
    text: Path, tmp_path: Path, what: str, value: float, background: str
) -> None:
    """On one rank of two, at the second checkpoint; only one is kept, and it stays."""
    given = words(text, tmp_path, f"checkpoint.asynchronous={background}")
    message = failure(given, 2, spoiled_after(4, what, value, rank=1))
    assert message.startswith("at step 4 ")
    assert f"{NAME!r} holds a number that is not finite: no checkpoint of it is written" in message
    assert ("exp_avg" in message) == (what == "exp_avg")
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-2'}" in message
    assert checkpoints(tmp_path) == ["step-2"]


def test_a_run_whose_weights_were_spoiled_does_not_finish(text: Path, tmp_path: Path) -> None:
    """After a checkpoint, so that every step is skipped up to the last: nothing is exported as finished."""

    def spoil() -> None:
        model = seen[0].model
        with torch.no_grad():
            local(model.get_parameter(NAME)).view(-1)[-1] = float("nan")

    seen: list[Run] = []

    def install() -> None:
        original = Run.set_learning_rate

        def remember(self: Run, factor: float) -> None:
            seen[:] = [self]
            original(self, factor)

        Run.set_learning_rate = remember  # type: ignore[method-assign]
        at_step(6, spoil)()

    message = failure(words(text, tmp_path, "checkpoint.every=4"), before=install)
    assert message.startswith(f"at step 8 the parameter {NAME!r} holds a number that is not finite")
    assert str(tmp_path / "checkpoints" / "step-4") in message
    assert checkpoints(tmp_path) == ["step-4"]
    assert not (tmp_path / "huggingface").exists()
    assert not (tmp_path / "record.json").exists()
    message = failure(words(text, tmp_path, "checkpoint.every=4", "max_bad_steps=2"), before=install)
    assert message.startswith(f"at step 7 the parameter {NAME!r} holds a number that is not finite")  # gives up
    assert train_on(1, words(text, tmp_path, "checkpoint.every=4"))[0].status == "finished"


def test_a_checkpoint_of_an_earlier_version_that_is_not_finite_is_said_at_the_start(text: Path, tmp_path: Path) -> None:
    """It was written in good faith, and its checksums fit."""

    def unguarded() -> None:
        spoiled_after(4, "weight", float("nan"))()
        checkpoint_module.name_not_finite = lambda state: None  # type: ignore[attr-defined]

    given = words(text, tmp_path, "steps=4", "checkpoint.keep=2")
    with pytest.raises(DistributedFailure, match="holds a number that is not finite; no model is written"):
        train_on(1, given, unguarded)  # nor does the export let it pass
    assert checkpoints(tmp_path) == ["step-2", "step-4"]
    assert not (tmp_path / "huggingface" / "model.safetensors").exists()
    message = failure(words(text, tmp_path))
    assert f"the parameter {NAME!r} holds a number that is not finite" in message
    assert "delete it, and resume=auto goes on from step-2" in message


def spoil(folder: Path, name: str, value: float) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def exported(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("exported") / "run"
    train_on(1, words(text, run_dir, "steps=2"))
    return run_dir / "huggingface"


@pytest.mark.parametrize("more", [[], ["adapter.name=lora", "adapter.rank=2"]])
def test_a_model_folder_that_is_not_finite_is_refused_by_name(
    text: Path, exported: Path, tmp_path: Path, more: list[str]
) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    spoil(folder, NAME, float("nan"))
    given = [word for word in words(text, tmp_path / "run", *more) if not word.startswith("model.")]
    message = failure([*given, f"model.name={folder}"])
    assert message == f"model.name={folder} holds a number that is not finite in {NAME!r}; start from other weights"


def test_compress_writes_nothing_that_is_not_finite(exported: Path, tmp_path: Path) -> None:
    """In the embedding, which is not compressed."""
    folder = shutil.copytree(exported, tmp_path / "model")
    spoil(folder, "model.embed_tokens.weight", float("inf"))
    given = [str(folder), "rank_reduction=0.5", f"out={tmp_path / 'out'}", "device=cpu", "perplexity=false"]
    run = Launched([*given, f"cache={tmp_path / 'cache'}"], tmp_path / "log", ROOT / "launch" / "compress.py")
    assert run.finish() == 2, run.output
    said = run.output.strip().splitlines()[-1]
    assert "'model.embed_tokens.weight' holds a number that is not finite; no model is written" in said
    assert not list((tmp_path / "out").glob("*"))


def test_a_hyperbolic_run_never_keeps_what_is_not_finite(tmp_path: Path) -> None:
    folder = graphs.tree_folder(tmp_path)
    given = graphs.words(folder, tmp_path / "run", "epochs=6", "checkpoint_every=2")

    def install() -> None:
        original = NetworkRun.save

        def save(self: NetworkRun) -> None:
            if self.progress.done == 4:
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] = float("nan")
            original(self)

        NetworkRun.save = save  # type: ignore[method-assign]

    message = graphs.failure(given, install)
    assert message.startswith("at step 4 the parameter ")
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-2'}" in message
    assert checkpoints(tmp_path / "run") == ["step-2"]
    assert not (tmp_path / "run" / "network.pt").exists()


def test_only_nan_and_inf_are_found() -> None:
    """A finite tensor whose sum overflows, and one whose infinities would cancel."""
    huge = torch.full((4,), 3e38)
    assert name_not_finite({"a": huge, "b": {"c": torch.full((4,), 6e4, dtype=torch.float16)}, "d": None}) is None
    assert name_not_finite({"a": huge, "b": {"c": torch.tensor([float("inf"), -float("inf"), 1.0])}}) == "b.c"
    assert name_not_finite({"codes": torch.zeros(3, dtype=torch.uint8), "empty": torch.empty(0)}) is None
