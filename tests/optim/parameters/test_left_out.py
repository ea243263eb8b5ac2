"""What takes gradients and is not updated is told of: it was frozen, tied or not there when the optimizer was built."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.arguments.caller import CoverageWarning
from tests.optim.models import weights
from tests.optim.parameters.test_present import loss_of, new_model

every_name = pytest.mark.parametrize("name", optim.names())


def told(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 2) -> list[str]:
    """A plain loop, and what it is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    return [str(each.message) for each in caught if issubclass(each.category, CoverageWarning)]


@every_name
def test_what_is_unfrozen_later_is_told_of_once(name: str) -> None:
    model = new_model(name)
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = optim.create(name, model, lr=1e-2)
    assert not told(model, optimizer)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    (message,) = told(model, optimizer, steps=3)
    assert "'head.weight' of the model have gradients" in message
    assert "add_param_group" in message


@every_name
def test_what_is_added_for_the_unfrozen_is_told_of_no_more(name: str) -> None:
    model = new_model(name)
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = optim.create(name, model, lr=1e-2)
    assert not told(model, optimizer)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    optimizer.add_param_group({"params": list(model.head.named_parameters("head")), "role": "vector"})  # type: ignore[union-attr, operator]
    before = weights(model)["head.weight"].clone()
    assert not told(model, optimizer)
    assert not torch.equal(weights(model)["head.weight"], before)


class Adapted(nn.Module):
    """Around a layer that is frozen, as adapters are."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.adapter = nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.adapter(x)
        return out


@every_name
def test_adapters_put_into_the_model_after_the_optimizer_was_built_are_an_error(name: str) -> None:
    """Nothing that it updates would ever take a gradient."""
    model = new_model(name)
    optimizer = optim.create(name, model, lr=1e-2)
    model.requires_grad_(False)
    model.head = Adapted(model.head)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in weights(model).items()}
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"'head.adapter.weight' of the model have gradients"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


@every_name
def test_a_tied_weight_that_is_untied_is_told_of(name: str) -> None:
    model = new_model(name)
    model.head.weight = model.embedding.weight  # type: ignore[union-attr]
    optimizer = optim.create(name, model, lr=1e-2)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # type: ignore[union-attr, operator]
    (message,) = told(model, optimizer)
    assert "'head.weight' of the model have gradients" in message


def test_what_was_left_to_another_optimizer_is_not_told_of() -> None:
    model = new_model("muon")
    matrices = [group for group in optim.param_groups(model) if group["role"] == "matrix"]
    others = [group for group in optim.param_groups(model) if group["role"] != "matrix"]
    assert not told(model, optim.Muon(matrices, lr=1e-2), optim.AdamW(others, lr=1e-2))
    assert not told(model, optim.Muon(matrices, lr=1e-2))

    model = new_model("adamw")
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    first = optim.create("adamw", model, lr=1e-2)
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    second = optim.create("adamw", model, lr=1e-2)
    assert not told(model, first, second)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_updates_in_backward_free_gradients_and_lose_none(max_norm: float | None) -> None:
    model = new_model("dct_adamw")
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = optim.create("dct_adamw", model, lr=1e-2)
    optim.attach_to_backward(model, optimizer, max_norm=max_norm)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    (message,) = told(model, optimizer)
    assert "'head.weight'" in message


@every_name
def test_a_model_out_of_scope_whose_parts_are_exchanged_is_followed(name: str) -> None:
    def build() -> tuple[torch.optim.Optimizer, nn.ModuleDict]:
        model = new_model(name)
        return optim.create(name, model, lr=1e-2), nn.ModuleDict(dict(model.named_children()))

    optimizer, parts = build()
    gc.collect()
    parts.load_state_dict(copy.deepcopy(parts.state_dict()), assign=True)
    head = parts["head"].weight
    assert isinstance(head, Tensor)
    before = head.detach().clone()
    x = torch.linspace(-1, 1, 8, dtype=before.dtype)
    nn.Sequential(parts["inner"], parts["norm"], parts["head"])(x).sum().backward()
    optimizer.step()
    assert not torch.equal(head, before)


def test_bare_tensors_without_gradients_are_no_error() -> None:
    other = nn.Linear(4, 4)
    other(torch.ones(4)).sum().backward()
    optim.AdamW([torch.zeros(4, 4, requires_grad=True)], lr=1e-2).step()
