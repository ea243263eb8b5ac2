"""Files that somebody else made: nothing in them is executed, no path in them leads outside, nothing is asked.

Every hostile file here would create a marker; terminals that are asked answer yes.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from lowrank_train.bench import compression as compression_benchmark
from lowrank_train.bench import graphs as graph_benchmark
from lowrank_train.bench import quality
from lowrank_train.bench import translation as translation_benchmark
from lowrank_train.common.errors import UserError
from lowrank_train.compress.command import load_settings as load_compress
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import ModelConfig
from lowrank_train.files.checksums import CHECKSUMS, write_checksums
from lowrank_train.hyperbolic import run as network_run
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.translation.config import TranslationConfig
from lowrank_train.memory.question import load_budget
from lowrank_train.models.build import architecture
from lowrank_train.models.folders import load_model
from lowrank_train.spectra import command as spectrum_run
from lowrank_train.spectra.history import history
from lowrank_train.train import finetune as finetuning
from tests.hyperbolic import helpers as graphs
from tests.runs import ROOT, Launched, arguments, failure, train_on
from tests.tiers import only_first_quick

pytestmark = pytest.mark.usefixtures("_agreeable_terminal")


@pytest.fixture
def _agreeable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints 2 and 4; to be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train_on(1, words(text, run_dir))
    return run_dir


def words(text: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(text, run_dir, "steps=4", "checkpoint.every=2", *more)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


# ---------------------------------------------------------------------------------------------------------- checkpoints


def with_hostile_index(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))


def with_hostile_value(checkpoint: Path, marker: Path) -> None:
    """The number of steps done is an object of its own."""
    content = io.BytesIO()
    torch.save(Hostile(marker), content)
    (checkpoint / "more.distcp").write_bytes(content.getvalue())
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    name = next(key for key in index.state_dict_metadata if key in ("progress.step", "progress.done"))
    index.storage_data[MetadataIndex(name)] = _StorageInfo("more.distcp", 0, len(content.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def with_a_path_outside(checkpoint: Path, marker: Path) -> None:
    """The weights of another checkpoint, which would be loaded without a word."""
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for key, place in index.storage_data.items():
        index.storage_data[key] = _StorageInfo(f"../elsewhere/{place.relative_path}", place.offset, place.length)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    for file in checkpoint.glob("*.distcp"):
        (checkpoint.parent / "elsewhere").mkdir(exist_ok=True)
        file.rename(checkpoint.parent / "elsewhere" / file.name)


HOSTILE = {
    "index": (with_hostile_index, "asks for posix.mkdir"),
    "value": (with_hostile_value, "is damaged"),
    "path": (with_a_path_outside, "'../elsewhere/__0_0.distcp', which is not in the folder"),
}


def make(kind: str, checkpoint: Path, marker: Path) -> str:
    """A hostile checkpoint with checksums that fit; returns what is said of it."""
    change, said = HOSTILE[kind]
    change(checkpoint, marker)
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
    write_checksums(checkpoint)
    return said


@pytest.mark.parametrize("kind", only_first_quick(HOSTILE))
def test_a_hostile_checkpoint_executes_nothing(text: Path, copy: Path, tmp_path: Path, marker: Path, kind: str) -> None:
    for step in ("step-2", "step-4"):
        said = make(kind, copy / "checkpoints" / step, marker)
    assert said in failure(words(text, copy))  # resume=auto
    assert said in failure(words(text, tmp_path / "other", f"resume={copy / 'checkpoints' / 'step-4'}"))
    if kind != "value":  # spectra read weights alone
        with pytest.raises(UserError) as caught:
            history(copy, ".*")
        assert said in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_of_a_hyperbolic_run_executes_nothing(tmp_path: Path, marker: Path, kind: str) -> None:
    run = graphs.words(graphs.tree_folder(tmp_path), tmp_path / "run", "epochs=4")
    graphs.train(run)
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        said = make(kind, checkpoint, marker)
    assert said in graphs.failure(run)
    torch.save(Hostile(marker), tmp_path / "run" / "network.pt")
    with pytest.raises(UserError, match=r"cannot read .*network\.pt"):
        network_run.load_saved(tmp_path / "run", lambda _: torch.nn.Linear(1, 1))
    assert not marker.exists()


# -------------------------------------------------------------------------------------------------------- model folders


@pytest.fixture
def foreign(tmp_path: Path, marker: Path) -> Path:
    """A model of an unknown kind that brings its own code, for its configuration, weights and tokenizer."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Config: ...\n")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": names}))
    tokenizer = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({"weight": torch.ones(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


COMMANDS = {
    "pretrain": [
        "pretrain.py",
        "model.name={folder}",
        "device=cpu",
        "run_dir={out}",
        "seq_len=16",
        "tokens_per_step=16",
    ],
    "tokenizer": ["pretrain.py", "model.name=llama_9m", "data.tokenizer={folder}", "device=cpu", "run_dir={out}"],
    "finetune": ["finetune.py", "model={folder}", "device=cpu", "run_dir={out}"],
    "compress": ["compress.py", "{folder}", "rank_reduction=0.5", "device=cpu", "out={out}"],
    "spectrum": ["spectrum.py", "{folder}", "out={out}"],
    "memory_budget": ["memory_budget.py", "--model", "{folder}"],
    "benchmark": [
        "benchmark.py",
        "compression",
        "model={folder}",
        "output={out}",
        "configs/benchmark/compression.yaml",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_the_code_of_a_model_folder(foreign: Path, tmp_path: Path, marker: Path, name: str) -> None:
    script, *given = [word.format(folder=foreign, out=tmp_path / "out") for word in COMMANDS[name]]
    run = Launched(given, tmp_path / "log", ROOT / "launch" / script)
    assert run.finish() == 2, run.output
    said = run.output.strip().splitlines()[-1]
    assert said.startswith("error: "), run.output
    assert str(foreign) in said
    assert "wants code of its own to be run" in said
    assert "auto_map" in said
    assert not marker.exists()


def test_an_index_of_weights_names_no_file_outside(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source / "huggingface", tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (load_model, lambda path: architecture(ModelConfig(name=str(path)))):
        with pytest.raises(UserError, match=r"names the file '\.\./secret\.safetensors', which is not in the folder"):
            read(folder)


# ------------------------------------------------------------------------------------------------------- configurations

LOADERS = {
    "pretrain": load_config,
    "finetune": finetuning.load_finetuning,
    "compress": load_compress,
    "spectrum": spectrum_run.load_settings,
    "memory_budget": load_budget,
    "graph": partial(load_recipe, GraphConfig),
    "translation": partial(load_recipe, TranslationConfig),
    "quality": quality.load,
    "compression benchmark": compression_benchmark.load,
    "graph benchmark": graph_benchmark.load,
    "translation benchmark": translation_benchmark.load,
}


@pytest.mark.parametrize("name", LOADERS)
def test_no_configuration_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    for reference in ("${oc.env:SECRET}", "a${oc.env:SECRET}b", "${oc.decode:${oc.env:SECRET}}", "${seed}"):
        file = tmp_path / "settings.yaml"
        file.write_text(f"deep: {{list: [1, '{reference}']}}\n")
        for given in (f"run_dir={reference}", str(file)):
            with pytest.raises(UserError, match="refers to a value elsewhere") as caught:
                LOADERS[name]([given])
            assert "hidden" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- every reader


def test_no_reader_goes_around_the_safe_ones() -> None:
    """A new reader of models, tokenizers or checkpoints uses those that were tried above."""
    for file in sorted((ROOT / "lowrank_train").rglob("*.py")) + sorted((ROOT / "optim").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called.endswith(".from_pretrained"):
                assert file.name == "pretrained.py", f"{file}: {called}"
                assert keywords["trust_remote_code"] == "False"
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{file}: {called}"
            assert called not in ("pickle.load", "pickle.loads", "FileSystemReader", "yaml.load"), f"{file}: {called}"
            assert keywords.get("allow_pickle", "False") == "False", f"{file}: {called}"
