"""Formulas and tracker, two independent counts of one step, agree."""

from __future__ import annotations

import sys

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.config.run_config import load_config
from lowrank_train.memory.step import predict
from lowrank_train.plan import Plan
from tests.tiers import only_first_quick
from tests.tools.memory_tracker import track

BOUND = 0.03
"""In every phase."""
PEAK_BOUND = 0.025

LEAN = "seq_len=1024 micro_batch=1 precision=bfloat16 model.checkpointing=full fused_backward=true clip=null"

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
    (1, "llama_60m seq_len=256 micro_batch=4 precision=bfloat16 weights=bfloat16 model.checkpointing=selective"),
    (2, "opt_125m seq_len=256 micro_batch=4 precision=bfloat16 model.checkpointing=full model.checkpointed_layers=2"),
    (8, "llama_130m seq_len=256 micro_batch=4 precision=bfloat16 weights=int8 tokens_per_step=8192"),
    (8, "llama_60m seq_len=128 precision=bfloat16 fused_backward=true optimizer.name=dct_adamw optimizer.rank=64"),
    (1, "llama_60m seq_len=512 micro_batch=4 precision=bfloat16 data.separate_documents=true"),
    (1, "llama_60m seq_len=256 model.overrides.num_key_value_heads=2 micro_batch=4 data.separate_documents=true"),
    (2, "opt_125m seq_len=512 micro_batch=4 precision=bfloat16 data.separate_documents=true"),
    (1, f"llama_7b {LEAN} weights=bfloat16 tokens_per_step=1024 optimizer.name=scale"),
    (1, f"llama_7b {LEAN} weights=int8 tokens_per_step=4096 optimizer.name=galore_adamw optimizer.rank=512"),
]
"""Of three layers (first, last, and one between): more only repeat them, in minutes where these take seconds."""


@pytest.mark.parametrize(("world_size", "settings"), only_first_quick(SETTINGS, 3))
def test_formulas_and_tracker_agree(world_size: int, settings: str) -> None:
    config = load_config(f"model.name={settings} model.overrides.num_hidden_layers=3".split())
    plan = Plan.of(config, world_size=world_size)
    tracked, predicted = track(plan, updates=False), predict(plan)
    both = {name: predicted.phases[name] for name in tracked.phases}
    assert max(both.values()) == pytest.approx(tracked.peak, rel=PEAK_BOUND)
    for name, bytes_ in both.items():
        assert bytes_ == pytest.approx(tracked.phases[name], rel=BOUND), name


@pytest.mark.parametrize("weights", ["full", "bfloat16"])
@pytest.mark.slow
def test_copies_of_shards_agree(weights: str) -> None:
    settings = f"model.name=llama_60m model.overrides.num_hidden_layers=3 seq_len=128 weights={weights}"
    config = load_config([*settings.split(), "precision=bfloat16", "micro_batch=2", "parallel.replicas=2"])
    plan = Plan.of(config, world_size=4)
    tracked, predicted = track(plan, updates=False), predict(plan)
    for phase, size in tracked.phases.items():
        assert predicted.phases[phase] == pytest.approx(size, rel=BOUND), phase


@pytest.mark.parametrize(
    "optimizer",
    only_first_quick(
        [
            *("adamw state_dtype=8bit", "dct_adamw", "muon", "adamw state_dtype=4bit"),
            *("galore_adamw", "trion", "scale"),
            *("muon state_dtype=8bit", "adamw weights=bfloat16", "scale weights=bfloat16", "fira weights=int8 rank=64"),
            "low_rank_adamw basis=hadamard residual=drop",
        ],
        3,
    ),
)
def test_updates_agree(optimizer: str) -> None:
    name, *arguments = optimizer.split()
    settings = ["model.name=llama_60m", "model.overrides.num_hidden_layers=2", "seq_len=32", "micro_batch=1"]
    given = [a if a.startswith("weights") else f"optimizer.{a}" for a in arguments]
    config = load_config([*settings, "precision=bfloat16", f"optimizer.name={name}", *given])
    plan = Plan.of(config)
    tracked, predicted = track(plan), predict(plan)
    for phase in ("step", "refresh"):
        if phase in tracked.phases:
            assert predicted.phases[phase] == pytest.approx(tracked.phases[phase], rel=BOUND), phase


def test_a_torch_without_the_tracker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed._tools", None)
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.fsdp2_mem_tracker", None)
    with pytest.raises(UserError, match="no memory tracker"):
        track(Plan.of(load_config(["model.name=llama_9m", "seq_len=32", "micro_batch=1"])))
