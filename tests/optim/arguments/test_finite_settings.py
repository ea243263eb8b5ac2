"""No number of an optimizer may be infinite or nan, in any optimizer, group or tuple: it says so when it is built."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train import optim
from tests.optim.models import MixedModel, prepare

OPTIONAL_NUMBERS = ("rank", "resvd_every", "alpha", "point_rank", "budget_bytes")
"""Arguments whose default is None, and which take a number."""


def wrong_values(name: str) -> list[tuple[str, Any]]:
    """Every argument that takes a number, or numbers in a tuple, with values that no step could use."""
    found: list[tuple[str, Any]] = []
    for key, parameter in inspect.signature(optim.find(name)).parameters.items():
        default = parameter.default
        if isinstance(default, tuple):
            found += [(key, (value, *default[1:])) for value in (math.inf, -math.inf, math.nan)]
        elif key in OPTIONAL_NUMBERS or (isinstance(default, int | float) and not isinstance(default, bool)):
            found += [(key, value) for value in (math.inf, -math.inf, math.nan)]
            found += [(key, 10**30)] if isinstance(default, int) else []
    return found


@pytest.mark.parametrize("name", optim.names())
def test_no_number_of_any_optimizer_may_be_infinite_or_nan(name: str) -> None:
    model = prepare(name, MixedModel())
    assert {"lr", "betas", "eps", "weight_decay"} <= {key for key, _ in wrong_values(name)}
    for key, value in wrong_values(name):
        with pytest.raises(ValueError, match=key) as caught:
            optim.create(name, model, **{key: value})
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", optim.names())
def test_nor_a_number_of_one_group(name: str) -> None:
    model = prepare(name, MixedModel())
    for key, value in (("lr", math.inf), ("eps", math.inf), ("lr", torch.tensor(math.nan)), ("weight_decay", math.inf)):
        groups = optim.param_groups(model)
        groups[-1][key] = value
        index = r"\d+" if name == "welore_adamw" else len(groups) - 1  # it makes a group of each matrix
        with pytest.raises(ValueError, match=rf"parameter group {index} has {key}=.*expected a"):
            optim.create(name, groups)


@pytest.mark.parametrize("constant", [math.inf, math.nan, 1e300, 1e-300, 1e13])
@pytest.mark.parametrize("manifold", ["lorentz", "poincare_ball"])
def test_a_curvature_that_float32_cannot_square(manifold: str, constant: float) -> None:
    points = nn.Parameter(torch.zeros(3, 4))
    groups = [{"params": [("points", points)], "role": "points", "manifold": (manifold, constant)}]
    with pytest.raises(ValueError, match=r"manifold=\('.*; expected a number"):
        optim.create("riemannian_adamw", groups)
