"""SCALE against its slow reference, and its corner cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.costs.sent import weight_traffic
from lowrank_train.optim.methods.scale import SCALE
from tests.distributed import run_distributed
from tests.optim.models import (
    MixedModel,
    gradient,
    set_gradients,
    tiny_llama,
)
from tests.optim.sharded import AllReduces, promised_bytes, shard
from tests.reference.scale import ReferenceSCALE

STEPS = 20
ROLES = ["matrix", "embedding", "head"]


def build(model: nn.Module, **arguments: Any) -> SCALE:
    return SCALE(optim.param_groups(model), **{"lr": 1e-2, "weight_decay": 0.1, **arguments})


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(gradient("initial", torch.Size(shape), 0).to(dtype))


def optimizer_of(param: nn.Parameter, role: str, **arguments: Any) -> SCALE:
    return SCALE([{"params": [("weight", param)], "role": role}], **arguments)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", [(17, 6), (6, 17), (1, 7), (7, 1)])
def test_equals_reference(role: str, shape: tuple[int, int]) -> None:
    weight = parameter(shape)
    settings: dict[str, Any] = {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.2}
    reference = ReferenceSCALE(weight.detach().numpy().copy(), role, **settings)
    optimizer = optimizer_of(weight, role, **settings)
    for step in range(STEPS):
        weight.grad = gradient("weight", weight.shape, step)
        reference.step(weight.grad.numpy())
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=0, atol=1e-12)
    if role == "head":
        np.testing.assert_allclose(optimizer.state[weight]["momentum"].numpy(), reference.m, rtol=0, atol=1e-12)
    assert optimizer.state[weight]["step"] == STEPS


@pytest.mark.parametrize("role", ROLES)
def test_gradients_of_one_size_per_output_make_it_sign_descent(role: str) -> None:
    weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    sizes = torch.tensor([1e-5, 1e-2, 1.0, 30.0])
    signs = gradient("weight", weight.shape, 0).sign()
    outputs_are_columns = role == "embedding"
    weight.grad = signs * sizes if outputs_are_columns else signs * torch.cat([sizes, sizes[:1]])[:, None]
    optimizer_of(weight, role, lr=0.5).step()
    torch.testing.assert_close(weight.detach(), -0.5 * signs, rtol=1e-12, atol=0)


def test_a_head_without_momentum_is_a_matrix() -> None:
    head, plain = parameter((6, 5)), parameter((6, 5))
    optimizers = optimizer_of(head, "head", momentum=0.0), optimizer_of(plain, "matrix")
    for step in range(5):
        for weight, optimizer in zip((head, plain), optimizers, strict=True):
            weight.grad = gradient("weight", weight.shape, step)
            optimizer.step()
    assert torch.equal(head, plain)


def test_an_embedding_is_a_transposed_matrix() -> None:
    table, plain = parameter((9, 5)), parameter((9, 5))
    plain.data = plain.data.mT.contiguous()
    optimizers = optimizer_of(table, "embedding"), optimizer_of(plain, "matrix")
    for step in range(5):
        table.grad = gradient("weight", table.shape, step)
        plain.grad = table.grad.mT.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(table.detach(), plain.detach().mT, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("role", ROLES)
def test_the_size_of_gradients_does_not_matter(role: str) -> None:
    finals = []
    for size in (1.0, 2.0**12):
        weight = parameter((6, 5))
        optimizer = optimizer_of(weight, role)
        for step in range(5):
            weight.grad = size * gradient("weight", weight.shape, step)
            optimizer.step()
        finals.append(weight.detach())
    assert torch.equal(*finals)


def test_a_convolution_is_normalized_over_all_that_feeds_an_output() -> None:
    weight = parameter((4, 3, 2, 2))
    flat = nn.Parameter(weight.detach().clone().flatten(1))
    optimizers = optimizer_of(weight, "head"), optimizer_of(flat, "head")
    for step in range(3):
        weight.grad = gradient("weight", weight.shape, step)
        flat.grad = weight.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weight.detach().flatten(1), flat.detach(), rtol=1e-14, atol=1e-15)


# ------------------------------------------------------------------------------------------------------- hard gradients


def test_an_output_without_gradient_stays_where_it_is() -> None:
    """A padding row of a head, say."""
    weight = parameter((6, 5))
    before = weight.detach().clone()
    weight.grad = gradient("weight", weight.shape, 0)
    weight.grad[2] = 0
    optimizer_of(weight, "head").step()
    assert torch.equal(weight[2], before[2])
    assert weight.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("tied", [False, True])
def test_state_is_the_average_of_an_untied_head_and_moments_of_vectors(tied: bool) -> None:
    model = tiny_llama(tied=tied).bfloat16()
    optimizer = build(model)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    head = 0 if tied else 29 * 8
    assert optim.state_bytes(optimizer) == 2 * head + 2 * 2 * vectors + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_a_momentum_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum={value} for '.*weight'; expected a number in \[0, 1\)"):
        build(MixedModel(), momentum=value)


def test_a_shape_without_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' has role 'embedding' and shape \(7,\); expected two dimensions"):
        optimizer_of(parameter((7,)), "embedding")


# -------------------------------------------------------------------------------------------------------------- sharded


def test_as_it_prefers_one_all_reduce_of_an_embedding_and_as_traffic_promises() -> None:
    def worker() -> tuple[list[int], int]:
        model = MixedModel()
        shard(model, SCALE, "preferred")
        optimizer = build(model)
        set_gradients(model, 0)
        with AllReduces() as reduces:
            optimizer.step()
        promised = [
            weight_traffic(optimizer, param, group, 2).step_bytes
            for group in optimizer.param_groups
            for param in group["params"]
            if group["role"] in SCALE.updates
        ]
        return reduces.bytes, sum(promised)

    assert run_distributed(worker, 2) == [([4 * 8], 4 * 8)] * 2
    optimizer = optimizer_of(parameter((3, 3)), "embedding")
    assert promised_bytes(optimizer, (99, 7), 8, role="embedding") == 4 * 7
    assert promised_bytes(optimizer, (99, 7), 1, role="embedding") == 0
    assert promised_bytes(optimizer, (99, 7), 8, role="head") == 0
