"""Weights in bfloat16 rounded stochastically, and state in host memory: for every optimizer, on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.core.update import Update
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.storage.rounding import round_to_bfloat16, seed_of, store, uniform_bits
from tests.distributed import run_distributed
from tests.optim.models import (
    MixedModel,
    assert_equal,
    build,
    prepare,
    run_steps,
    set_gradients,
    states,
    tolerance,
    weights,
)
from tests.optim.sharded import shard

STEPS = 8
OFFLOADING = [name for name in optim.names() if not optim.find(name).works_between_steps]


def bits(rows: int, columns: int, time: int = 0) -> Tensor:
    return uniform_bits(rows, columns, origin=(0, 0), width=columns, seed=seed_of("weight", torch.tensor(time)))


# ------------------------------------------------------------------------------------------------------------ rounding


def test_the_expected_value_is_the_number_itself() -> None:
    between = torch.full((1000, 1000), 1 + 0.3 * 2**-7)  # neighbours: 1 and 1 + 2^-7
    rounded = round_to_bfloat16(between, bits(1000, 1000)).double()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert ((rounded.mean() - 1) * 2**7).item() == pytest.approx(0.3, abs=0.003)
    assert round_to_bfloat16(-between, bits(1000, 1000)).double().neg().equal(rounded)


def test_what_can_be_stored_stays_and_what_is_not_finite_too() -> None:
    value = torch.tensor([[1.5, -2.0, 0.0, float("inf"), float("-inf"), float("nan")]] * 50)
    rounded = round_to_bfloat16(value, bits(50, 6)).float()
    torch.testing.assert_close(rounded, value, rtol=0, atol=0, equal_nan=True)


def test_noise_of_other_places_times_and_names_is_unrelated() -> None:
    noise = bits(500, 500).double()
    others = [bits(500, 500, time=1).double(), bits(500, 501)[:, 1:].double()]
    others.append(uniform_bits(500, 500, origin=(0, 0), width=500, seed=seed_of("bias", torch.tensor(0))).double())
    for other in others:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_a_small_update_is_lost_to_the_nearest_and_kept_on_average() -> None:
    def trained(stochastic: bool) -> float:
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        settings = {"stochastic_rounding": stochastic, "role": "vector"}
        optimizer = optim.AdamW([{"params": [weight], **settings}], lr=1e-3, weight_decay=0.0)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.float().mean().item()

    assert trained(False) == 1.0  # each step is a quarter of the gap below 1
    assert trained(True) == pytest.approx(1 - 40e-3, abs=2e-3)


def test_a_block_is_rounded_as_its_part_of_the_whole() -> None:
    value, seed = torch.randn(40, 30), seed_of("weight", torch.tensor(5))
    whole, parts = (torch.empty(40, 30, dtype=torch.bfloat16) for _ in range(2))
    store(whole, value, seed)
    for rows in (slice(0, 13), slice(13, 40)):
        store(parts, value[rows], seed, rows)
    assert whole.equal(parts)


# ------------------------------------------------------------------------------------------------------ every optimizer


def made(name: str, dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(0)
    model = prepare(name, MixedModel(dtype))
    return model, build(name, model, **settings)


def trained(name: str, dtype: torch.dtype, **settings: Any) -> dict[str, Tensor]:
    model, optimizer = made(name, dtype, **settings)
    run_steps(model, optimizer, 0, STEPS)
    return {**weights(model), **states(model, optimizer)}


@pytest.mark.parametrize("name", OFFLOADING)
def test_offloaded_state_changes_nothing(name: str) -> None:
    assert_equal(trained(name, torch.float64, offload_state=True), trained(name, torch.float64), 0)


@pytest.mark.parametrize("name", OFFLOADING)
def test_what_a_step_works_on_is_a_copy_and_what_is_kept_stays_where_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(name, torch.float64, offload_state=True)
    places = {key: t.data_ptr() for s in optimizer.state.values() for key, t in s.items() if key != "step"}
    seen: list[int] = []
    for cls in {type(optimizer.update_of(group)) for group in optimizer.param_groups}:

        def step(self: Update, slots: list[Slot], step: Callable[[Update, list[Slot]], None] = cls.step) -> None:
            seen.extend(t.data_ptr() for slot in slots for t in slot.state.values() if t.numel() > 1)
            step(self, slots)

        monkeypatch.setattr(cls, "step", step)
    run_steps(model, optimizer, 0, STEPS)
    assert {key: t.data_ptr() for s in optimizer.state.values() for key, t in s.items() if key != "step"} == places
    on_device = {
        optimizer.state[slot.param][key].data_ptr()
        for slot in optimizer.slots()
        for key, spec in optimizer.state_layout(slot.name, slot.param, slot.group).items()
        if spec.layout != "host" and optimizer.state[slot.param][key].numel() > 1
    }
    assert not on_device.intersection(seen)


@pytest.mark.parametrize("name", [name for name in optim.names() if optim.find(name).layers != "points"])
def test_bfloat16_weights_follow_those_in_float32(name: str) -> None:
    """Step by step, from the same point: within a gap of bfloat16, and right on average."""
    alike = {"score": "uniform"} if name == "welore_adamw" else {}  # ranks of rounded weights may be others
    model, optimizer = made(name, torch.bfloat16, stochastic_rounding=True, **alike)
    exact_model, exact = made(name, torch.float32, **alike)
    for param, twin in zip(model.parameters(), exact_model.parameters(), strict=True):
        twin.data.copy_(param.data)
    set_gradients(model, 0)
    for param, twin in zip(model.parameters(), exact_model.parameters(), strict=True):
        twin.grad = None if param.grad is None else param.grad.float()
    optimizer.step()
    exact.step()
    for (key, param), twin in zip(model.named_parameters(), exact_model.parameters(), strict=True):
        gap = torch.maximum(twin.abs(), torch.tensor(1e-6)) * 2**-7
        excess = ((param.float() - twin).abs() - 1.01 * gap).max() / twin.abs().max()
        # its basis is kept in bfloat16, and a row nearly orthogonal to it is scaled by |u| / |g|
        assert excess <= (0.1 if name == "fira" else 1e-3), f"{key}: {excess:.1e} of the largest"


@pytest.mark.parametrize("name", optim.names())
def test_a_run_with_stochastic_rounding_resumes_bit_for_bit(name: str) -> None:
    whole = trained(name, torch.bfloat16, stochastic_rounding=True)
    model, optimizer = made(name, torch.bfloat16, stochastic_rounding=True)
    run_steps(model, optimizer, 0, 4)
    again, loaded = made(name, torch.bfloat16, stochastic_rounding=True)
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_steps(again, loaded, 4, STEPS)
    assert_equal({**weights(again), **states(again, loaded)}, whole, 0)


def sharded_training(name: str, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Tensor]:
    def prepared(model: nn.Module) -> None:
        shard(model, optim.find(name), "rows")

    torch.manual_seed(0)
    model = prepare(name, MixedModel(dtype))
    prepared(model)
    optimizer = build(name, model, **settings)
    run_steps(model, optimizer, 0, STEPS)
    return {**weights(model), **states(model, optimizer)}


def test_noise_does_not_depend_on_the_ranks() -> None:
    settings = {"stochastic_rounding": True}
    alone = trained("adamw", torch.bfloat16, **settings)
    for found in run_distributed(lambda: sharded_training("adamw", torch.bfloat16, settings), world_size=3):
        assert_equal(found, alone, 0)


@pytest.mark.slow
def test_offloaded_state_is_sharded_too() -> None:
    def worker() -> dict[str, dict[str, Tensor]]:
        return {name: sharded_training(name, torch.float64, {"offload_state": True}) for name in OFFLOADING}

    for found in run_distributed(worker, world_size=2):
        for name in OFFLOADING:
            assert_equal(found[name], trained(name, torch.float64), tolerance(name))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("settings", [{"offload_state": True}, {"stochastic_rounding": True}])
def test_updates_in_backward_use_copies_too(settings: dict[str, bool], accumulation_steps: int) -> None:
    dtype = torch.bfloat16 if "stochastic_rounding" in settings else torch.float64

    def train(fused: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 4, dtype=dtype))
        optimizer = optim.create("dct_adamw", model, lr=1e-2, rank=3, refresh_interval=2, **settings)
        if fused:
            optim.attach_to_backward(model, optimizer, accumulation_steps=accumulation_steps)
        torch.manual_seed(1)
        for _ in range(4):
            for _ in range(accumulation_steps):
                model(torch.randn(16, 8, dtype=dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.named_parameters())

    fused, ordinary = train(True), train(False)
    if dtype == torch.float64:
        if accumulation_steps == 1:
            assert_equal(fused, ordinary, 1e-12)
        return
    for key, weight in fused.items():
        assert (weight - ordinary[key]).abs().max() < 0.1
        assert weight.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("key", ["stochastic_rounding", "offload_state"])
def test_shared_settings_are_true_or_false(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}='yes'; expected True or False"):
        optim.create("adamw", nn.Linear(3, 3), **{key: "yes"})


@pytest.mark.parametrize("name", [name for name in optim.names() if optim.find(name).works_between_steps])
def test_an_optimizer_that_cannot_offload_says_so(name: str) -> None:
    model = prepare(name, MixedModel())
    with pytest.raises(ValueError, match=r"offload_state=True for parameters with role .*; leave it as it is"):
        build(name, model, offload_state=True)


def test_settings_of_all_groups() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    groups = optim.param_groups(model, rules={"1.weight": {"offload_state": False}}, offload_state=True)
    assert {group["offload_state"] for group in groups if group["params"][0][0] != "1.weight"} == {True}
    assert next(group for group in groups if group["params"][0][0] == "1.weight")["offload_state"] is False
