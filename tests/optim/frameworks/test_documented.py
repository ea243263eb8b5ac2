"""Every script of docs/swap.md, run as it stands there, and as it was before its diff."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowrank_train import optim
from tests.optim.frameworks.documented import DIFFS, SCRIPTS, original, run_script
from tests.optim.frameworks.harness import difference, is_sharded, mean_over_ranks, run_ranks, sharded_share

pytestmark = pytest.mark.slow

NEEDS = {
    "accelerated": "accelerate",
    "finetune": "accelerate",
    "fused_trainer": "accelerate",
    "lit": "lightning",
    "recipe": "torchtitan",
}
LOOPS = [("plain", 2), ("fused", 1), ("fsdp2", 2), ("accelerated", 2), ("lit", 2)]
"""Scripts that train on the same tokens as ``plain`` on 1, by the ranks they are run on."""


def needs(name: str) -> None:
    """Skip if the framework of a script is not installed; import it before the fork."""
    module = NEEDS.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if module is not None:
        importlib.import_module({"torchtitan": "torchtitan.components.optimizer"}.get(module, module))


class Outcome(NamedTuple):
    losses: list[float]
    sharded: bool
    share: float
    """Of the state, on this rank."""


def outcome(name: str, before: bool) -> Outcome:
    """Of a script, on one rank."""
    left = run_script(name, before=before)
    if "lit" in left:
        optimizer, losses = left["trainer"].optimizers[0], left["lit"].losses
    else:
        optimizer, losses = left["optimizer"], left["losses"]
    model = left.get("lit", left.get("model"))
    return Outcome(mean_over_ranks(losses), is_sharded(model), sharded_share(optimizer))


def both(name: str) -> tuple[Outcome, Outcome | None]:
    """After the swap and before."""
    return outcome(name, before=False), outcome(name, before=True) if name in DIFFS else None


@cache
def reference(folder: Path) -> tuple[Outcome, Outcome]:
    return run_ranks(both, 1, folder, "plain")[0]


@pytest.mark.parametrize(("name", "ranks"), LOOPS)
def test_all_loops_train_as_the_plain_one(name: str, ranks: int, material: Path) -> None:
    """With ours and, before the swap, with AdamW."""
    needs(name)
    plain, plain_before = reference(material)
    assert difference(plain.losses, plain_before.losses) > 1e-2
    for after, before in run_ranks(both, ranks, material, name):
        assert difference(after.losses, plain.losses) < 1e-5
        assert after.sharded == (name in ("fsdp2", "accelerated", "lit"))
        assert (0.45 < after.share < 0.55) if after.sharded else after.share == 1
        if before is not None:
            assert difference(before.losses, plain_before.losses) < 1e-5
            assert before.sharded == after.sharded


@pytest.mark.parametrize("name", list(DIFFS))
def test_at_most_three_lines_change(name: str) -> None:
    """``original`` fails for a diff that is not of its script."""
    before, after = original(name).splitlines(), SCRIPTS[name].splitlines()
    assert len([line for line in after if line not in before]) <= 3
    assert not any("optim.create" in line or "from lowrank_train import optim" in line for line in before)


def test_every_framework_has_its_diff() -> None:
    assert {"plain", "fsdp2", "finetune", "accelerated", "lit", "recipe"} == set(DIFFS)


def test_rules_of_the_page(material: Path) -> None:
    def groups() -> list[tuple[int, float, int]]:
        optimizer = run_script("rules")["optimizer"]
        return [(group["rank"], group["lr"], len(group["params"])) for group in optimizer.param_groups]

    assert run_ranks(groups, 1, material) == [[(8, 3e-3, 1), (8, 1e-2, 12), (4, 1e-2, 2), (8, 1e-2, 5), (8, 3e-3, 1)]]


def finetuned(name: str, before: bool) -> dict[str, Any]:
    trainer = run_script(name, before=before)["trainer"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "losses": [entry["loss"] for entry in logged],
        "class": type(optimizer).__name__,
        "sharded": is_sharded(trainer.model),
        "settings": {
            (group["weight_decay"], tuple(group["betas"]), group.get("rank")) for group in optimizer.param_groups
        },
    }


@pytest.mark.parametrize(("ranks", "before"), [(1, False), (1, True), (2, False)])
def test_fine_tuning_on_prompts_and_responses(ranks: int, before: bool, material: Path) -> None:
    needs("finetune")
    for result in run_ranks(finetuned, ranks, material, "finetune", before):
        assert result["class"] == ("AdamW" if before else "DCTAdamW")
        assert result["losses"][-1] < 0.7 * result["losses"][0]
        assert result["sharded"] == (ranks > 1)
        rank = None if before else 8
        assert result["settings"] == {(0.1, (0.9, 0.95), rank), (0.0, (0.9, 0.95), rank)}
    AutoModelForCausalLM.from_pretrained(material / "finetuned" / "last")


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_in_backward_under_the_trainer(ranks: int, material: Path) -> None:
    """Nothing is left of the gradients when ``step`` is called; under FSDP2 too."""
    needs("fused_trainer")
    for result in run_ranks(finetuned, ranks, material, "fused_trainer", False):
        assert result["class"] == "DCTAdamW"
        assert result["sharded"] == (ranks > 1)
        assert result["losses"][-1] < result["losses"][0] - 0.3


def test_spectral_training_of_the_page(material: Path) -> None:
    def train() -> str:
        return type(run_script("spectral")["optimizer"]).__name__

    assert run_ranks(train, 1, material) == ["SST"]
    merged = LlamaForCausalLM.from_pretrained(material / "my_spectral_model")
    start = LlamaForCausalLM.from_pretrained(material / "my_model").state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in merged.state_dict().items())


def test_compression_of_the_page(material: Path) -> None:
    run_ranks(lambda: len(run_script("compressed")), 1, material)
    merged = LlamaForCausalLM.from_pretrained(material / "my_merged_model")
    assert torch.linalg.matrix_rank(merged.model.layers[0].mlp.up_proj.weight) < 32


def test_recipe_of_the_page(material: Path) -> None:
    needs("recipe")

    def build() -> list[str]:
        container = run_script("recipe")["optimizer"].build(model_parts=[torch.nn.Sequential(torch.nn.Linear(8, 16))])
        return [type(optimizer).__name__ for optimizer in container]

    assert run_ranks(build, 1, material) == [["DCTAdamW"]]


def test_names_on_the_page_exist() -> None:
    for text in SCRIPTS.values():
        for word in ("create", "hf_factory", "titan_config", "attach_to_backward"):
            assert f"optim.{word}" not in text or hasattr(optim, word)
    assert "RANK" not in os.environ, "a script's environment stays in its process"
