"""An ordinary step reads nothing from the device: a GPU is never waited for, and the step can be captured in a graph.

Tensors on the meta device have no values: reading one is an error, whatever machine the test runs on.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import optim
from optim import rules
from optim.basis import BASES
from optim.residual import RESIDUALS

SHAPES = [(256, 128), (128, 384), (128, 128)]
METHODS = [name for name in optim.names() if name != "adamw"]  # of AdamW all of the work is torch's fused kernel


def optimizer_without_values(name: str, **arguments: object) -> optim.MatrixOptimizer:
    """Between two refreshes."""
    params = [(f"p{i}", nn.Parameter(torch.empty(shape, device="meta"))) for i, shape in enumerate(SHAPES)]
    if "refresh_interval" in inspect.signature(optim.find(name)).parameters:
        arguments = {"refresh_interval": 100, **arguments}
    optimizer = optim.create(name, [{"params": params, "role": "matrix"}], weight_decay=0.1, **arguments)
    for _, param in params:
        param.grad = torch.empty_like(param)
        optimizer.state[param]["step"].fill_(1)
    return optimizer


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ldadam"])
def test_of_every_method(name: str) -> None:
    optimizer_without_values(name).step()


@pytest.mark.parametrize("basis", BASES)
def test_of_every_basis(basis: str) -> None:
    optimizer_without_values("low_rank_adamw", basis=basis, residual="drop", moments="keep").step()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_of_every_residual(residual: str) -> None:
    optimizer_without_values("low_rank_adamw", residual=residual).step()


def test_of_quantised_state() -> None:
    optimizer_without_values("low_rank_adamw", state_dtype="8bit").step()


def test_a_refresh_does_read_once_or_this_test_could_not_fail() -> None:
    optimizer = optimizer_without_values("dct_adamw")
    for state in optimizer.state.values():
        state["step"].fill_(100)
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()


def test_the_element_wise_rule_compiles_as_one_graph() -> None:
    compiled = torch.compile(rules.adam_direction, backend="aot_eager", fullgraph=True)
    results = []
    for rule in (rules.adam_direction, compiled):
        torch.manual_seed(0)
        grad, exp_avg, exp_avg_sq = torch.randn(3, 7, 5, dtype=torch.float64).unbind()
        update = rule(
            grad,
            exp_avg,
            exp_avg_sq.square_(),
            torch.full((5,), 0.1),
            torch.full((5,), 0.03),
            betas=(0.9, 0.99),
            eps=1e-8,
        )
        results.append([update, exp_avg, exp_avg_sq])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
