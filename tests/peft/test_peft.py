"""Adapters of peft in runs: every name trains, merges and can be given away; resume, ranks, data, errors."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.compress.ranks import compress, plan_ranks
from lowrank_train.config import methods
from lowrank_train.config.schema import AdapterConfig, DataConfig
from lowrank_train.data.tokenizer import prepare_tokenizer
from lowrank_train.memory.step import predict
from lowrank_train.models.compressed_folder import save_model
from lowrank_train.models.folders import load_model
from lowrank_train.peft import names as adapter_names_module
from lowrank_train.peft.model import AdaptedModel, adapt
from lowrank_train.peft.names import adapter_names
from lowrank_train.plan import Plan
from lowrank_train.spectra.spectrum import spectra
from lowrank_train.text.labels import split
from lowrank_train.train import loop as trainer
from lowrank_train.train import run as run_module
from lowrank_train.train.finetune import finetuning_help, load_finetuning
from lowrank_train.train.loop import train
from lowrank_train.train.run import Run
from tests.compress.test_compress import trained
from tests.distributed import run_distributed
from tests.runs import (
    ROOT,
    arguments,
    assert_equal_tensors,
    checkpoint_tensors,
    documents,
    exact_history,
    losses,
    write_jsonl,
)

NAMES = adapter_names()
SMALL = {
    "adamss": ["adapter.arguments.num_subspaces=2", "adapter.rank=8"],
    "beft": [],
    "boft": [],
    "c3a": ["adapter.arguments.block_size=16"],
    "fourierft": ["adapter.arguments.n_frequency=50"],
    "frod": [],
    "gralora": ["adapter.rank=4"],
    "ia3": [],
    "ln_tuning": [],
    "oft": ["adapter.arguments.oft_block_size=8"],
    "road": ["adapter.arguments.group_size=16"],
    "supertuning": [],
    "vblora": ["adapter.rank=2", "adapter.arguments.vector_length=16", "adapter.arguments.num_vectors=8"],
    "waveft": ["adapter.arguments.n_frequency=50"],
}
"""Name -> settings that fit a hidden size of 32; the others have rank 4."""

STEPS = 3
UNMERGED = {"beft", "lily"}
"""Names that peft cannot merge into a LLaMA: one adds biases, which that has not, the other shares its factors."""
ABSENT = {"loftq": "bitsandbytes"}
"""Names that need another library."""
REFUSES_FLOAT64 = {"mica", "psoft"}
"""Names that peft can only begin in float32 or less: their folder is read in that."""
TRAINABLE = [name for name in NAMES if name not in ABSENT]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA and an OPT, a text."""
    root = tmp_path_factory.mktemp("folders")
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(60)), root / "tokenizer")
    write_jsonl(root / "text.jsonl", documents(300))
    for kind in ("llama", "opt"):
        trained(kind).save_pretrained(root / kind)
        shutil.copytree(root / "tokenizer", root / kind, dirs_exist_ok=True)
    return root


def words(folders: Path, run_dir: Path, name: str, *more: str, kind: str = "llama") -> list[str]:
    """A fine-tuning of a few steps."""
    typed = arguments(folders / "text.jsonl", run_dir, precision="float64")
    general = [word for word in typed if not word.startswith("model.")]
    data = [f"data.folder={folders / 'data'}", f"data.tokenizer={folders / 'tokenizer'}", "evaluation.tokens=64"]
    data.append("export.dtype=float64")
    adapter = [f"adapter.name={name}", *SMALL.get(name, ["adapter.rank=4"]), "adapter.sequences=16"]
    return [*general, *data, f"model={folders / kind}", f"steps={STEPS}", "schedule.warmup_steps=0", *adapter, *more]


def follow(cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Train one after the other in this rank; what is to be known of each, or its error."""
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    export, found = trainer._export, dict[str, dict[str, Any]]()

    def watched(run: Run) -> None:
        run.model.eval()
        facts["logits"] = run.model(probe()).logits.detach()
        facts["trained"] = {name: p.numel() for name, p in run.model.named_parameters() if p.requires_grad}
        export(run)

    trainer._export = watched
    for case, typed in cases.items():
        facts: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's own
                facts["record"] = train(load_finetuning(typed))
        except Exception:
            facts["error"] = traceback.format_exc()
        facts["seconds"] = time.perf_counter() - began
        found[case] = facts
    return found


def failed(found: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"{name}: {facts['error']}" for name, facts in found.items() if "error" in facts)


def probe() -> Tensor:
    return torch.arange(24).view(2, 12) % 50 + 3


@pytest.fixture(scope="module")
def everyone(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every name, trained on one rank."""
    root = tmp_path_factory.mktemp("runs")
    found: dict[str, dict[str, Any]] = {}
    for first in range(0, len(TRAINABLE), 8):  # a worker may live for a minute
        cases = {name: words(folders, root / name, name) for name in TRAINABLE[first : first + 8]}
        found.update(run_distributed(follow, 1, cases)[0])
    for name in TRAINABLE:
        found[name]["folder"] = root / name
    return found


# ------------------------------------------------------------------------------------------------------- every name


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.slow
def test_every_adapter_trains_merges_and_is_given_away(
    everyone: dict[str, dict[str, Any]], folders: Path, name: str
) -> None:
    facts = everyone[name]
    assert "error" not in facts, facts.get("error")
    folder, base = facts["folder"], plain(folders / "llama")
    before = base.state_dict()
    moved = (facts["logits"] - base(probe()).logits).abs().max()
    assert moved > 2e-5  # of AdaLoRA, which begins at zero three times over
    history = losses(folder)
    assert history[1] < history[0] or name == "fourierft"  # which begins at random numbers, and at this rate too fast
    record = facts["record"]
    assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes
    assert record.trained_parameters == sum(facts["trained"].values()) < record.parameters / 2
    own = {name for name in facts["trained"] if name in before}
    assert not own or name in ("ln_tuning", "shira", "osf", "supertuning"), own

    (folder / "adapter" / "adapter_config.json").stat()
    given = load_adapter(folders / "llama", folder / "adapter", torch.float32 if name in REFUSES_FLOAT64 else None)
    close = 1e-4 if name in REFUSES_FLOAT64 else 1e-6
    torch.testing.assert_close(given(probe()).logits.double(), facts["logits"], rtol=0, atol=close)
    assert (folder / "huggingface").exists() == (name not in UNMERGED)
    if name not in UNMERGED:
        merged = plain(folder / "huggingface")
        assert merged.state_dict().keys() == before.keys()
        torch.testing.assert_close(merged(probe()).logits, facts["logits"], rtol=0, atol=1e-6)
        assert "peft folder" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_adalora_ends_with_its_budget(everyone: dict[str, dict[str, Any]]) -> None:
    """Rank 4 on average over 14 matrices, chosen from 6 each; all but these singular values are zero."""
    folder = everyone["adalora"]["folder"]
    pattern = json.loads((folder / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    values = checkpoint_tensors(folder / "checkpoints" / f"step-{STEPS}", "model.")
    kept = [value for name, value in values.items() if ".lora_E." in name]
    assert sum(value.numel() for value in kept) == 14 * 6
    assert sum(map(sum, pattern.values())) == sum(int((value != 0).sum()) for value in kept) == 14 * 4


@torch.no_grad()
def plain(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval().requires_grad_(False)


def load_adapter(base: Path, folder: Path, dtype: torch.dtype | None) -> Any:
    """As a user of peft does."""
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or torch.float64)
        adapted = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        return adapted.eval().double().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ many ranks

KINDS = ["adalora", "boft", "dora", "eva", "lily", "pissa", "vera"]
"""Of what matters to shards: a budget and its penalty, three dimensions, norms of weights, data, shared parameters,
changed weights, buffers."""
if os.environ.get("ALL_ADAPTERS"):  # how the table of docs/peft.md was made; takes minutes
    KINDS = TRAINABLE
DRAWS = {"pvera"}
"""It draws in every forward pass, each rank its own numbers."""

Ranks = tuple[Path, dict[str, list[dict[str, Any]]]]


def on_two_ranks(folders: Path, root: Path) -> Ranks:
    """A few at a time; name -> facts of each rank."""
    found: dict[str, list[dict[str, Any]]] = {}
    for first in range(0, len(KINDS), 6):
        names = KINDS[first : first + 6]
        cases = {name: words(folders, root / name, name, "checkpoint.every=2") for name in names}
        ranks = run_distributed(follow, 2, cases)
        found.update({name: [rank[name] for rank in ranks] for name in names})
    return root, found


@pytest.fixture(scope="module")
def two_ranks(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Trained on two ranks, with a checkpoint before the last step."""
    return on_two_ranks(folders, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def resumed(folders: Path, two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The same again from step 2 of 3, in other processes."""
    root = tmp_path_factory.mktemp("resumed")
    for name in KINDS:
        shutil.copytree(two_ranks[0] / name, root / name)
        shutil.rmtree(root / name / "checkpoints" / f"step-{STEPS}")
        shutil.rmtree(root / name / "adapter")
    return on_two_ranks(folders, root)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_two_ranks_train_as_one(everyone: dict[str, dict[str, Any]], two_ranks: Ranks, name: str) -> None:
    root, found = two_ranks
    for facts in found[name]:
        assert "error" not in facts, facts.get("error")
        assert facts["record"].world_size == 2
        if name not in DRAWS:
            torch.testing.assert_close(facts["logits"], everyone[name]["logits"], rtol=0, atol=1e-6)
    alike = 1e-2 if name in DRAWS else 1e-6
    assert losses(root / name) == pytest.approx(losses(everyone[name]["folder"]), abs=alike)
    if name not in UNMERGED:
        merged = plain(root / name / "huggingface")(probe()).logits
        torch.testing.assert_close(merged, found[name][0]["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_resume_is_bit_exact(two_ranks: Ranks, resumed: Ranks, name: str) -> None:
    (root, whole), (again, found) = two_ranks, resumed
    assert "error" not in found[name][0], found[name][0].get("error")
    assert torch.equal(found[name][0]["logits"], whole[name][0]["logits"])
    assert exact_history(again / name) == exact_history(root / name)
    ends = [folder / name / "checkpoints" / f"step-{STEPS}" for folder in (again, root)]
    assert_equal_tensors(*(checkpoint_tensors(end) for end in ends))
    assert (again / name / "adapter").exists()


# -------------------------------------------------------------------------------------------------- any optimizer


@pytest.mark.slow
def test_every_optimizer_trains_an_adapter(folders: Path, tmp_path: Path) -> None:
    names = [name for name in optim.names() if methods.find(name).layers is methods.Dense]
    names = [name for name in names if name not in ("relora", "sst", "riemannian_adamw")]  # for layers of their own
    cases = {}
    for name in names:
        rank = ["optimizer.rank=2"] if "rank" in methods.find(name).arguments() else []
        typed = words(folders, tmp_path / name, "lora", "steps=2")
        typed = [word for word in typed if not word.startswith("optimizer.")]
        cases[name] = [*typed, f"optimizer={{name: {name}, lr: 1.0e-3}}", *rank]
    found = run_distributed(follow, 1, cases)[0]
    assert not failed(found)
    base = plain(folders / "llama")(probe()).logits
    for name in names:
        assert not torch.equal(found[name]["logits"], base), name
        record = found[name]["record"]
        assert record.optimizer_state_bytes == record.predicted_optimizer_state_bytes, name


# ------------------------------------------------------------------------------------------------- other runs


def test_other_models_and_precisions(folders: Path, tmp_path: Path) -> None:
    """OPT, whose biases BEFT trains; bfloat16; a compressed model, whose factors get the adapter."""
    model = trained("llama")
    save_model(compress(model, plan_ranks(model, spectra(model), rank_reduction=0.5, floor=6)), folders / "small")
    shutil.copytree(folders / "tokenizer", folders / "small", dirs_exist_ok=True)
    half = ["precision=bfloat16", "weights=bfloat16", "model.checkpointing=full", "export.dtype=bfloat16"]
    cases = {
        "opt beft": words(folders, tmp_path / "beft", "beft", kind="opt"),
        "opt pissa": words(folders, tmp_path / "pissa", "pissa", "optimizer.lr=0.01", kind="opt"),
        "bfloat16 lora": words(folders, tmp_path / "half", "lora", *half),
        "bfloat16 vera": words(folders, tmp_path / "vera", "vera", "precision=bfloat16"),
        "small dora": words(folders, tmp_path / "small", "dora", kind="small"),
    }
    found = run_distributed(follow, 1, cases)[0]
    assert not failed(found)
    for case, folder in (("opt beft", "beft"), ("opt pissa", "pissa"), ("small dora", "small")):
        merged = load_model(tmp_path / folder / "huggingface").requires_grad_(False)
        torch.testing.assert_close(merged(probe()).logits.double(), found[case]["logits"], rtol=0, atol=1e-5)
        assert losses(tmp_path / folder)[1] < losses(tmp_path / folder)[0]
    for folder in ("half", "vera"):
        assert losses(tmp_path / folder)[1] < losses(tmp_path / folder)[0]
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "huggingface", dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert all(".left." in name or ".right." in name or "_proj." in name for name in found["small dora"]["trained"])


# ------------------------------------------------------------------------------------------------------- their data


def begun(folders: Path, name: str, blocks: Tensor) -> AdaptedModel:
    """An adapter before training; to be called in a rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1")
    with start(
        "cpu",
        load_finetuning(words(folders, folders / "none", "lora")).parallel.shards,
        load_finetuning(words(folders, folders / "none", "lora")).parallel.replicas,
    ) as ranks:
        return adapt(
            load_model(folders / "llama"),  # type: ignore[arg-type]
            AdapterConfig(name=name, rank=4),
            batches=list(blocks.split(4)),
            ranks=ranks,
            seed=0,
            steps=1,
            dtype=torch.float32,
            compute_dtype=torch.float32,
        )


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_initialisations_learn_from_the_data(folders: Path, name: str) -> None:
    def work() -> None:
        chooser = torch.Generator().manual_seed(0)
        one, other = (torch.randint(3, 60, (16, 13), generator=chooser) * k for k in (1, 3))
        key = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
        adapted = {case: begun(folders, name, blocks).model for case, blocks in (("one", one), ("other", other))}
        again, default = begun(folders, name, one).model, begun(folders, "lora", one).model
        first, second = (model.get_parameter(key).detach() for model in adapted.values())
        assert torch.equal(again.get_parameter(key), first)
        assert shared(first, second) < 0.95
        assert shared(first, default.get_parameter(key).detach()) < 0.95
        # the model computes what it did
        base = load_model(folders / "llama")
        for model in adapted.values():
            torch.testing.assert_close(model.eval()(probe()).logits, base(probe()).logits, rtol=0, atol=1e-4)
        if name == "eva":  # its rows are the directions in which the layer's inputs vary most
            seen: list[Tensor] = []
            hook = base.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(
                lambda module, args: seen.append(args[0].detach().flatten(0, 1))
            )
            base(split(one)[0])
            hook.remove()
            varied = seen[0] - seen[0].mean(0)
            best = torch.linalg.svdvals(varied)[: len(first)].square().sum()
            assert (varied @ torch.linalg.qr(first.mT)[0]).square().sum() > 0.95 * best

    run_distributed(work, 1)


def shared(one: Tensor, other: Tensor) -> float:
    """Of two row spaces: 1 if they are the same, about rank / width if they have nothing to do with each other."""
    bases = [torch.linalg.qr(rows.mT)[0] for rows in (one, other)]
    return float((bases[0].mT @ bases[1]).square().sum() / min(len(one), len(other)))


def test_the_data_are_the_runs_first_sequences(folders: Path, tmp_path: Path) -> None:
    def work() -> None:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        config = load_finetuning(words(folders, tmp_path, "eva"))
        given: list[Tensor] = []

        def watched(*args: Any, batches: list[Tensor], **kwargs: Any) -> AdaptedModel:
            given.extend(batches)
            return adapt(*args, batches=batches, **kwargs)

        run_module.adapt = watched
        with (
            start("cpu", config.parallel.shards, config.parallel.replicas) as ranks,
            warnings.catch_warnings(action="ignore"),
        ):
            run = Run.build(Plan.of(config), ranks)
            assert torch.equal(torch.cat(given), run.data.train.take(16, 0, 1))  # training begins with them again

    run_distributed(work, 1)


# ---------------------------------------------------------------------------------------------------------- errors


def refused(folders: Path, *more: str, name: str = "lora") -> str:
    config = load_finetuning(words(folders, folders / "none", name, *more))
    with pytest.raises(UserError) as caught:
        Plan.of(config)
    return str(caught.value)


def test_unknown_names_and_arguments(folders: Path) -> None:
    assert "unknown adapter 'pisa'; did you mean 'pissa'? expected one of adalora" in refused(folders, name="pisa")
    message = refused(folders, "adapter.arguments.boft_blok_size=4", name="boft")
    assert "adapter 'boft' takes no argument 'boft_blok_size'; did you mean 'boft_block_size'?" in message
    message = refused(folders, "adapter.arguments.eva_config.roh=2", name="eva")
    assert "unknown key adapter.arguments.eva_config.roh; did you mean 'rho'?" in message
    message = refused(folders, "adapter.rank=4", name="boft")
    assert "adapter.rank=4, but 'boft' has no rank" in message
    assert "boft_block_size" in message
    assert "adapter.name=shadow cannot be trained by a run: it trains a second" in refused(folders, name="shadow")
    assert "adapter.name=lora" in refused(folders, "adapter.arguments.layers_pattern=x")
    assert "does not update that budget" in refused(folders, "adapter.arguments.use_asa=true", name="adamss")


@pytest.mark.parametrize(("name", "instead"), [("kasa", "pissa"), ("monteclora", "pvera")])
def test_variants_that_add_to_the_loss_are_refused_by_name_and_by_argument(
    folders: Path, name: str, instead: str
) -> None:
    assert name not in NAMES
    told = [refused(folders, name=name), refused(folders, f"adapter.arguments.{name}_config={{}}")]
    told.append(refused(folders, f"adapter.arguments.{name}_config={{}}", name="adalora"))
    assert told[0].startswith(f"adapter.name={name} cannot be trained by a run: ")
    for message in told[1:]:
        assert message.startswith(f"adapter.arguments.{name}_config cannot be trained by a run: ")
    for message in told:
        assert "adds a term to every loss" in message
        assert instead in message


def test_settings_that_do_not_go_together(folders: Path, tmp_path: Path) -> None:
    assert "replaces the same layers itself" in refused(folders, "optimizer={name: sst, lr: 1.0e-3, rank: 4}")
    assert "the adapter says what is trained" in refused(folders, "train=matrices")
    assert "use bfloat16" in refused(folders, "weights=int8", "precision=bfloat16")
    assert "set it to false" in refused(folders, "fused_backward=true", name="adalora")
    with pytest.raises(UserError, match=r"without adapter\.name; give that"):
        load_finetuning([*words(folders, tmp_path, "lora"), "adapter.name=null"])
    with pytest.raises(UserError, match=r"adapter\.sequences=0; expected a number >= 1"):
        load_finetuning([*words(folders, tmp_path, "lora"), "adapter.sequences=0"])
    with pytest.raises(UserError, match="is not predicted with adapter"):
        predict(Plan.of(load_finetuning(words(folders, tmp_path, "lora"))))
    config = load_finetuning(words(folders, tmp_path, "lora"))
    config.model.name = "llama_9m"
    with pytest.raises(UserError, match="a size to pretrain; an adapter needs a trained model"):
        Plan.of(config)


def test_what_peft_refuses_is_an_error_of_the_user(folders: Path, tmp_path: Path) -> None:
    cases = {
        "too high": words(folders, tmp_path / "a", "miss", "adapter.rank=64"),
        "no such module": words(folders, tmp_path / "b", "lora", "adapter.arguments.target_modules=[nothing]"),
        "optimizer": words(folders, tmp_path / "c", "loftq"),
    }
    found = run_distributed(follow, 1, cases)[0]
    assert "UserError: adapter.name=miss: `r` (64) must be less" in found["too high"]["error"]
    assert "UserError: adapter.name=lora: " in found["no such module"]["error"]
    assert "UserError: adapter.name=loftq: bitsandbytes" in found["optimizer"]["error"]


def test_without_peft(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(adapter_names_module.importlib, "import_module", absent)
    assert "pip install 'lowrank-train[peft]'" in refused(folders)
    assert "pip install 'lowrank-train[peft]'" in finetuning_help()


def test_help_lists_every_adapter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["finetune.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / "finetune.py"), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert f"\n  {name}: " in text
    assert "boft_block_size=4" in text
    assert "adapter.sequences (64): " in text
