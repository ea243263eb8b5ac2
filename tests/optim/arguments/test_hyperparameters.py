"""Arguments as torch's users write them: flags, numpy's scalars, tensors as rates, schedulers that cycle momentum."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from tests.optim.models import (
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    beside_layers,
    build,
    gradient,
    prepare,
    run_steps,
    set_gradients,
    states,
    trainable,
    weights,
)

every_optimizer = pytest.mark.parametrize("name", optim.names())
FLAGS = ("foreach", "fused", "maximize", "amsgrad", "differentiable", "capturable")
STEPS = REFRESH_INTERVAL + 2


def made(name: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(0)
    model = prepare(name, MixedModel(dtype))
    return model, build(name, model, **arguments)


@every_optimizer
def test_flags_of_torch_that_are_off_change_nothing(name: str) -> None:
    model, optimizer = made(name)
    twin, other = made(name, **dict.fromkeys(FLAGS, False))
    optim.find(name)(optim.param_groups(prepare(name, MixedModel())), foreach=None, fused=False, capturable=False)
    optim.predicted_state_bytes(name, optim.param_groups(prepare(name, MixedModel())), fused=False)
    optim.check_arguments(name, FLAGS)
    run_steps(model, optimizer, 0, 2)
    run_steps(twin, other, 0, 2)
    assert_equal(weights(twin), weights(model))


@every_optimizer
@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != "maximize"])
def test_flags_of_torch_that_are_on_are_refused_with_the_reason(name: str, flag: str) -> None:
    if flag == "amsgrad" and name == "riemannian_adamw":
        made(name, amsgrad=True)
        return
    with pytest.raises(ValueError, match=rf"{flag}=True for {optim.find(name).__name__}; expected False: \w+"):
        made(name, **{flag: True})
    if flag != "amsgrad":
        groups = optim.param_groups(prepare(name, MixedModel()))
        with pytest.raises(ValueError, match=rf"{flag}=True for parameter group 0"):
            build(name, [{**group, flag: True} for group in groups])


@pytest.mark.parametrize(("name", "accumulation_steps"), [(name, i % 3) for i, name in enumerate(optim.names())])
def test_maximize_is_descent_along_the_gradient_turned_round(name: str, accumulation_steps: int) -> None:
    finals = []
    for sign, settings in ((1.0, {"maximize": True}), (-1.0, {})):
        model, optimizer = made(name, **settings)
        if accumulation_steps:
            clip = {"max_norm": 3.0, "clip": "parameter"}
            optim.attach_to_backward(model, optimizer, accumulation_steps=accumulation_steps, **clip)
        for step in range(STEPS):
            for micro_batch in range(max(1, accumulation_steps)):
                terms = [
                    (param * gradient(key, param.shape, 10 * step + micro_batch)).sum()
                    for key, param in trainable(model).items()
                ]
                (sign * torch.stack(terms).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append({**weights(model), **states(model, optimizer)})
    assert_equal(*finals)


@every_optimizer
def test_maximize_of_one_group_is_saved_with_it(name: str) -> None:
    model, optimizer = made(name, maximize=True)
    assert all(group["maximize"] for group in optimizer.state_dict()["param_groups"])
    twin, other = made(name)
    other.load_state_dict(optimizer.state_dict())
    run_steps(model, optimizer, 0, 2)
    run_steps(twin, other, 0, 2)
    assert_equal(weights(twin), weights(model))
    with pytest.raises(ValueError, match="maximize='yes' for"):
        made(name, maximize="yes")


@every_optimizer
@pytest.mark.parametrize("lr", [torch.tensor(-1e-3), torch.tensor([1e-3, 1e-3]), torch.tensor(torch.nan)])
def test_a_rate_that_is_none_is_refused_at_once(name: str, lr: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter group 0 has lr=.*; expected a number >= 0, or a tensor of one"):
        made(name, lr=lr)


@every_optimizer
def test_scalars_of_numpy_are_numbers_and_are_saved_as_such(name: str) -> None:
    scalars = {
        "lr": numpy.float32(0.5),
        "betas": (numpy.float64(0.5), numpy.array(0.75)),
        "eps": numpy.float64(2**-20),
        "weight_decay": numpy.int64(0),
    }
    model, optimizer = made(name, **scalars)
    twin, other = made(name, lr=0.5, betas=(0.5, 0.75), eps=2**-20, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: numpy.float64(0.5) ** step)
    for group in optimizer.param_groups:
        group["eps"] = numpy.float64(2**-20)
    set_gradients(model, 0)
    set_gradients(twin, 0)
    optimizer.step()
    other.step()
    scheduler.step()
    assert_equal(weights(model), weights(twin))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert {group["lr"] for group in saved["param_groups"]} == {0.25}
    if "rank" in optimizer.defaults:
        made(name, rank=numpy.int64(1))


@every_optimizer
@pytest.mark.parametrize("role", ["matrix", "vector"])
def test_complex_parameters_are_refused_by_name(name: str, role: str) -> None:
    groups = [{"params": [("phase", nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)))], "role": role}]
    with pytest.raises(ValueError, match=r"'phase' is complex \(torch\.complex64\); expected real numbers"):
        optim.create(name, beside_layers(name, groups))


@every_optimizer
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2.0**66), (torch.float16, 2.0**13)])
def test_large_gradients_leave_finite_weights(name: str, dtype: torch.dtype, size: float) -> None:
    """2^66 is 7e19, and 2^13 about 1e4. A method that knows only directions takes the steps of gradients of size 1."""
    finals = []
    for factor in (1.0, size):
        model, optimizer = made(name, dtype, **({"lr": 1e-3} if dtype == torch.float16 else {}))
        for step in range(12):
            for key, param in trainable(model).items():
                unit = gradient(key, param.shape, step % 3).sign()
                param.grad = (unit * factor).to(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # squares that are infinite choose no directions, which is warned of
                optimizer.step()
        finals.append(weights(model))
        assert all(weight.isfinite().all() for weight in finals[-1].values())
    if name == "trion" and dtype == torch.float32:
        matrices = {
            key for group in optimizer.param_groups if group["role"] == "matrix" for key in group["param_names"]
        }
        assert_equal(*({key: final[key] for key in matrices} for final in finals), 1e-6)


@every_optimizer
def test_groups_without_names_and_a_default_device_without_numbers(name: str) -> None:
    def unnamed_groups(model: nn.Module) -> list[dict[str, Any]]:
        if optim.find(name).layers is not None:  # layers are found by name
            return optim.param_groups(model)
        return [{**group, "params": [param for _, param in group["params"]]} for group in optim.param_groups(model)]

    torch.manual_seed(0)
    model = prepare(name, MixedModel())
    optimizer = build(name, unnamed_groups(model))
    torch.manual_seed(0)
    twin = prepare(name, MixedModel())
    groups = unnamed_groups(twin)
    torch.set_default_device("meta")
    try:
        other = build(name, groups)
        for step in range(STEPS):
            for key, param in trainable(twin).items():
                torch.set_default_device(None)
                param.grad = gradient(key, param.shape, step)
                torch.set_default_device("meta")
            other.step()
        other.load_state_dict(other.state_dict())
    finally:
        torch.set_default_device(None)
    run_steps(model, optimizer, 0, STEPS)
    assert_equal({**weights(twin), **states(twin, other)}, {**weights(model), **states(model, optimizer)})


@every_optimizer
@pytest.mark.parametrize("cycle", ["one", "cyclic"])
def test_schedulers_that_cycle_momentum_reach_what_steps_by_it(name: str, cycle: str) -> None:
    model, optimizer = made(name)
    if cycle == "one":
        schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20, max_momentum=0.95)
    else:
        schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, base_momentum=0.85)
    key = "momentum" if "momentum" in optimizer.param_groups[0] else "betas"
    seen = []
    for step in range(4):
        run_steps(model, optimizer, step, step + 1)
        schedule.step()
        seen.append([group[key] if key == "momentum" else group[key][0] for group in optimizer.param_groups])
    assert all(0.84 < value < 0.96 for values in seen for value in values)
    assert len({values[0] for values in seen}) >= 3
    plain, constant = made(name)
    run_steps(plain, constant, 0, 4)
    assert any(not torch.equal(weight, weights(plain)[name]) for name, weight in weights(model).items())


def test_the_cycled_momentum_is_that_of_the_step() -> None:
    def step_with(momentum: float | None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 8, bias=False, dtype=torch.float64)
        optimizer = optim.create("muon", model, momentum=0.9 if momentum is None else momentum)
        if momentum is None:
            torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, base_momentum=0.7, max_momentum=0.8)
            assert optimizer.param_groups[0]["momentum"] == 0.8
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
        return model.weight.detach()

    assert torch.equal(step_with(None), step_with(0.8))
    assert not torch.equal(step_with(None), step_with(0.9))


@every_optimizer
def test_a_copy_takes_new_groups_as_the_original_does(name: str) -> None:
    model, optimizer = made(name)
    _, twin = copy.deepcopy((model, optimizer))
    twin.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))], "role": "vector"})
    assert twin.param_groups[-1]["betas"] == optimizer.param_groups[0]["betas"]
