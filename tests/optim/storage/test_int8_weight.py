"""Matrices kept in int8: what is stored, what a step changes, FSDP2 on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lowrank_train import optim
from lowrank_train.optim.shards.layout import local
from lowrank_train.optim.storage.int8_weight import BLOCK, Int8Weight, held_bytes
from lowrank_train.optim.storage.rounding import seed_of, store
from tests.distributed import run_distributed

WIDTHS = (128, 200, 384)


def magnitudes(value: Tensor) -> Tensor:
    return torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) for block in value.split(BLOCK, 1)], 1)


@pytest.mark.parametrize("columns", WIDTHS)
def test_numbers_are_kept_to_half_a_code(columns: int) -> None:
    torch.manual_seed(0)
    value = torch.randn(10, columns) * torch.logspace(-3, 3, 10).unsqueeze(1)
    kept = Int8Weight.of(value)
    assert (kept.shape, kept.dtype) == (value.shape, torch.bfloat16)
    assert ((kept.wide(torch.float32) - value).abs() <= 0.5 * 9 / 8 * magnitudes(value) / 127 * 1.001).all()
    assert held_bytes(kept) == 10 * (columns + 4 * -(-columns // 128))


def test_zeros_stay_zeros_and_blocks_do_not_touch_each_other() -> None:
    value = torch.randn(4, 300)
    value[1] = 0
    value[:, 128:256] = 0
    kept = Int8Weight.of(value)
    assert not kept.wide(torch.float32)[1].any()
    assert not kept.wide(torch.float32)[:, 128:256].any()
    before = kept.wide(torch.float32)
    value[2, 128:256] = 1e6
    after = kept.write(value).wide(torch.float32)
    after[2, 128:256] = 0
    assert after.equal(before)


def test_what_does_not_change_keeps_its_code_while_others_move() -> None:
    torch.manual_seed(0)
    kept = Int8Weight.of(torch.randn(64, 256))
    start = kept.wide(torch.float32)
    for time in range(50):
        value = kept.wide(torch.float32)
        value[:, 0] += 1e-3  # a fiftieth of a code
        store(kept, value, seed_of("w", torch.tensor(time)))
    end = kept.wide(torch.float32)
    assert end[:, 1:].equal(start[:, 1:])
    assert (end[:, 0] - start[:, 0]).mean().item() == pytest.approx(0.05, rel=0.2)


def test_a_scale_follows_numbers_that_outgrow_it_or_shrink_far_below() -> None:
    value = torch.ones(2, 128)
    kept = Int8Weight.of(value)
    scale = kept.scale.clone()
    kept.write(value * 1.1)  # within the margin
    assert kept.scale.equal(scale)
    kept.write(value * 0.3)
    assert kept.scale.equal(scale)
    for factor in (1.2, 1e3, 1e-3):
        kept.write(value * factor)
        torch.testing.assert_close(kept.wide(torch.float32), value * factor, rtol=0.01, atol=0)
        assert not kept.scale.equal(scale)


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_every_optimizer_trains_them(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 160, bias=False), nn.Tanh(), nn.Linear(160, 32, bias=False)).bfloat16()
    teacher = torch.randn(64, 32) / 8
    optim.keep_in_int8(model, ["0.weight", "2.weight"])
    optimizer = optim.create(name, model, lr=3e-3, weight_decay=0.0, stochastic_rounding=True)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 64)
        weights = [nn.Parameter(layer.weight.wide(torch.float32)) for layer in (model[0], model[2])]
        loss = (torch.tanh(x @ weights[0].mT) @ weights[1].mT - x @ teacher).square().mean()
        loss.backward()
        for layer, weight in zip((model[0], model[2]), weights, strict=True):
            layer.weight.grad = weight.grad.bfloat16()
        optimizer.step()
        losses.append(loss.item())
    assert isinstance(model[0].weight, Int8Weight)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def sharded_model(world_size: int) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(200, 96, bias=False), nn.Tanh(), nn.Linear(96, 40)).bfloat16()
    optim.keep_in_int8(model, ["0.weight", "2.weight"])
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    model.to_empty(device="cpu")
    for i, param in enumerate(model.parameters()):
        assert isinstance(param, DTensor)
        value = torch.randn(param.shape, generator=torch.Generator().manual_seed(i)) / 10
        start = world_rank() * (param.shape[0] // world_size)
        with torch.no_grad():
            local(param).copy_(value[start : start + param.shape[0] // world_size])
    return model


def world_rank() -> int:
    return torch.distributed.get_rank()


def trained(world_size: int, name: str = "adamw") -> dict[str, Tensor]:
    model = sharded_model(world_size)
    optimizer = optim.create(name, model, lr=1e-2, stochastic_rounding=True)
    for step in range(4):
        for key, param in model.named_parameters():
            value = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(key) + step))
            rows = param.shape[0] // world_size
            start = world_rank() * rows
            param.grad = DTensor.from_local(value[start : start + rows].bfloat16(), param.device_mesh, [Shard(0)])
        optimizer.step()
    found = {}
    for key, param in model.named_parameters():
        kept: Any = local(param)
        parts = {"codes": kept.codes, "scale": kept.scale} if isinstance(kept, Int8Weight) else {"": kept}
        for part, value in parts.items():
            found[f"{key}.{part}"] = DTensor.from_local(value.detach(), param.device_mesh, [Shard(0)]).full_tensor()
    with torch.no_grad():
        found["output"] = model(torch.ones(1, 200, dtype=torch.bfloat16))
    return found


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_ranks_store_what_one_process_does(name: str) -> None:
    expected = run_distributed(trained, 1, 1, name)[0]
    for found in run_distributed(trained, 2, 2, name):
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            if value.dtype == torch.int8:
                assert (found[key] != value).float().mean() < 0.01, key  # sums over ranks are ordered otherwise
            else:
                torch.testing.assert_close(found[key], value, rtol=0.02, atol=0.02)


def test_gradients_are_those_of_the_matrix_that_is_stored() -> None:
    def worker() -> None:
        model = sharded_model(2)
        x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
        for _ in range(2):  # the second time its memory is filled anew
            model.zero_grad()
            model(x).float().square().sum().backward()
        whole = [DTensor.from_local(local(p).wide(torch.float32), p.device_mesh, [Shard(0)]).full_tensor()
                 for p in (model[0].weight, model[2].weight)]  # fmt: skip
        first, second = (nn.Parameter(value.bfloat16()) for value in whole)
        bias = nn.Parameter(model[2].bias.full_tensor().detach())
        out = nn.functional.linear(torch.tanh(nn.functional.linear(x, first)), second, bias)
        out.float().square().sum().backward()
        for param, expected in ((model[0].weight, first), (model[2].weight, second)):
            got = param.grad.full_tensor()
            torch.testing.assert_close(got, expected.grad, rtol=0.02, atol=0.02 * float(expected.grad.abs().max()))

    run_distributed(worker, 2)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_only_matrices_are_kept_in_int8() -> None:
    with pytest.raises(ValueError, match=r"'bias' has shape \(4,\); expected a matrix"):
        optim.keep_in_int8(nn.Linear(3, 4), ["bias"])


def test_arithmetic_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"aten\.add.*weight\.wide"):
        Int8Weight.of(torch.ones(2, 128)) + 1


def test_columns_and_uneven_rows_are_refused() -> None:
    def columns() -> None:
        with torch.device("meta"):
            model = nn.Linear(128, 4, bias=False)
        optim.keep_in_int8(model, ["weight"])
        with pytest.raises(ValueError, match="rows stay whole"):
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(1))

    def uneven() -> None:
        with torch.device("meta"):
            model = nn.Linear(128, 5, bias=False)
        optim.keep_in_int8(model, ["weight"])
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match=r"shape \(5, 128\) kept in int8 does not shard evenly over 2 ranks"):
            model(torch.ones(1, 128))

    run_distributed(columns, 2)
    run_distributed(uneven, 2)
