"""Formulas and tracker, two independent counts of one step, agree."""

from __future__ import annotations

import sys

import pytest

from lowrank_train.config import load_config
from lowrank_train.errors import UserError
from lowrank_train.memory_terms import predict
from lowrank_train.memory_tracker import track

BOUND = 0.03
"""In every phase."""
PEAK_BOUND = 0.02

SETTINGS = [
    (1, "llama_60m seq_len=256 micro_batch=4 precision=bfloat16 model.checkpointing=full"),
    (8, "llama_130m seq_len=512 micro_batch=2 optimizer.name=dct_adamw precision=bfloat16"),
    (1, "llama_130m seq_len=256 micro_batch=1 optimizer.name=scale"),
    (2, "opt_125m seq_len=256 micro_batch=2 precision=bfloat16"),
    (1, "opt_125m seq_len=128 micro_batch=1 tokens_per_step=128"),
    (8, "opt_350m seq_len=256 micro_batch=1 optimizer.name=galore_adamw"),
    (1, "llama_60m seq_len=256 micro_batch=1 optimizer.name=sst optimizer.rank=64"),
    (8, "llama_60m seq_len=256 micro_batch=1 optimizer.name=lora optimizer.rank=16"),
    (8, "llama_7b seq_len=1024 micro_batch=1 precision=bfloat16 model.checkpointing=full"),
    (8, "opt_6.7b seq_len=1024 micro_batch=1"),
]
"""Of three layers (first, last, and one between): more only repeat them, in minutes where these take seconds."""


@pytest.mark.parametrize(("world_size", "settings"), SETTINGS)
def test_formulas_and_tracker_agree(world_size: int, settings: str) -> None:
    config = load_config(f"model.name={settings} model.overrides.num_hidden_layers=3".split())
    tracked, predicted = track(config, world_size=world_size, updates=False), predict(config, world_size=world_size)
    both = {name: predicted.phases[name] for name in tracked.phases}
    assert max(both.values()) == pytest.approx(tracked.peak, rel=PEAK_BOUND)
    for name, bytes_ in both.items():
        assert bytes_ == pytest.approx(tracked.phases[name], rel=BOUND), name


@pytest.mark.parametrize("optimizer", ["adamw state_dtype=8bit", "dct_adamw", "galore_adamw", "trion", "muon", "scale"])
def test_updates_agree(optimizer: str) -> None:
    name, *arguments = optimizer.split()
    settings = ["model.name=llama_60m", "model.overrides.num_hidden_layers=2", "seq_len=32", "micro_batch=1"]
    config = load_config([*settings, f"optimizer.name={name}", *(f"optimizer.{a}" for a in arguments)])
    tracked, predicted = track(config), predict(config)
    for phase in ("step", "refresh"):
        if phase in tracked.phases:
            assert predicted.phases[phase] == pytest.approx(tracked.phases[phase], rel=BOUND), phase


def test_a_torch_without_the_tracker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed._tools", None)
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.fsdp2_mem_tracker", None)
    with pytest.raises(UserError, match="no memory tracker"):
        track(load_config(["model.name=llama_9m", "seq_len=32", "micro_batch=1"]))
