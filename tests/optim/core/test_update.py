"""A method of one's own: an ``Update`` for each role that it is about, and a class that names them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.core.update import Traffic, Update, Workspace
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.layout import StateTensor, local


class SignUpdate(Update):
    """The sign of a momentum."""

    structural_settings = ("beta",)
    interval_setting = "beta"

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], set[torch.dtype]]] = []

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return one moment."""
        return {"momentum": StateTensor(tuple(param.shape), param.dtype, "parameter")}

    def step(self, slots: list[Slot]) -> None:
        """Step along the sign."""
        types = {tensor.dtype for slot in slots for tensor in (slot.param, *slot.state.values())}
        self.seen.append(([slot.name for slot in slots], types - {torch.int32}))
        for slot in slots:
            momentum = local(slot.state["momentum"])
            momentum.lerp_(local(dense_gradient(slot)).to(momentum.dtype), 1 - slot.group["beta"])
            local(slot.param).add_(momentum.sign(), alpha=-slot.group["lr"])


class Sign(optim.MatrixOptimizer):
    """The sign of a momentum on matrices."""

    updates: ClassVar = {"matrix": SignUpdate()}

    def __init__(self, params: Any, lr: float = 0.25, *, beta: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10), nn.LayerNorm(10))


def trained(network: nn.Module, optimizer: optim.MatrixOptimizer) -> None:
    optimizer.zero_grad()
    network(torch.ones(2, 8, dtype=network[0].weight.dtype)).square().sum().backward()  # type: ignore[index]
    optimizer.step()


def test_an_update_gets_all_matrices_of_its_role_at_once_and_adamw_the_rest() -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    optimizer = Sign(optim.param_groups(network))
    seen = optimizer.updates["matrix"].seen
    seen.clear()
    trained(network, optimizer)
    assert [names for names, _ in seen] == [["0.weight", "1.weight"]]
    for key, weight in network.state_dict().items():
        assert not torch.equal(weight, before[key])
    moved = (network[0].weight - before["0.weight"]).abs()
    assert ((moved - 0.25).abs() < 1e-6).all()
    assert {tuple(state) for state in optimizer.state.values()} == {("momentum",), ("step", "exp_avg", "exp_avg_sq")}
    assert "matrix: 2 tensors of 108 numbers by Sign" in repr(optimizer)
    assert Sign.needs_roles
    assert Sign.layers is None


def test_what_is_not_declared_is_taken_in_float32() -> None:
    network = model().bfloat16()
    groups = optim.param_groups(network, stochastic_rounding=True, state_dtype="bfloat16")
    optimizer = Sign(groups)
    seen = optimizer.updates["matrix"].seen
    seen.clear()
    trained(network, optimizer)
    assert [types for _, types in seen] == [{torch.float32}]
    assert network[0].weight.dtype == torch.bfloat16


def test_costs_that_are_not_declared_are_none() -> None:
    update = Sign.updates["matrix"]
    assert update.sent((4, 3), torch.float32, {}, 2, 0) == Traffic()
    assert update.workspace([]) == Workspace()
    assert Sign.shard_dim("matrix", (4, 6), 2) == 0
    assert update.interval({"beta": 7}) == 7


def test_state_that_means_something_else_is_refused() -> None:
    network = model()
    optimizer = Sign(optim.param_groups(network))
    trained(network, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    Sign(optim.param_groups(model())).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"written with beta=0\.5 and this optimizer has beta=0\.75.*load it with"):
        Sign(optim.param_groups(model()), beta=0.75).load_state_dict(saved)
