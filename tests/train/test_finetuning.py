"""Fine-tuning of compressed models: what is trained and what it costs, every method, resume, ranks, the way out."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from lowrank_train.bench.quality import load, plan
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.compress.ranks import compress, plan_ranks
from lowrank_train.config import methods
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.tokenizer import prepare_tokenizer
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.layers.plain import merge
from lowrank_train.memory import static as memory_budget
from lowrank_train.models.compressed_folder import compressed_ranks, is_compressed, save_model
from lowrank_train.models.folders import load_model
from lowrank_train.optim.shards.layout import local
from lowrank_train.plan import Plan
from lowrank_train.spectra.spectrum import spectra
from lowrank_train.text.labels import split
from lowrank_train.train.finetune import load_finetuning
from lowrank_train.train.run import Run
from tests.compress.test_compress import trained
from tests.distributed import run_distributed
from tests.runs import (
    ROOT,
    arguments,
    assert_equal_tensors,
    at_step,
    checkpoint_tensors,
    documents,
    exact_history,
    failure,
    losses,
    send,
    train_on,
    write_jsonl,
)
from tests.tiers import only_first_quick

KINDS = pytest.mark.parametrize("kind", ["llama", "opt"])
FLOOR = 6
"""Least rank of the factors: the methods below use 4."""

OPTIMIZER = {
    name: f"{{name: {name}, lr: 1.0e-3{', rank: 4' if 'rank' in methods.find(name).arguments() else ''}}}"
    for name in methods.names()
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed LLaMA and OPT, a plain LLaMA; a text and its tokens."""
    root = tmp_path_factory.mktemp("folders")
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(60)), root / "tokenizer")
    write_jsonl(root / "text.jsonl", documents(300))
    for kind in ("llama", "opt"):
        model = trained(kind)
        if kind == "llama":
            model.save_pretrained(root / "plain")
        save_model(compress(model, plan_ranks(model, spectra(model), rank_reduction=0.5, floor=FLOOR)), root / kind)
    for kind in ("llama", "opt", "plain"):
        shutil.copytree(root / "tokenizer", root / kind, dirs_exist_ok=True)
    return root


def words(folders: Path, run_dir: Path, *more: str, kind: str = "llama", **settings: str) -> list[str]:
    """A fine-tuning of 4 steps."""
    words = [word for word in arguments(folders / "text.jsonl", run_dir, **settings) if not word.startswith("model.")]
    data = [f"data.folder={folders / 'data'}", f"data.tokenizer={folders / 'tokenizer'}"]
    data.append(f"export.dtype={settings.get('precision', 'float32')}")
    return [*words, *data, f"model={folders / kind}", "train=low_rank", "steps=4", *more]


def nothing_else_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every factor and norm is another, everything else is the same, bit for bit."""
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if "norm" in n or n.endswith(("left.weight", "right.weight", "left.bias"))}
    assert moved == expected
    assert len(expected) < len(before) - 3


# ------------------------------------------------------------------------------------------------------ what is trained


@KINDS
@pytest.mark.parametrize("world_size", [1, 2])
def test_dense_matrices_cost_neither_gradients_nor_state(
    folders: Path, tmp_path: Path, kind: str, world_size: int
) -> None:
    def work() -> tuple[int, int, int]:
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(world_size))
        config = load_finetuning(words(folders, tmp_path, kind=kind))
        with start("cpu", config.parallel.shards, config.parallel.replicas) as ranks:
            run = Run.build(Plan.of(config, world_size=ranks.world_size), ranks)
            run.model.token_loss(*split(run.data.train.take(2, ranks.rank, world_size)), 1024).backward()
            got = memory_budget.measured(run.model, run.optimizer)
            expected = memory_budget.predicted(Plan.of(config, world_size=world_size), shard=ranks.rank)
            assert got == expected
            low_rank = [name for name, m in Plan.of(config).model.named_modules() if isinstance(m, LowRankLinear)]
            trained_bytes = 0
            for name, param in run.model.named_parameters():
                is_trained = "norm" in name or any(name.startswith(f"{layer}.") for layer in low_rank)
                assert param.requires_grad == is_trained, name
                assert (param.grad is not None) == is_trained, name
                assert (param in run.optimizer.state) == is_trained, name
                if is_trained:
                    trained_bytes += local(param).numel() * 4
            assert got.gradients == trained_bytes
            states = {key for state in run.optimizer.state.values() for key in state}
            assert {"exp_avg", "exp_avg_sq"} <= states
            moments = [v for s in run.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
            assert sum(local(value).numel() * 4 for value in moments) == 2 * trained_bytes
            return got.weights, got.gradients, got.optimizer_state

    totals = [sum(column) for column in zip(*run_distributed(work, world_size), strict=True)]
    assert totals[1] < totals[0] / 2


@pytest.mark.parametrize(("kind", "optimizer"), [("llama", "dct_adamw"), ("opt", "adamw")])
def test_factors_and_norms_are_trained_and_nothing_else(
    folders: Path, tmp_path: Path, kind: str, optimizer: str
) -> None:
    record = train_on(1, words(folders, tmp_path, f"optimizer={OPTIMIZER[optimizer]}", kind=kind))[0]
    nothing_else_moved(load_model(folders / kind).state_dict(), load_model(tmp_path / "huggingface").state_dict())
    assert record.validation_loss is not None
    assert record.initial_validation_loss is not None
    assert record.validation_loss < record.initial_validation_loss
    assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes


def test_a_head_of_low_rank_is_trained_or_frozen_as_a_whole(folders: Path, tmp_path: Path) -> None:
    model = trained("llama")
    save_model(compress(model, plan_ranks(model, spectra(model, "lm_head"), rank_reduction=0.5)), tmp_path / "head")
    shutil.copytree(folders / "tokenizer", tmp_path / "head", dirs_exist_ok=True)
    before = load_model(tmp_path / "head").state_dict()
    assert {"lm_head.left.weight", "lm_head.right.weight"} <= before.keys()
    for what, moves in (("low_rank", True), ("matrices", False)):
        run_dir = tmp_path / what
        train_on(1, words(folders, run_dir, f"model={tmp_path / 'head'}", f"train={what}", "steps=1"))
        after = load_model(run_dir / "huggingface").state_dict()
        for side in ("left", "right"):
            name = f"lm_head.{side}.weight"
            assert torch.equal(after[name], before[name]) != moves, (what, name)


def test_all_trains_all(folders: Path, tmp_path: Path) -> None:
    train_on(1, words(folders, tmp_path, "train=all", "steps=2"))
    before, after = (load_model(folder).state_dict() for folder in (folders / "llama", tmp_path / "huggingface"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


# -------------------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize(("what", "kind"), [("all", "llama"), ("low_rank", "opt")])
@pytest.mark.slow
def test_every_method_takes_a_step_on_a_compressed_model(folders: Path, tmp_path: Path, what: str, kind: str) -> None:
    """And gives back a state of the same names, in which what is frozen has not moved."""
    before = load_model(folders / kind).state_dict()

    def moved(name: str) -> set[str]:
        more = [f"optimizer={OPTIMIZER[name]}", f"train={what}", "schedule.warmup_steps=0"]
        config = load_finetuning(words(folders, tmp_path / name, *more, kind=kind))
        plan = Plan.of(config)
        with start("cpu", config.parallel.shards, config.parallel.replicas) as ranks:
            run = Run.build(Plan.of(config, world_size=ranks.world_size), ranks)
            run.model.token_loss(*split(run.data.train.take(4, 0, 1)), 1024).backward()
            run.optimizer.step()
            measured, predicted = memory_budget.measured(run.model, run.optimizer), memory_budget.predicted(plan)
            if hasattr(run.optimizer, "ranks"):  # chosen from weights, which no prediction reads: within the budget
                assert measured.optimizer_state <= predicted.optimizer_state
                predicted = replace(predicted, optimizer_state=measured.optimizer_state)
            assert measured == predicted
            state = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
            after = run.plan.layers.plain_state_dict(state)
            assert after.keys() == before.keys()
            assert all(torch.isfinite(value).all() for value in after.values())
            # layers that are made anew of a matrix give it back up to rounding
            return {key for key in before if not torch.allclose(after[key], before[key], rtol=1e-5, atol=1e-6)}

    def work() -> dict[str, set[str] | str]:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        results: dict[str, set[str] | str] = {}
        for name in [name for name in methods.names() if name != "riemannian_adamw"]:  # a LLaMA has no points
            try:
                results[name] = moved(name)
            except Exception:
                results[name] = traceback.format_exc()
        return results

    (results,) = run_distributed(work, 1)
    failed = {name: error for name, error in results.items() if isinstance(error, str)}
    assert not failed, "\n".join(failed.values())
    factors = {key for key in before if key.endswith(("left.weight", "right.weight"))}
    trained = {key for key in before if "norm" in key or key.endswith("left.bias")} | factors
    for name, names in results.items():
        if name not in ("lora", "relora"):  # their B begins at zero, and its first step is small
            assert factors <= names, name
        assert (names <= trained) == (what == "low_rank"), (name, names - trained)


def test_layers_on_top_of_factors_leave_the_outputs_as_they_were(folders: Path, tmp_path: Path) -> None:
    """And take the factors only, not the matrices that are frozen; the way out is a compressed folder again."""
    ranks = compressed_ranks(load_model(folders / "llama").config)
    factors = {f"{name}.{side}" for name in ranks for side in ("left", "right")}
    losses_before = []
    for method in ("adamw", "sst", "lora"):
        more = ["steps=2", "schedule.warmup_steps=0", f"optimizer={OPTIMIZER[method]}"]
        run = words(folders, tmp_path / method, *more, precision="float64")
        record = train_on(2 if method == "sst" else 1, run)[0]
        losses_before.append(record.initial_validation_loss)
        layers = methods.find(method).parametrization({"rank": 4})
        converted = {n for n, module in Plan.of(load_finetuning(run)).model.named_modules() if layers.converted(module)}
        assert converted == (set() if method == "adamw" else factors)
        out = load_model(tmp_path / method / "huggingface")
        assert compressed_ranks(out.config) == ranks
        assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes
    assert losses_before[1:] == pytest.approx(losses_before[:1] * 2, rel=1e-9)


# -------------------------------------------------------------------------------------------------------- resume, ranks


@pytest.mark.parametrize(("optimizer", "world_size"), only_first_quick([("adamw", 2), ("sst", 1)]))
def test_a_resumed_finetuning_is_bit_identical(folders: Path, tmp_path: Path, optimizer: str, world_size: int) -> None:
    more = [f"optimizer={OPTIMIZER[optimizer]}", "evaluation.every=2"]
    train_on(world_size, words(folders, tmp_path / "whole", *more))
    cut = words(folders, tmp_path / "cut", *more)
    assert train_on(world_size, cut, at_step(2, send(signal.SIGTERM), rank=0))[0].steps == 2
    train_on(world_size, cut)
    assert exact_history(tmp_path / "cut") == exact_history(tmp_path / "whole")
    ends = [tmp_path / name / "checkpoints" / "step-4" for name in ("cut", "whole")]
    for section in ("model.", "optimizer."):
        assert_equal_tensors(*(checkpoint_tensors(end, section) for end in ends))


@pytest.mark.parametrize(("kind", "optimizer"), only_first_quick([("llama", "adamw"), ("opt", "dct_adamw")]))
def test_two_ranks_train_as_one(folders: Path, tmp_path: Path, kind: str, optimizer: str) -> None:
    more = [f"optimizer={OPTIMIZER[optimizer]}"]
    for world_size in (1, 2):
        train_on(world_size, words(folders, tmp_path / str(world_size), *more, kind=kind, precision="float64"))
    one, two = (losses(tmp_path / str(world_size)) for world_size in (1, 2))
    assert two == pytest.approx(one, rel=1e-9)
    weights = [load_model(tmp_path / str(world_size) / "huggingface").state_dict() for world_size in (1, 2)]
    for name, value in weights[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-9 * float(value.abs().max()))


@pytest.mark.slow
def test_a_checkpoint_of_other_ranks_or_another_choice_is_refused(folders: Path, tmp_path: Path) -> None:
    train_on(1, words(folders, tmp_path, "steps=1"))
    assert "holds nothing for 'optimizer." in failure(words(folders, tmp_path, "train=all"))
    other = trained("llama")
    save_model(compress(other, plan_ranks(other, spectra(other), rank_reduction=0.6)), folders / "other")
    shutil.copytree(folders / "tokenizer", folders / "other", dirs_exist_ok=True)
    message = failure(words(folders, tmp_path, f"model={folders / 'other'}"))
    assert "was written by a run with model.low_rank.ranks." in message


# --------------------------------------------------------------------------------------------------------------- export


@KINDS
def test_the_export_is_compressed_and_has_the_loss_of_the_run(folders: Path, tmp_path: Path, kind: str) -> None:
    record = train_on(2, words(folders, tmp_path, kind=kind))[0]
    out = tmp_path / "huggingface"
    assert is_compressed(out)
    assert load_finetuning([f"model={tmp_path}"]).model.name == str(out)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(out)
    read = load_model(out)
    assert compressed_ranks(read.config) == compressed_ranks(load_model(folders / kind).config)
    again = train_on(1, words(folders, tmp_path / "again", f"model={out}", "steps=1", kind=kind))[0]
    assert again.initial_validation_loss == pytest.approx(record.validation_loss, rel=1e-6)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = read(ids).logits
        torch.testing.assert_close(merge(read)(ids).logits, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- launcher


@pytest.mark.slow
def test_the_launcher_runs_the_recipe(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a forked process, as the trainer joins ranks; with the paper's settings but for what is tiny here."""
    recipe = str(ROOT / "configs" / "welore_finetune.yaml")
    config = load_finetuning([recipe, f"model={folders / 'llama'}"])
    assert (config.train, config.clip, config.optimizer["weight_decay"]) == ("low_rank", None, 0.0)
    assert config.run_dir == "runs/llama-adamw-finetuned"
    assert config.data.tokenizer == str(folders / "llama")
    tiny = [word for word in words(folders, tmp_path) if not word.startswith(("optimizer", "train"))]

    def work() -> int:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        return int(runpy.run_path(str(ROOT / "launch" / "finetune.py"))["main"]([recipe, *tiny]))

    assert run_distributed(work, 1) == [0]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "finished"
    assert is_compressed(tmp_path / "huggingface")


def test_help_and_errors_of_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "launch" / "finetune.py"))["main"]
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: launch/finetune.py ")
    assert "  train (all): all parameters" in said
    assert main(["model=nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: model.name=nowhere is not a folder")
    assert said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "model.name=llama_60m is a size to pretrain; fine-tuning starts from a trained model: give model=FOLDER"),
        (["model=opt_125m"], "model.name=opt_125m is a size to pretrain"),
        (["model=nowhere"], "model.name=nowhere is not a folder; expected a local Hugging Face folder or a run folder"),
        (["model=FOLDERS/tokenizer"], "has no config.json"),
        (["model=FOLDERS/llama", "train=low-rank"], "wrong value for 'train'"),
        (["model=FOLDERS/llama", "trian=low_rank"], "did you mean 'train'"),
        (["data=FOLDERS/llama", "model=FOLDERS/llama"], "it is a section of keys, such as model.name or data.path"),
    ],
)
def test_bad_settings_are_refused_when_they_are_read(folders: Path, change: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_finetuning([word.replace("FOLDERS", str(folders)) for word in change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_plain_model_has_nothing_of_low_rank(folders: Path, tmp_path: Path, world_size: int) -> None:
    message = failure(words(folders, tmp_path, kind="plain"), world_size)
    assert message.startswith(
        "train=low_rank, but the model has no low-rank layer; compress it first (launch/compress.py)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train: lowrank", "optimizers.a.train=lowrank; expected one of all, "),
        ("train: null", "optimizers.a.train=None; expected one of all, "),
        ("model: 5", "optimizers.a.model=5; expected the name of a size, or a folder"),
        ("model: nowhere", "optimizers.a: unknown model 'nowhere'"),
        ("train: low_rank", "optimizers.a: train=low_rank, but the model has no low-rank layer"),
    ],
)
def test_a_row_of_the_benchmark_with_a_wrong_model_or_choice(change: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(load([f"optimizers={{a: {{name: adamw, lr: [1.0e-3], {change}}}}}"]))
    assert str(caught.value).startswith(message)


def broken(folders: Path, tmp_path: Path) -> Path:
    shutil.copytree(folders / "llama", tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.parametrize("world_size", [1, 2])
def test_truncated_weights_are_refused_on_all_ranks(folders: Path, tmp_path: Path, world_size: int) -> None:
    file = broken(folders, tmp_path) / "low_rank.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = failure(words(folders, tmp_path / "run", f"model={file.parent}"), world_size)
    assert message.startswith(f"cannot load the model in {file.parent}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (2, "its weights and ranks do not fit"),
        (99, "low_rank.ranks in the model's config.json do not fit it: cannot factor"),
        (None, "low_rank.ranks in the model's config.json do not fit it: cannot factor"),
    ],
)
def test_ranks_edited_by_hand_are_refused(folders: Path, tmp_path: Path, rank: int | None, message: str) -> None:
    file = broken(folders, tmp_path) / "config.json"
    config = json.loads(file.read_text())
    name = next(iter(config["low_rank"]["ranks"]))
    config["low_rank"]["ranks"][name] = rank
    file.write_text(json.dumps(config))
    said = failure(words(folders, tmp_path / "run", f"model={file.parent}"))
    assert message in said
    assert "\n" not in said


def test_a_rank_above_that_of_the_factors_names_one(folders: Path, tmp_path: Path) -> None:
    said = failure(words(folders, tmp_path, "optimizer={name: sst, lr: 1.0e-3, rank: 30}"))
    assert said.startswith("in optimizer: cannot convert 'model.layers.0.")
    assert "rank=30; expected a whole number from 1 to" in said
    assert ".left'" in said or ".right'" in said
