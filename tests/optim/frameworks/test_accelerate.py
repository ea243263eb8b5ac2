"""Accelerate: DDP and FSDP2, mixed precision, accumulation, save and load."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lowrank_train import optim
from lowrank_train.compress.ranks import compress, plan_ranks
from lowrank_train.layers.low_rank import train_low_rank_only
from lowrank_train.layers.plain import merged_state_dict
from lowrank_train.spectra.spectrum import spectra
from tests.optim.frameworks.harness import (
    MAX_NORM,
    STEPS,
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
from tests.optim.models import all_whole, assert_equal

pytestmark = pytest.mark.slow

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def train(
    fsdp: bool, *, kind: str = "SHARDED_STATE_DICT", precision: str = "no", accumulate: int = 1, interrupt: bool = False
) -> tuple[list[float], dict[str, Tensor], float]:
    """Six steps; ``interrupt``: in the middle everything is saved, built anew and loaded."""
    plugin = None
    if fsdp:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=kind
        )
    accelerator = accelerate.Accelerator(
        fsdp_plugin=plugin, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = load_model()
        optimizer = create(model)
        optimizer.defer_state()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return (*accelerator.prepare(model, optimizer), schedule)

    model, optimizer, schedule = build()
    losses = []
    for step, tokens in enumerate(torch.load("my_tokens.pt")):
        if interrupt and step == 3:
            accelerator.save_state("accelerated_state")
            rates = schedule.state_dict()
            accelerator.free_memory()
            model, optimizer, schedule = build()
            accelerator.load_state("accelerated_state")
            schedule.load_state_dict(rates)
        mine, total = tokens.chunk(accelerator.num_processes)[accelerator.process_index], 0.0
        for part in mine.chunk(accumulate):
            with accelerator.accumulate(model):
                loss = model(input_ids=part, labels=part).loss
                total += loss.item() / accumulate
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                if accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
        losses.append(total)
    assert is_sharded(model) == fsdp
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel) != fsdp
    return mean_over_ranks(losses), {**named_weights(model), **named_states(optimizer)}, sharded_share(optimizer)


@cache
def plain(folder: Path) -> list[float]:
    return run_ranks(lambda: plain_losses(create)[0], 1, folder)[0]


@pytest.mark.parametrize("fsdp", [False, True])
def test_accumulated_losses_are_those_of_the_plain_loop(fsdp: bool, material: Path) -> None:
    for losses, _, share in run_ranks(lambda: train(fsdp, accumulate=2), 2, material):
        assert difference(losses, plain(material)) < 1e-5
        assert (0.45 < share < 0.55) if fsdp else share == 1


@pytest.mark.parametrize(("fsdp", "kind"), [(True, "SHARDED_STATE_DICT"), (True, "FULL_STATE_DICT"), (False, "")])
def test_save_and_load_are_exact(fsdp: bool, kind: str, material: Path) -> None:
    def both() -> list[tuple[list[float], dict[str, Tensor], float]]:
        return [train(fsdp, kind=kind, interrupt=interrupt) for interrupt in (False, True)]

    for (losses, values, _), (again, others, share) in run_ranks(both, 2, material):
        assert difference(losses, plain(material)) < 1e-5
        assert again == losses
        assert_equal(others, values)
        assert (0.45 < share < 0.55) if fsdp else share == 1


def test_bfloat16_arithmetic_keeps_float32_weights_and_state(material: Path) -> None:
    for losses, values, _ in run_ranks(lambda: train(True, precision="bf16"), 2, material):
        assert difference(losses, plain(material)) < 3e-2
        assert difference(losses, plain(material)) > 1e-6, "it computed in bfloat16"
        assert {value.dtype for key, value in values.items() if key.endswith("exp_avg")} == {torch.float32}


def test_updates_in_backward_take_the_prepared_pair(material: Path) -> None:
    def fused() -> list[float]:
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = accelerate.Accelerator(fsdp_plugin=plugin)
        model = load_model()
        optimizer = create(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        optim.attach_to_backward(model, optimizer, max_norm=MAX_NORM)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1 - step / STEPS)
        losses = []
        for tokens in torch.load("my_tokens.pt"):
            mine = tokens.chunk(2)[accelerator.process_index]
            loss = model(input_ids=mine, labels=mine).loss
            accelerator.backward(loss)
            assert all(
                slot.param.grad is None for slot in optimizer.optimizer.slots() if slot.group["role"] == "matrix"
            )
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return mean_over_ranks(losses)

    for losses in run_ranks(fused, 2, material):
        assert difference(losses, plain(material)) < 1e-5


def test_compressed_layers_train_as_in_one_process(material: Path) -> None:
    """WeLore's conversion, before the optimizer and before ``prepare``; whole again at the end."""

    def compressed(fsdp: bool) -> tuple[list[float], set[str]]:
        model = load_model()
        model = train_low_rank_only(compress(model, plan_ranks(model, spectra(model), rank_reduction=0.5)))
        optimizer = optim.create("adamw", model, lr=1e-2)
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin if fsdp else None)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert is_sharded(model) == fsdp
        losses = []
        for tokens in torch.load("my_tokens.pt")[:3]:
            mine = tokens.chunk(accelerator.num_processes)[accelerator.process_index]
            loss = model(input_ids=mine, labels=mine).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return mean_over_ranks(losses), set(merged_state_dict(all_whole(model.state_dict())))

    ((losses, names),) = run_ranks(compressed, 1, material, False)
    assert losses[-1] < losses[0]
    assert names == set(LlamaForCausalLM.from_pretrained(material / "my_model").state_dict())
    for sharded, merged in run_ranks(compressed, 2, material, True):
        assert difference(sharded, losses) < 1e-5
        assert merged == names
