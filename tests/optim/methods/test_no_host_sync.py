"""An ordinary step reads nothing from the device: a GPU is never waited for, and the step can be captured in a graph.

Tensors on the meta device have no values: reading one is an error, whatever machine the test runs on.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.core import adam as rules
from lowrank_train.optim.low_rank.bases import BASES
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests.optim.models import prepare

SHAPES = [(128, 256), (384, 128), (128, 128)]  # in, out
METHODS = [name for name in optim.names() if name not in ("adamw", "relora")]
"""Of these two all of the work in a step is torch's fused kernel, which there is none of on meta."""


def optimizer_without_values(name: str, **arguments: object) -> optim.MatrixOptimizer:
    """Between two refreshes."""
    model = nn.ModuleDict({f"p{i}": nn.Linear(*shape, bias=False, device="meta") for i, shape in enumerate(SHAPES)})
    prepare(name, model)
    if "refresh_interval" in inspect.signature(optim.find(name)).parameters:
        arguments = {"refresh_interval": 100, **arguments}
    optimizer = optim.create(name, model, weight_decay=0.1, **arguments)
    for slot in optimizer.slots():
        if slot.state:
            slot.param.grad = torch.empty_like(slot.param)
            slot.state["step"].fill_(1)
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


def test_the_clock_of_relora_is_on_the_host() -> None:
    """What it does around AdamW, in a step without gradients; of a restart it reads nothing either."""
    optimizer = optimizer_without_values("relora", restart_every=4)
    optimizer.zero_grad()
    for _ in range(4):
        optimizer.step()
    assert optimizer.figures()["restarts"] == 1


@pytest.mark.parametrize("settings", [{"keep_sigma_moments": True}, {"vector_scale": 3.0, "warmup_steps": 5}])
def test_of_spectral_layers(settings: dict[str, object]) -> None:
    """What is not the default; frozen vectors are not looked at, whatever they are stored in."""
    optimizer_without_values("sst", **settings).step()


def test_a_draw_does_read_or_that_test_could_not_fail() -> None:
    optimizer = optimizer_without_values("sst", resample_every=2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()


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
