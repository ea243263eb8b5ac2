"""AdamW equals torch's, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train import optim
from tests.optim.models import MixedModel, assert_equal, build, run_steps, set_gradients, weights

STEPS = 20


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    model = MixedModel(dtype)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4}])
def test_equals_torch_on_plain_parameters(dtype: torch.dtype, lr: Any, settings: dict[str, Any]) -> None:
    ours, theirs = pair(dtype)
    before = weights(ours)
    run_steps(ours, optim.AdamW(ours.parameters(), lr=lr, **settings), 0, STEPS)
    run_steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=lr, fused=True, **settings), 0, STEPS)
    assert_equal(weights(ours), weights(theirs))
    assert all(not torch.equal(value, before[name]) for name, value in weights(ours).items())


def test_equals_torch_with_groups_scheduler_and_missing_gradients() -> None:
    ours, theirs = pair(torch.float32)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return [{"params": matrices, "lr": 3e-3}, {"params": vectors, "weight_decay": 0.0, "betas": (0.5, 0.9)}]

    optimizers = [optim.AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)]
    for model, optimizer in zip([ours, theirs], optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(STEPS):
            set_gradients(model, step)
            if step % 3 == 1:
                model.norm.weight.grad = None
            if step < 5:
                model.head.weight.grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            scheduler.step()
    assert_equal(weights(ours), weights(theirs))


def test_roles_change_nothing_but_the_weight_decay_of_vectors() -> None:
    ours, theirs = pair(torch.float64)
    run_steps(ours, build("adamw", ours), 0, STEPS)
    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    others = [{"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    theirs_optimizer = torch.optim.AdamW([{"params": decayed}, *others], lr=1e-2, weight_decay=0.1, fused=True)
    run_steps(theirs, theirs_optimizer, 0, STEPS)
    assert_equal(weights(ours), weights(theirs))


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([weight], lr=0.1)
    losses: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses.append((weight**2).sum())
        losses[-1].backward()
        return losses[-1]

    returned = optimizer.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    assert (weight < 1).all()
    assert optimizer.step() is None


def test_step_counts_and_state_names_are_those_of_torch() -> None:
    ours, theirs = pair(torch.float32)
    ours_optimizer = optim.AdamW(ours.parameters())
    theirs_optimizer = torch.optim.AdamW(theirs.parameters(), fused=True)
    run_steps(ours, ours_optimizer, 0, 3)
    run_steps(theirs, theirs_optimizer, 0, 3)
    for ours_state, theirs_state in zip(ours_optimizer.state.values(), theirs_optimizer.state.values(), strict=True):
        assert_equal(dict(ours_state), dict(theirs_state))


def test_loads_a_checkpoint_of_torch_adamw() -> None:
    ours, theirs = pair(torch.float32)
    theirs_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    run_steps(theirs, theirs_optimizer, 0, 5)
    ours.load_state_dict(theirs.state_dict())
    ours_optimizer = optim.AdamW(ours.parameters(), lr=1e-2)
    saved = copy.deepcopy(theirs_optimizer.state_dict())
    for group in saved["param_groups"]:
        group["role"] = "vector"  # the one setting torch's groups lack
    ours_optimizer.load_state_dict(saved)
    run_steps(ours, ours_optimizer, 5, 10)
    run_steps(theirs, theirs_optimizer, 5, 10)
    assert_equal(weights(ours), weights(theirs))
