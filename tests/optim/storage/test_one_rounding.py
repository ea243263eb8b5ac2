"""Weights of 16 bits are rounded once in a step, whatever the method, its parts and the shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train import optim
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, build, gradient, laid_out_as, prepare, trainable, weights
from tests.optim.sharded import Placement, shard

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in optim.names()},
    **{residual: ("low_rank_adamw", {"residual": residual}) for residual in RESIDUALS},
    "welore_adamw": ("welore_adamw", {"score": "uniform"}),  # ranks of rounded weights may be others
}

ROUNDED_BEFORE = {
    "galore_adamw": "its basis is kept in 16 bits",
    "welore_adamw": "its basis is kept in 16 bits",
    "scale": "the head steps along its average as it is kept",
}
"""What is not exact before the weight is rounded, so that one in twenty weights may become its neighbour."""


def one_step(case: str, dtype: torch.dtype, numbers: torch.dtype, layout: Placement | None = None) -> dict[str, Tensor]:
    """Weights after the first step; weights and gradients before it are numbers of type ``numbers``, in ``dtype``."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    model = prepare(name, MixedModel(numbers)).to(dtype)
    if layout is not None:
        shard(model, optim.find(name), layout)
    optimizer = build(name, model, **settings)
    for key, param in trainable(model).items():
        param.grad = laid_out_as(param, gradient(key, param.shape, 0).to(numbers).to(dtype))
    optimizer.step()
    return weights(model)


def check(case: str, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal; or, where something else is rounded before, neighbours now and then."""
    for key, weight in got.items():
        difference = (weight.double() - expected[key].double()).abs()
        if case not in ROUNDED_BEFORE:
            assert torch.equal(weight, expected[key]), (case, key, float(difference.max()))
        gap = torch.finfo(weight.dtype).eps * expected[key].double().abs().clamp_min(0.1)
        assert (difference <= gap).all(), (case, key, float(difference.max()))
        assert (difference > 0).sum() <= max(1, 0.06 * weight.numel()), (case, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in CASES if optim.find(CASES[case][0]).layers != "points"])
def test_a_step_is_that_of_float32_rounded_once(case: str, dtype: torch.dtype) -> None:
    exact = {key: weight.to(dtype) for key, weight in one_step(case, torch.float32, dtype).items()}
    check(case, one_step(case, dtype, dtype), exact)


@pytest.mark.slow
def test_sharded_weights_are_rounded_as_whole_ones() -> None:
    layouts: tuple[Placement, ...] = ("preferred", "rows", "columns")

    def worker() -> dict[str, dict[str, Tensor]]:
        cases = [(case, layout) for case in CASES for layout in layouts if fits(case, layout)]
        return {f"{case} {layout}": one_step(case, torch.bfloat16, torch.bfloat16, layout) for case, layout in cases}

    whole = {case: one_step(case, torch.bfloat16, torch.bfloat16) for case in CASES}
    for results in run_distributed(worker, 2):
        for label, got in results.items():
            case = label.split()[0]
            check(case, got, whole[case])


def fits(case: str, layout: Placement) -> bool:
    """Whether a layout leaves rows whole, for methods whose rows are vectors or points."""
    return layout != "columns" or optim.find(CASES[case][0]).layers is None
