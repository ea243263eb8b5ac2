"""Adapters of peft in runs: every name trains, merges and can be given away; resume, ranks, data, errors."""

from __future__ import annotations

import contextlib
import os
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
from transformers import AutoModelForCausalLM

from lowrank_train import trainer
from lowrank_train.adapter_names import adapter_names
from lowrank_train.config import DataConfig
from lowrank_train.finetuning import load_finetuning
from lowrank_train.model_folder import load_model
from lowrank_train.run import Run
from lowrank_train.tokenizer import prepare_tokenizer
from tests.distributed import run_distributed
from tests.train.helpers import arguments, documents, losses, write_jsonl
from tests.train.test_compress import trained

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
SINGLE: set[str] = set()
"""peft's code is not for float64."""


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
    precision = "float32" if name in SINGLE else "float64"
    general = [word for word in arguments(folders / "text.jsonl", run_dir, precision=precision) if "model." not in word]
    data = [f"data.folder={folders / 'data'}", f"data.tokenizer={folders / 'tokenizer'}", "evaluation.tokens=64"]
    adapter = [f"adapter.name={name}", *SMALL.get(name, ["adapter.rank=4"]), "adapter.sequences=16"]
    return [*general, *data, f"model={folders / kind}", f"steps={STEPS}", "schedule.warmup_steps=0", *adapter, *more]


def follow(cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Train one after the other in this rank; what is to be known of each, or its error."""
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    export, found = trainer._export, {}

    def watched(run: Run) -> None:
        run.model.eval()
        facts["logits"] = run.model(probe()).logits.detach()
        facts["trained"] = [name for name, p in run.model.named_parameters() if p.requires_grad]
        export(run)

    trainer._export = watched
    for case, arguments in cases.items():
        facts: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's own
                facts["record"] = trainer.train(load_finetuning(arguments))
        except Exception:
            facts["error"] = traceback.format_exc()
        facts["seconds"] = time.perf_counter() - began
        found[case] = facts
    return found


def probe() -> Tensor:
    return torch.arange(24).view(2, 12) % 50 + 3


@pytest.fixture(scope="module")
def everyone(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every name, trained on one rank."""
    root = tmp_path_factory.mktemp("runs")
    cases = {name: words(folders, root / name, name) for name in NAMES}
    found = run_distributed(follow, 1, cases)[0]
    for name in NAMES:
        found[name]["folder"] = root / name
    return found
