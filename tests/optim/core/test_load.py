"""Loading: parameters are matched by name, what is missing is a default or an error, torch's AdamW goes on here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from tests.optim.models import MixedModel, assert_equal, build, prepare, run_steps, states, weights

every_optimizer = pytest.mark.parametrize("name", optim.names())


class Reordered(MixedModel):
    """The same layers, defined from the last to the first."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self._modules = dict(reversed(self._modules.items()))


def made(name: str, kind: type[MixedModel] = MixedModel, **arguments: Any) -> tuple[nn.Module, optim.MatrixOptimizer]:
    torch.manual_seed(0)
    model = prepare(name, kind())
    return model, build(name, model, **arguments)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


@every_optimizer
def test_layers_defined_in_another_order_keep_their_state(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 3)
    twin, other = made(name, Reordered)
    twin.load_state_dict(model.state_dict())
    assert [g["param_names"] for g in other.param_groups] != [g["param_names"] for g in optimizer.param_groups]
    other.load_state_dict(optimizer.state_dict())
    assert {key: value.tolist() for key, value in states(twin, other).items()} == {
        key: value.tolist() for key, value in states(model, optimizer).items()
    }
    for group in other.param_groups:
        assert "param_names" in group
        named = dict(twin.named_parameters())
        assert all(named[key] is param for key, param in zip(group["param_names"], group["params"], strict=True))
    if optim.find(name).layers is None:  # the draws of these depend on the place of a layer
        run_steps(model, optimizer, 3, 5)
        run_steps(twin, other, 3, 5)
        got, expected = everything(twin, other), everything(model, optimizer)
        assert_equal({key: got[key] for key in expected}, expected, 1e-12)


@every_optimizer
def test_other_names_are_refused_and_change_nothing(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    names = saved["param_groups"][0]["param_names"]
    names[0] = "renamed.weight"
    before = states(model, optimizer)
    with pytest.raises(
        ValueError, match=r"by name the checkpoint lacks 1, such as '.*' and has besides 1, such as 'ren"
    ):
        optimizer.load_state_dict(saved)
    assert_equal(states(model, optimizer), before)


@every_optimizer
def test_without_names_position_decides_and_shapes_are_checked(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["param_names"]
    twin, other = made(name)
    other.load_state_dict(saved)
    assert_equal(states(twin, other), states(model, optimizer))
    assert all("param_names" in group for group in other.param_groups)
    for group in saved["param_groups"]:
        state = [{key: value.shape for key, value in saved["state"].get(i, {}).items()} for i in group["params"]]
        if state != state[::-1]:  # frozen parameters have none, and some methods keep nothing but a count
            reversed_group = copy.deepcopy(saved)
            reversed_group["param_groups"][saved["param_groups"].index(group)]["params"].reverse()
            with pytest.raises(ValueError, match=r"the saved .* of '.*' has "):
                made(name)[1].load_state_dict(reversed_group)
    del saved["param_groups"][0]
    with pytest.raises(ValueError, match=r"parameter groups of .* parameters, and this optimizer"):
        made(name)[1].load_state_dict(saved)


@every_optimizer
def test_hyperparameters_that_are_missing_are_todays(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    manifolds = "manifold"  # says what the points are, and is no default
    for group in saved["param_groups"]:
        for key in group.keys() - {"params", "param_names", "lr", manifolds}:
            del group[key]
    twin, other = made(name)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    run_steps(model, optimizer, 2, 5)
    run_steps(twin, other, 2, 5)
    assert_equal(everything(twin, other), everything(model, optimizer))


@every_optimizer
def test_state_that_is_missing_is_named(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    before = states(model, optimizer)
    for key in {key for state in optimizer.state.values() for key in state}:
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state.pop(key, None)
        only = all(state.keys() <= {key} for state in optimizer.state.values() if key in state)
        with pytest.raises(
            ValueError, match=rf"has no state of '.*'|\['{key}'.*\] missing" if only else "missing|no state"
        ):
            optimizer.load_state_dict(saved)
        assert_equal(states(model, optimizer), before)


@every_optimizer
def test_numbers_as_steps_and_keys_of_others_do_not_matter(name: str) -> None:
    model, optimizer = made(name)
    run_steps(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        group.update(foreach=None, fused=True, capturable=False, differentiable=False, decoupled_weight_decay=True)
        group.update(amsgrad=group.get("amsgrad", False), initial_lr=0.125)
    twin, other = made(name)
    other.load_state_dict(saved)
    assert_equal(states(twin, other), states(model, optimizer))
    assert other.param_groups[0]["initial_lr"] == 0.125
    assert not other.param_groups[0].keys() & {"fused", "foreach", "capturable"}


# ------------------------------------------------------------------------------------------------------ torch's AdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        tokens = torch.randint(7, (9,), generator=torch.Generator().manual_seed(step))
        model[:4](tokens).square().mean().backward()  # the last layer never has a gradient
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("step_as", [lambda step: step, float, int, lambda step: step.reshape(1)])
@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_of_torchs_adamw_goes_on_exactly(step_as: Any, named: bool) -> None:
    def parameters(model: nn.Module) -> Any:
        return model.named_parameters() if named else model.parameters()

    model = network()
    theirs = torch.optim.AdamW(parameters(model), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, fused=True)
    train(model, theirs, 0, 4)
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = step_as(state["step"])
    twin = copy.deepcopy(model)
    # by name also into groups by role; by position into one group
    ours = optim.create("adamw", twin) if named else optim.AdamW(twin.parameters())
    train(twin, ours, 7, 8)
    twin.load_state_dict(model.state_dict())
    ours.load_state_dict(saved)
    train(model, theirs, 4, 9)
    train(twin, ours, 4, 9)
    assert_equal(weights(twin), weights(model))


def test_what_is_not_torchs_adamw_is_refused_by_name() -> None:
    model = network()
    for theirs, objection in (
        (torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), r"'parameter 0' has \['momentum_buffer'\]; expected"),
        (torch.optim.AdamW(model.parameters(), amsgrad=True), r"\['max_exp_avg_sq'\] more"),
        (torch.optim.Adam(model.parameters(), weight_decay=0.1), "torch's Adam with weight_decay=0.1, which it adds"),
    ):
        train(model, theirs, 0, 2)
        with pytest.raises(ValueError, match=objection):
            optim.AdamW(model.parameters()).load_state_dict(theirs.state_dict())
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, 0, 1)
    with pytest.raises(ValueError, match=r"1 parameter groups of \[9\] .*from named_parameters\(\)"):
        optim.create("adamw", model).load_state_dict(theirs.state_dict())
