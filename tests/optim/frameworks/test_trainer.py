"""Hugging Face's Trainer: the same losses, the settings of TrainingArguments, sharding, resume, axolotl's call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from lowrank_train import optim
from lowrank_train.layers.plain import merge
from lowrank_train.layers.spectral import to_spectral
from tests.optim.frameworks.harness import (
    LR,
    MAX_NORM,
    RANK,
    SEQUENCES,
    SETTINGS,
    STEPS,
    WEIGHT_DECAY,
    create,
    difference,
    is_sharded,
    load_model,
    mean_over_ranks,
    named_states,
    named_weights,
    plain_losses,
    run_ranks,
    sharded_share,
)
from tests.optim.models import assert_equal
from tests.tiers import only_first_quick

pytest.importorskip("accelerate", reason="accelerate is not installed, and the Trainer needs it")

OURS = {"rank": RANK, "refresh_interval": 2}


class Recording(Trainer):
    """Keeps the loss of every micro-batch, as the model gives it."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def trainer_of(ranks: int, *, model: nn.Module | None = None, entry: Any = None, **changes: Any) -> Recording:
    """Of 6 steps, on all the sequences of each, in order."""
    data = [{"input_ids": row, "labels": row} for row in torch.load("my_tokens.pt").flatten(0, 1)]
    accumulate = changes.get("gradient_accumulation_steps", 1)
    settings = {
        "learning_rate": LR,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_NORM,
        "num_train_epochs": 1,
        "per_device_train_batch_size": SEQUENCES // ranks // accumulate,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    args = TrainingArguments("trained", **settings)
    entry = entry or (optim.hf_factory("dct_adamw"), {"training_args": args, **OURS})
    return Recording(model or load_model(), args, train_dataset=data, optimizer_cls_and_kwargs=entry)


def train(ranks: int, accumulations: list[int], fsdp: bool) -> list[dict[str, Any]]:
    """A run for each number of micro-batches."""
    results = []
    for accumulate in accumulations:
        trainer = trainer_of(ranks, gradient_accumulation_steps=accumulate, fsdp=fsdp)
        before = optim.state_bytes(trainer.create_optimizer())
        trainer.train()
        results.append(
            {
                "losses": torch.tensor(mean_over_ranks(trainer.losses)).view(STEPS, accumulate).mean(1).tolist(),
                "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
                "replicated": isinstance(trainer.model_wrapped, DistributedDataParallel),
                "sharded": is_sharded(trainer.model),
                "bytes before training": before,
                "share": sharded_share(trainer.optimizer),
                "weights": named_weights(trainer.model),
                "decays": {group["role"]: group["weight_decay"] for group in trainer.optimizer.param_groups},
            }
        )
    if ranks > 1 and not fsdp:  # a callback of the Trainer is handed the bare model, which is inside its wrapper
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            optim.attach_to_backward(trainer.model, trainer.optimizer)
    return results


@cache
def plain(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    def losses_and_weights() -> tuple[list[float], dict[str, Tensor]]:
        losses, model, _ = plain_losses(lambda model: create(model))
        return losses, named_weights(model)

    return run_ranks(losses_and_weights, 1, folder)[0]


@pytest.mark.parametrize(
    ("ranks", "accumulations", "fsdp"), only_first_quick([(1, [1, 2], False), (2, [1], False), (2, [1, 2], True)])
)
def test_losses_are_those_of_the_plain_loop(ranks: int, accumulations: list[int], fsdp: bool, material: Path) -> None:
    """And state waits until the model is sharded, and updates in backward are refused where it is replicated."""
    losses, weights = plain(material)
    for results in run_ranks(train, ranks, material, ranks, accumulations, fsdp):
        for result in results:
            assert difference(result["losses"], losses) < 1e-5
            assert_equal(result["weights"], weights, 1e-4)
            assert result["sharded"] == fsdp
            assert result["replicated"] == (ranks > 1 and not fsdp)
            assert result["bytes before training"] == 0
            assert (0.45 < result["share"] < 0.55) if fsdp else result["share"] == 1
            assert result["rates"] == pytest.approx([LR * (1 - step / STEPS) for step in range(STEPS)])
            assert result["decays"] == {"matrix": 0.1, "embedding": 0.1, "head": 0.1, "vector": 0.0}


@pytest.mark.slow
def test_the_comparison_would_see_decay_schedule_clipping_and_rank(material: Path) -> None:
    """What the tests of all frameworks rest on: the losses depend on each setting by more than they may differ."""
    losses, _ = plain(material)

    def others() -> list[list[float]]:
        changed = [{"weight_decay": 0.0}, {"rank": 4}, {"betas": (0.9, 0.95)}, {"refresh_interval": 100}]
        runs = [plain_losses(lambda model, change=change: create(model, **change))[0] for change in changed]
        return [*runs, plain_losses(create, constant=True)[0]]

    assert all(difference(other, losses) > 1e-4 for other in run_ranks(others, 1, material)[0])


def resumed(ranks: int, fsdp: bool, state_dict_type: str | None) -> tuple[dict[str, Tensor], ...]:
    """Weights and state after all steps, at once and from the checkpoint in the middle."""
    config = {"state_dict_type": state_dict_type} if fsdp else None
    results = []
    for checkpoint in (None, "trained/checkpoint-3"):
        trainer = trainer_of(ranks, fsdp=fsdp, fsdp_config=config, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == STEPS
        assert is_sharded(trainer.model) == fsdp
        assert len(trainer.losses) == (STEPS if checkpoint is None else STEPS - 3)
        results.append({**named_weights(trainer.model), **named_states(trainer.optimizer)})
    return tuple(results)


@pytest.mark.parametrize(
    ("ranks", "fsdp", "kind"),
    [(1, False, None), (2, False, None), (2, True, "FULL_STATE_DICT"), (2, True, "SHARDED_STATE_DICT")],
)
@pytest.mark.slow
def test_resume_is_exact(ranks: int, fsdp: bool, kind: str | None, material: Path) -> None:
    for at_once, in_two in run_ranks(resumed, ranks, material, ranks, fsdp, kind):
        assert_equal(in_two, at_once)


@pytest.mark.slow
def test_spectral_layers_train_under_the_trainer(material: Path) -> None:
    """Converted before the Trainer sees the model; merged at the end."""

    def spectral(fsdp: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = to_spectral(load_model(), rank=RANK)
        entry = (optim.hf_factory("sst"), {"lr": LR, "resample_every": 2, "warmup_steps": 1})
        trainer = trainer_of(2 if fsdp else 1, model=model, entry=entry, fsdp=fsdp)
        trainer.train()
        assert is_sharded(trainer.model) == fsdp
        merged = {} if fsdp else named_weights(merge(model))
        return mean_over_ranks(trainer.losses), merged

    ((losses, merged),) = run_ranks(spectral, 1, material, False)
    assert "model.layers.0.self_attn.q_proj.weight" in merged
    assert losses[-1] < losses[0] - 0.2
    for sharded, _ in run_ranks(spectral, 2, material, True):
        assert difference(sharded, losses) < 1e-4  # re-SVDs in float32, sums in another order


# --------------------------------------------------------------------------------------------------------- the factory


def arguments(**changes: Any) -> SimpleNamespace:
    values = {"learning_rate": 3e-4, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-7}
    return SimpleNamespace(**values, **changes)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))


Build = Callable[..., optim.MatrixOptimizer]


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_training_arguments_reach_every_optimizer(name: str) -> None:
    optimizer = optim.hf_factory(name)()(small_model(), training_args=arguments())
    for group in optimizer.param_groups:
        assert group["lr"] == 3e-4
        assert group["weight_decay"] == (0.0 if group["role"] == "vector" else 0.2)
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-7
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


def test_the_dictionary_wins() -> None:
    build = optim.hf_factory("dct_adamw")()
    rules = {r"^1\.": {"rank": 2}}
    optimizer = build(small_model(), training_args=arguments(), lr=1e-3, weight_decay=0.3, rank=4, rules=rules)
    settings = {group["role"]: (group["lr"], group["weight_decay"], group["rank"]) for group in optimizer.param_groups}
    assert settings["matrix"] == (1e-3, 0.3, 2)
    assert settings["head"] == (1e-3, 0.3, 4)


def test_axolotl_passes_its_arguments_second() -> None:
    optimizer = optim.hf_factory("dct_adamw")()(small_model(), arguments(), rank=4)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"neither training_args nor lr.*\"training_args\": args"),
        ({"training_args": arguments(deepspeed="zero3.json")}, "DeepSpeed partitions parameters.*fsdp=True"),
        ({"lr": 1e-3, "rang": 4}, "takes no argument 'rang'; did you mean 'rank'"),
        ({"lr": 1e-3, "rules": {"nothing": {"rank": 2}}}, "matches no trainable parameter"),
    ],
)
def test_mistakes_name_the_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.hf_factory("dct_adamw")()(small_model(), **changes)


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'dct_adamw'"):
        optim.hf_factory("dct_adam")


def test_a_class_in_the_place_of_the_factory_is_told_of_it(material: Path) -> None:
    def wrong() -> str:
        with pytest.raises(ValueError, match="hf_factory") as caught:
            trainer_of(1, entry=(optim.DCTAdamW, SETTINGS)).train()
        return str(caught.value)

    assert run_ranks(wrong, 1, material)
