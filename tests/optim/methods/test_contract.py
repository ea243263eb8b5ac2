"""What every ``torch.optim.Optimizer`` owes its user, for every optimizer of this package.

What is refused instead is listed in docs/swap.md, "As torch's own optimizers".
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lowrank_train import optim
from tests.optim.models import (
    MixedModel,
    assert_equal,
    beside_layers,
    build,
    prepare,
    run_steps,
    set_gradients,
    states,
    trainable,
    weights,
)

every_optimizer = pytest.mark.parametrize("name", optim.names())


def made(name: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(0)
    model = prepare(name, MixedModel(dtype))
    return model, build(name, model, **arguments)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


# --------------------------------------------------------------------------------------------------------- state dicts


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@every_optimizer
@pytest.mark.parametrize(
    "carried", [through_a_file, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)), lambda state: state]
)
def test_a_state_dict_continues_training_however_it_came(name: str, carried: Callable[[Any], Any]) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 4)
    twin, other = made(name, lr=0.5)
    saved = carried(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    other.load_state_dict(saved)  # again changes nothing
    run_steps(model, optimizer, 4, 7)
    run_steps(twin, other, 4, 7)
    assert_equal(everything(twin, other), everything(model, optimizer))


@every_optimizer
def test_a_state_dict_is_that_of_torch(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 1)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    assert ids == list(range(len(ids)))
    assert set(saved["state"]) <= set(ids)
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        assert group.keys() == own.keys()
        assert all(isinstance(value, int | float | str | bool | tuple | list | None) for value in group.values())
    assert repr(optimizer).count("Parameter Group") == len(optimizer.param_groups)


# --------------------------------------------------------------------------------------------------------------- hooks


@every_optimizer
def test_hooks_around_steps_and_state_dicts_are_called_and_removed(name: str) -> None:
    model, optimizer = made(name)
    calls: list[str] = []

    def noted(what: str, returned: Any = None) -> Callable[..., Any]:
        def hook(*arguments: Any) -> Any:
            assert arguments[0] is optimizer
            calls.append(what)
            return returned

        return hook

    handles = [
        optimizer.register_step_pre_hook(noted("before step")),
        optimizer.register_step_post_hook(noted("after step")),
        optimizer.register_state_dict_pre_hook(noted("before saving")),
        optimizer.register_state_dict_post_hook(noted("after saving")),
        optimizer.register_load_state_dict_pre_hook(noted("before loading")),
        optimizer.register_load_state_dict_post_hook(noted("after loading")),
    ]
    run_steps(model, optimizer, 0, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    expected = ["before step", "after step", "before saving", "after saving", "before loading", "after loading"]
    assert calls == expected
    for handle in handles:
        handle.remove()
    run_steps(model, optimizer, 1, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == expected


@every_optimizer
def test_hooks_may_change_what_is_saved_and_loaded(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    before = states(model, optimizer)

    def saving(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "note": "mine"}

    def loading(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["note"] == "mine"
        empty = {i: {key: torch.zeros_like(value) for key, value in s.items()} for i, s in state["state"].items()}
        return {"state": empty, "param_groups": state["param_groups"]}

    seen = []
    optimizer.register_state_dict_post_hook(saving)
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(states(model, loaded)))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["note"] == "mine", "what was handed in is left as it was"
    assert_equal(seen[0], {key: torch.zeros_like(value) for key, value in before.items()})


@every_optimizer
def test_a_hook_before_the_step_may_change_gradients(name: str) -> None:
    model, optimizer = made(name)
    twin, other = made(name)
    optimizer.register_step_pre_hook(lambda *_: set_gradients(model, 1))
    set_gradients(model, 0)
    optimizer.step()
    set_gradients(twin, 1)
    other.step()
    assert_equal(everything(model, optimizer), everything(twin, other))


# ---------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.StepLR(optimizer, 2)]
    ),
}


@every_optimizer
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_drive_a_rate_and_go_on_after_resuming(name: str, scheduler: str, tensor: bool) -> None:
    def lr() -> Any:
        return torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01

    torch.manual_seed(0)
    linear = nn.Linear(6, 8, dtype=torch.float64)
    model = prepare(name, nn.Sequential(linear))
    optimizer = build(name, model, lr=lr())
    schedule = SCHEDULERS[scheduler](optimizer)
    measure = [1.0] if scheduler == "ReduceLROnPlateau" else []
    rates = []
    for step in range(3):
        run_steps(model, optimizer, step, step + 1)
        schedule.step(*measure)
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    assert len({own[0] for own in rates}) > 1
    assert all(isinstance(group["lr"], Tensor) == tensor for group in optimizer.param_groups)
    twin = copy.deepcopy(model)
    other = build(name, optim.param_groups(twin), lr=lr())
    schedule_of_other = SCHEDULERS[scheduler](other)
    schedule_of_other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for step in range(3, 5):
        run_steps(model, optimizer, step, step + 1)
        run_steps(twin, other, step, step + 1)
        schedule.step(*measure)
        schedule_of_other.step(*measure)
    assert_equal(weights(twin), weights(model))


# ----------------------------------------------------------------------------------------------------------- gradients


@every_optimizer
def test_a_step_without_any_gradient_changes_no_weight(name: str) -> None:
    model, optimizer = made(name)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert optimizer.step() is None
        optimizer.zero_grad()
        assert optimizer.step() is None
    assert_equal(weights(model), before)
    run_steps(model, optimizer, 0, 1)
    assert not torch.equal(weights(model)["embedding.weight"], before["embedding.weight"])


@every_optimizer
def test_gradients_are_set_to_none_or_to_zero(name: str) -> None:
    model, optimizer = made(name)
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in trainable(model).values() if param.grad is not None)
    assert all(param.grad is not None for param in trainable(model).values())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


@every_optimizer
def test_steps_are_counted_by_parameter(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 3)
    for state in optimizer.state.values():
        assert not state or (state["step"].item() == 3 and state["step"].dtype == torch.float32)


# -------------------------------------------------------------------------------------------------------------- groups


@every_optimizer
def test_groups_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"empty parameter list"):
        optim.create(name, [])
    param = nn.Parameter(torch.ones(4, 4))
    for params in ([("w", param)], [("w", param)]), ([("w", param), ("w2", param)],):
        groups = beside_layers(name, [{"params": each, "role": "vector"} for each in params])
        with pytest.raises(ValueError, match=r"duplicate|more than one parameter group"):
            optim.create(name, groups)
    with pytest.raises(ValueError, match=r"can't optimize a non-leaf"):
        optim.create(name, beside_layers(name, [{"params": [("w", param * 2)], "role": "vector"}]))
    with pytest.raises(TypeError, match=r"optimizer can only optimize Tensors"):
        optim.create(name, beside_layers(name, [{"params": [("w", 3)], "role": "vector"}]))
    _, optimizer = made(name)
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([param])  # type: ignore[arg-type]


@every_optimizer
def test_settings_of_a_group_are_its_own_and_others_the_defaults(name: str) -> None:
    torch.manual_seed(0)
    model = prepare(name, MixedModel())
    groups = optim.param_groups(model, rules={"norm": {"lr": 0.0, "betas": (0.5, 0.5), "mine": "kept"}})
    optimizer = build(name, groups)
    own = next(group for group in optimizer.param_groups if "norm.weight" in group["param_names"])
    other = next(group for group in optimizer.param_groups if "embedding.weight" in group["param_names"])
    assert (own["lr"], own["betas"], own["mine"]) == (0.0, (0.5, 0.5), "kept")
    assert (other["lr"], other["betas"]) == (1e-2, (0.9, 0.999)) or other["betas"] != (0.5, 0.5)
    before = weights(model)
    run_steps(model, optimizer, 0, 1)
    after = weights(model)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert not torch.equal(after["embedding.weight"], before["embedding.weight"])
    saved = through_a_file(optimizer.state_dict())["param_groups"]
    assert [group["mine"] for group in saved if "norm.weight" in group["param_names"]] == ["kept"]


@every_optimizer
def test_copies_of_model_and_optimizer_forget_nothing_a_step_needs(name: str) -> None:
    model, optimizer = made(name, maximize=True)
    run_steps(model, optimizer, 0, 2)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = duplicate((model, optimizer))
        assert type(other) is type(optimizer)
        assert other.defaults.items() >= optimizer.defaults.items()
        other.load_state_dict(optimizer.state_dict())
        late = nn.Parameter(torch.ones(3, dtype=torch.float64))
        other.add_param_group({"params": [("late", late)], "role": "vector"})
        late.grad = torch.ones(3, dtype=torch.float64)
        run_steps(twin, other, 2, 3)
        assert (late > 1).all(), "the group maximises, as the others"
