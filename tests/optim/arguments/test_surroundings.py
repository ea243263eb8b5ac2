"""What a step is called in, autocast or torch.compile, changes nothing about its numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from tests.optim.models import (
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    build,
    gradient,
    prepare,
    set_gradients,
    states,
    trainable,
    weights,
)
from tests.tiers import only_first_quick

STEPS = REFRESH_INTERVAL + 2
"""Refreshes, a draw or a restart, and a step after each of them."""

every_optimizer = pytest.mark.parametrize("name", optim.names())


def new_model(name: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return prepare(name, MixedModel(torch.float32)).to(device)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A loss whose gradient is exact whatever the arithmetic: products element by element, and sums."""
    terms = [(param * gradient(name, param.shape, step).to(param)).sum() for name, param in trainable(model).items()]
    return torch.stack(terms).sum()


def trained(
    name: str, surroundings: Callable[[], AbstractContextManager[object]], accumulation_steps: int, device: str
) -> dict[str, Tensor]:
    """``accumulation_steps``: 0 for gradients that wait for ``step()``, otherwise updates in backward."""
    model = new_model(name, device)
    optimizer = build(name, model)
    if accumulation_steps:
        optim.attach_to_backward(model, optimizer, accumulation_steps=accumulation_steps)
    for step in range(STEPS):
        with surroundings():
            for micro_batch in range(max(1, accumulation_steps)):
                loss_of(model, 10 * step + micro_batch).backward()
            optimizer.step()
        optimizer.zero_grad()
    return {**weights(model), **states(model, optimizer)}


def check_autocast(name: str, device: str) -> None:
    for accumulation_steps, dtype in ((0, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16)):
        inside = trained(name, lambda dtype=dtype: torch.autocast(device, dtype), accumulation_steps, device)
        assert_equal(inside, trained(name, nullcontext, accumulation_steps, device))


@pytest.mark.parametrize("name", only_first_quick(optim.names(), 4))
def test_a_step_inside_autocast_is_one_outside(name: str) -> None:
    check_autocast(name, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_optimizer
def test_a_step_inside_autocast_of_a_gpu_is_one_outside(name: str) -> None:
    check_autocast(name, "cuda")


@every_optimizer
def test_a_closure_still_runs_in_the_autocast_around_the_step(name: str) -> None:
    model = new_model(name)
    optimizer = build(name, model)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [True, torch.bfloat16]


@every_optimizer
@pytest.mark.slow
def test_a_compiled_step_is_an_eager_one_and_is_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model, twin = new_model(name), new_model(name)
    optimizer, eager = build(name, model), build(name, twin)

    def train_step(scale: Tensor) -> Tensor:
        optimizer.step()
        return scale * 2

    compiled = torch.compile(optimizer.step, backend=backend)
    compiled_around = torch.compile(train_step, backend=backend)
    compiled_so_far = []
    for step in range(STEPS):
        set_gradients(model, step)
        set_gradients(twin, step)
        if step % 2:
            compiled()
        else:
            assert compiled_around(torch.ones(())) == 2
        eager.step()
        compiled_so_far.append(len(graphs))
    assert_equal({**weights(model), **states(model, optimizer)}, {**weights(twin), **states(twin, eager)})
    assert compiled_so_far[-1] == compiled_so_far[0], "later steps compile nothing"
