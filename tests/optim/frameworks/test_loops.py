"""Loops without a framework: DDP, FSDP2, built before or after sharding, resumed; names and roles through wrappers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_train import optim
from lowrank_train.layers.spectral import to_spectral
from tests.optim.frameworks.harness import (
    MAX_NORM,
    SETTINGS,
    create,
    difference,
    is_sharded,
    load_model,
    mean_over_ranks,
    named_states,
    named_weights,
    plain_losses,
    run_ranks,
)
from tests.optim.models import assert_equal


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: slice = slice(None)) -> list[float]:
    losses = []
    for tokens in torch.load("my_tokens.pt")[steps]:
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return mean_over_ranks(losses)


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replace_parameters(optimizer: torch.optim.Optimizer, old: dict[str, Tensor], model: nn.Module) -> None:
    """As a framework does that shards the model after the optimizer was built: new tensors by the old ones' names."""
    new = dict(model.named_parameters())
    by_old = {param: new[name] for name, param in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [by_old[param] for param in group["params"]]


@pytest.mark.slow
def test_before_sharding_is_after_sharding(material: Path) -> None:
    """Bit for bit: weights and state; with the state deferred and not."""

    def both() -> list[dict[str, Tensor]]:
        results = []
        for order in ("after", "before", "before, deferred"):
            model = load_model()
            if order == "after":
                shard(model)
                optimizer = create(model)
            else:
                optimizer, old = create(model), dict(model.named_parameters())
                if order == "before, deferred":
                    optimizer.defer_state()
                    assert optim.state_bytes(optimizer) == 0
                    assert optimizer.state_dict()["state"] == {}
                    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
                    assert optim.state_bytes(optimizer) == 0
                shard(model)
                replace_parameters(optimizer, old, model)
            train(model, optimizer)
            assert is_sharded(model)
            results.append({**named_weights(model), **named_states(optimizer)})
        return results

    for after, before, deferred in run_ranks(both, 2, material):
        assert_equal(before, after)
        assert_equal(deferred, after)


@pytest.mark.parametrize("inside", [False, True])
def test_ddp_is_the_plain_loop(inside: bool, material: Path) -> None:
    """``inside``: the optimizer is given the model in its wrapper."""

    def replicated() -> tuple[list[float], list[str]]:
        model = load_model()
        wrapped = DistributedDataParallel(model)
        optimizer = create(wrapped if inside else model)
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        assert schedule.get_last_lr() == [SETTINGS["lr"]] * len(optimizer.param_groups)
        return train(wrapped, optimizer), names

    ((expected, _, _),) = run_ranks(lambda: (*plain_losses(create, constant=True)[:1], 0, 0), 1, material)
    for losses, names in run_ranks(replicated, 2, material):
        assert difference(losses, expected) < 1e-5
        assert not any(name.startswith("module.") for name in names)


def test_resume_of_a_plain_loop_is_exact(material: Path) -> None:
    def resume() -> list[dict[str, Tensor]]:
        results = []
        for interrupted in (False, True):
            model = load_model()
            optimizer = create(model)
            train(model, optimizer, slice(0, 3))
            if interrupted:
                saved = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict()], saved)
                saved.seek(0)
                model_state, optimizer_state = torch.load(saved, weights_only=True)
                model = load_model()
                optimizer = create(model)
                model.load_state_dict(model_state)
                optimizer.load_state_dict(optimizer_state)
            train(model, optimizer, slice(3, None))
            results.append({**named_weights(model), **named_states(optimizer)})
        return results

    ((at_once, in_two),) = run_ranks(resume, 1, material)
    assert_equal(in_two, at_once)


@pytest.mark.slow
def test_spectral_layers_resume_exactly_under_fsdp2(material: Path) -> None:
    """Through torch.distributed.checkpoint, within an iteration; the optimizer was built before sharding, deferred."""

    def start() -> tuple[nn.Module, optim.MatrixOptimizer]:
        model = to_spectral(load_model(), rank=8)
        optimizer = optim.create("sst", model, lr=1e-2, resample_every=4, warmup_steps=2)
        old = dict(model.named_parameters())
        optimizer.defer_state()
        shard(model)
        replace_parameters(optimizer, old, model)
        return model, optimizer

    def resume() -> list[dict[str, Tensor]]:
        results = []
        for interrupted in (False, True):
            model, optimizer = start()
            train(model, optimizer, slice(0, 3))
            if interrupted:
                states = get_state_dict(model, optimizer)
                dcp.save({"model": states[0], "optim": states[1]}, checkpoint_id="spectral_checkpoint")
                model, optimizer = start()
                states = get_state_dict(model, optimizer)
                loaded: dict[str, Any] = {"model": states[0], "optim": states[1]}
                dcp.load(loaded, checkpoint_id="spectral_checkpoint")
                set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
            train(model, optimizer, slice(3, None))
            results.append({**named_weights(model), **named_states(optimizer)})
        return results

    for at_once, in_two in run_ranks(resume, 2, material):
        assert_equal(in_two, at_once)


# --------------------------------------------------------------------------------------------- deferred state, wrappers


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_deferred_state_is_the_same_state(name: str) -> None:
    models = []
    for deferred in (False, True):
        torch.manual_seed(0)
        model = Small()
        optimizer = optim.create(name, model, lr=1e-2)
        if deferred:
            optimizer.defer_state()
            assert optim.state_bytes(optimizer) == 0
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        models.append({**dict(model.named_parameters()), **named_states(optimizer)})
    assert_equal(*models)


def test_deferred_state_loads_a_checkpoint() -> None:
    model = Small()
    optimizer = optim.create("dct_adamw", model, lr=1e-2)
    gradients(model, 0)
    optimizer.step()
    other = optim.create("dct_adamw", model, lr=1e-2)
    other.defer_state()
    other.load_state_dict(optimizer.state_dict())
    assert_equal(named_states(other), named_states(optimizer))


def test_updates_in_backward_find_deferred_state() -> None:
    model = Small()
    optimizer = optim.create("dct_adamw", model, lr=1e-2)
    optimizer.defer_state()
    optim.attach_to_backward(model, optimizer)
    model.head(model.inner(model.embedding(torch.arange(9)))).square().mean().backward()
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_a_step_with_zero_gradients_and_rate_makes_state_and_changes_nothing(name: str) -> None:
    """What torchtitan and torch.distributed.checkpoint do to an optimizer without state; ours has some, or deferred it.

    Directions are not chosen from zeros, but from the first real gradient, as ever.
    """
    directions = []
    for primed in (False, True):
        torch.manual_seed(0)
        model = Small()
        optimizer = optim.create(name, model, lr=1e-2)
        keys = named_states(optimizer).keys()
        if primed:
            optimizer.defer_state()
            before = {key: param.detach().clone() for key, param in model.named_parameters()}
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step(closure=None)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            assert all(torch.equal(param, before[key]) for key, param in model.named_parameters())
            assert named_states(optimizer).keys() == keys
        gradients(model, 0)
        optimizer.step()
        directions.append({key: value for key, value in named_states(optimizer).items() if ".basis" in key})
    assert_equal(*directions)


def test_wrappers_change_neither_names_nor_roles() -> None:
    def described(model: nn.Module) -> list[tuple[str, str]]:
        return [(group["role"], name) for group in optim.param_groups(model) for name, _ in group["params"]]

    plain = described(Small())
    wrapped = Small()
    wrapped.inner = checkpoint_wrapper(wrapped.inner)
    assert described(wrapped) == plain
    assert described(torch.compile(Small())) == plain  # type: ignore[arg-type]


def test_the_head_is_found_inside_another_module() -> None:
    """Where the vocabulary is padded its width would not tell: Lightning's modules hold the model as an attribute."""

    class Padded(Small):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 12)

    outer = nn.Module()
    outer.model = Padded()
    roles = {name: group["role"] for group in optim.param_groups(outer) for name, _ in group["params"]}
    assert roles["model.head.weight"] == "head"
    assert roles["model.inner.weight"] == "matrix"
