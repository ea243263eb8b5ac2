"""State: one table of all registered optimizers times what must hold for each."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.parameters.group_checks import ROLES
from tests.optim.models import (
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    build,
    gradient,
    plain_weights,
    prepare,
    run_steps,
    states,
    weights,
)

every_optimizer = pytest.mark.parametrize("name", optim.names())
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

STEPS = 2 * REFRESH_INTERVAL + 1
MOMENTS = [0, REFRESH_INTERVAL - 2, REFRESH_INTERVAL]
RESUMED = [
    (name, dtype, MOMENTS[(i + j) % 3]) for i, name in enumerate(optim.names()) for j, dtype in enumerate(DTYPES)
]
"""Every optimizer meets every dtype and every moment; all pairs of a dtype and a moment occur."""

LAYER_ROLES = set(ROLES) - {"matrix", "embedding", "head", "vector"}


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_optimizer
def test_state_is_allocated_at_construction_as_tensors(name: str) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    assert set(optimizer.state) == set(model.parameters())
    for param, state in optimizer.state.items():
        assert ("step" in state) == param.requires_grad
        assert param.requires_grad or not state, "what is frozen has none"
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert not any(value.any() for value in state.values())
    before = states(model, optimizer)
    run_steps(model, optimizer, 0, 2)
    assert states(model, optimizer).keys() == before.keys(), "a step must not add state"


@pytest.mark.parametrize(("name", "dtype", "saved_at"), RESUMED)
def test_resuming_is_bit_exact(name: str, dtype: torch.dtype, saved_at: int) -> None:
    model = prepare(name, MixedModel(dtype))
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, saved_at)
    saved_optimizer, saved_model = through_a_file(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    saved_state = states(model, optimizer)
    run_steps(model, optimizer, saved_at, STEPS)

    torch.manual_seed(1)
    resumed_model = prepare(name, MixedModel(dtype))
    resumed_model.load_state_dict(saved_model)
    resumed = build(name, resumed_model, lr=123.0)  # the checkpoint's lr wins
    resumed.load_state_dict(saved_optimizer)
    assert_equal(states(resumed_model, resumed), saved_state)
    run_steps(resumed_model, resumed, saved_at, STEPS)
    assert_equal(weights(resumed_model), weights(model))
    assert_equal(states(resumed_model, resumed), states(model, optimizer))


@every_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike_and_apart(name: str, duplicate: Any) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, 4)
    twin_model, twin = duplicate((model, optimizer))
    before = weights(twin_model)
    run_steps(model, optimizer, 4, STEPS)
    assert_equal(weights(twin_model), before)
    run_steps(twin_model, twin, 4, STEPS)
    assert_equal(weights(twin_model), weights(model))
    assert_equal(states(twin_model, twin), states(model, optimizer))


@every_optimizer
def test_loading_does_not_alias_the_saved_tensors(name: str) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    held = {value.untyped_storage().data_ptr() for s in optimizer.state.values() for value in s.values()}
    assert not held & {value.untyped_storage().data_ptr() for s in saved["state"].values() for value in s.values()}
    run_steps(model, optimizer, 3, 6)
    for i, state in saved["state"].items():
        assert_equal(state, untouched["state"][i])


def test_integers_survive_a_bfloat16_model() -> None:
    """torch's own loading casts them to the dtype of the parameter, where 257 and 4095 do not exist."""
    model = nn.Linear(260, 300, bias=False, dtype=torch.bfloat16)
    optimizer = optim.create("dct_adamw", model, rank=4)
    saved = copy.deepcopy(optimizer.state_dict())
    index = torch.tensor([1, 255, 257, 259], dtype=torch.int32)
    age = torch.tensor([4095, 257, 2, 1001], dtype=torch.int32)
    saved["state"][0]["basis_index"], saved["state"][0]["column_age"] = index.clone(), age.clone()
    saved["state"][0]["step"] = torch.tensor(4095.0)
    optimizer.load_state_dict(through_a_file(saved))
    state = optimizer.state[model.weight]
    assert torch.equal(state["basis_index"], index)
    assert torch.equal(state["column_age"], age)
    assert state["step"] == 4095
    assert (state["basis_index"].dtype, state["step"].dtype) == (torch.int32, torch.float32)


@every_optimizer
def test_a_state_dict_without_state_is_loaded_as_hyperparameters_only(name: str) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, 3)
    before = states(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {}
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert_equal(states(model, optimizer), before)


def test_a_checkpoint_of_another_rank_is_refused_and_changes_nothing() -> None:
    model = nn.Linear(8, 12, bias=False, dtype=torch.float64)
    saved = optim.create("dct_adamw", model, rank=2).state_dict()
    optimizer = optim.create("dct_adamw", model, rank=3)
    run_steps(model, optimizer, 0, 3)
    before = states(model, optimizer)
    with pytest.raises(
        ValueError, match=r"'exp_avg' of 'weight' has shape \(12, 2\); expected \(12, 3\).*another rank"
    ):
        optimizer.load_state_dict(saved)
    assert_equal(states(model, optimizer), before)
    assert optimizer.param_groups[0]["rank"] == 3
    run_steps(model, optimizer, 3, 6)


@pytest.mark.parametrize(("written", "read"), [("adamw", "dct_adamw"), ("dct_adamw", "adamw")])
def test_a_checkpoint_of_another_optimizer_is_refused(written: str, read: str) -> None:
    saved = build(written, MixedModel()).state_dict()
    with pytest.raises(ValueError, match=r"'matrix_1x8\.weight' has .*it was written by another optimizer or basis"):
        build(read, MixedModel()).load_state_dict(saved)


@every_optimizer
def test_a_checkpoint_of_another_number_of_parameters_is_refused(name: str) -> None:
    saved = build(name, prepare(name, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        build(name, prepare(name, nn.Sequential(nn.Linear(4, 4)))).load_state_dict(saved)


@every_optimizer
def test_changes_of_lr_in_the_groups_are_honoured(name: str) -> None:
    """Converted layers exchange factors at any rate (step 2 ends with a draw); the matrix they stand for stays."""
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    rounding = 0.0 if optim.find(name).layers is None else 1e-14
    run_steps(model, optimizer, 0, 2)
    before = plain_weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run_steps(model, optimizer, 2, 4)
    assert_equal(plain_weights(model), before, rounding)
    optimizer.param_groups[0]["lr"] = 1e-3
    run_steps(model, optimizer, 4, 5)
    moved = {key for key, value in plain_weights(model).items() if (value - before[key]).abs().max() > rounding}
    assert moved == set(optimizer.param_groups[0]["param_names"])


@every_optimizer
def test_a_group_added_later_is_updated_as_one_given_at_once(name: str) -> None:
    model, twin = prepare(name, MixedModel()), prepare(name, MixedModel())
    twin.load_state_dict(model.state_dict())
    groups = optim.param_groups(model)
    # a method is given all the layers that it trains at once
    first = groups[:1] if optim.find(name).layers is None else [g for g in groups if g["role"] in LAYER_ROLES]
    optimizer = optim.create(name, first, lr=1e-2)
    for group in groups:
        if not any(group is given for given in first):
            optimizer.add_param_group(group)
    run_steps(model, optimizer, 0, 3)
    run_steps(twin, optim.create(name, twin, lr=1e-2), 0, 3)
    assert_equal(weights(model), weights(twin))


@every_optimizer
def test_a_refused_group_leaves_the_optimizer_as_it_was(name: str) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, 2)
    good, bad = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="'bad' has role 'matrix' and shape"):
        optimizer.add_param_group({"params": [("good", good), ("bad", bad)], "role": "matrix"})
    if "rank" in optimizer.defaults:
        small = nn.Parameter(torch.ones(3, 3))
        with pytest.raises(ValueError, match="rank=5 exceeds"):
            optimizer.add_param_group({"params": [("good", good), ("small", small)], "role": "matrix", "rank": 5})
    assert set(optimizer.state) == set(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": [("good", good)], "role": "matrix"})
    good.grad = gradient("good", good.shape, 0).float()
    run_steps(model, optimizer, 2, 4)
    assert (good != 1).any()
