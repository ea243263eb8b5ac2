"""Muon against its slow reference, against torch's, and its corner cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.costs.sent import weight_traffic
from lowrank_train.optim.methods.muon import Muon
from tests.distributed import run_distributed
from tests.optim.models import (
    MATRIX_SHAPES,
    MixedModel,
    assert_equal,
    gradient,
    set_gradients,
)
from tests.optim.sharded import AllToAlls, promised_bytes, shard, trained
from tests.reference.muon import ReferenceMuon

STEPS = 20
SHAPES = [(17, 6), (6, 17), (8, 8), (1, 7), (7, 1)]


def build(model: nn.Module, **arguments: Any) -> Muon:
    return Muon(optim.param_groups(model), **{"lr": 1e-2, **arguments})


def matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(gradient("initial", torch.Size(shape), 0).to(dtype))


def optimizer_of(*params: nn.Parameter, **arguments: Any) -> Muon:
    return Muon([{"params": list(params), "role": "matrix"}], **arguments)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_equals_reference(shape: tuple[int, int], nesterov: bool, adjust_lr: Any) -> None:
    weight = matrix(shape)
    settings: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov, "adjust_lr": adjust_lr}
    reference = ReferenceMuon(weight.detach().numpy().copy(), weight_decay=0.2, **settings)
    optimizer = optimizer_of(weight, weight_decay=0.2, **settings)
    for step in range(STEPS):
        weight.grad = gradient("weight", weight.shape, step)
        reference.step(weight.grad.numpy())
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=0, atol=1e-10)
        np.testing.assert_allclose(optimizer.state[weight]["momentum"].numpy(), reference.M, rtol=0, atol=1e-12)
    assert optimizer.state[weight]["step"] == STEPS


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"adjust_lr": "match_rms_adamw"}, {"momentum": 0.5}])
def test_with_its_defaults_it_is_torchs_up_to_bfloat16(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """torch iterates in bfloat16: 8 bits, of which five steps lose two or three."""
    ours, theirs = matrix(shape, torch.float32), matrix(shape, torch.float32)
    optimizer = optimizer_of(ours, **settings)
    settings = {"adjust_lr_fn" if key == "adjust_lr" else key: value for key, value in settings.items()}
    oracle = torch.optim.Muon([theirs], **settings)
    start = ours.detach().clone()
    for step in range(STEPS):
        ours.grad = theirs.grad = gradient("weight", ours.shape, step).float()
        optimizer.step()
        oracle.step()
    moved = theirs.detach() - start
    assert (ours.detach() - theirs.detach()).norm() < 0.02 * moved.norm()
    torch.testing.assert_close(optimizer.state[ours]["momentum"], oracle.state[theirs]["momentum_buffer"])
    assert optimizer.defaults["weight_decay"] == oracle.defaults["weight_decay"]
    assert optimizer.defaults["lr"] == oracle.defaults["lr"]


def test_without_momentum_every_step_is_the_orthogonal_factor_of_its_gradient() -> None:
    weight = nn.Parameter(torch.zeros(20, 5, dtype=torch.float64))
    optimizer = optimizer_of(weight, lr=0.5, momentum=0.0, weight_decay=0.0)
    orthonormal = torch.linalg.qr(gradient("weight", weight.shape, 0)).Q
    for length in (1e-3, 7.0):
        weight.data.zero_()
        weight.grad = length * orthonormal
        optimizer.step()
        steps = weight.detach() / orthonormal
        # all singular values are equal, so the result is a multiple of the input: by 0.5 sqrt(20 / 5) within NS's error
        torch.testing.assert_close(steps, steps[0, 0].expand_as(steps), rtol=1e-9, atol=0)
        assert 0.65 < -steps[0, 0] / (0.5 * 2) < 1.25


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(build, 10)
    monkeypatch.setattr("lowrank_train.optim.methods.muon.CHUNK_NUMBERS", 70)
    assert_equal(trained(build, 10), expected, 1e-12)


# ------------------------------------------------------------------------------------------------------- hard gradients


# ---------------------------------------------------------------------------------------------------------------- state


def test_state_is_one_average_and_a_step_count() -> None:
    model = MixedModel(torch.bfloat16)
    optimizer = build(model)
    matrices = sum(r * c for r, c in MATRIX_SHAPES)
    others = sum(p.numel() for p in model.parameters()) - matrices
    assert optim.state_bytes(optimizer) == 2 * matrices + 2 * 2 * others + 4 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1\.0 for 'matrix_1x8\.weight'; expected a number in \[0, 1\)"),
        ({"momentum": float("nan")}, r"parameter group 0 has momentum=nan; expected a finite number"),
        ({"adjust_lr": "rms"}, r"adjust_lr='rms' for 'matrix_1x8\.weight'; expected one of original, match_rms_adamw"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MixedModel(), **arguments)


# -------------------------------------------------------------------------------------------------------------- sharded


def test_whole_matrices_travel_to_their_owners_and_back_once() -> None:
    def worker() -> tuple[list[int], int]:
        MATRIX_SHAPES.remove((6, 17))  # of odd width: it stays on dimension 0, and is turned over
        model = MixedModel()
        shard(model, Muon, "preferred")
        optimizer = build(model)
        set_gradients(model, 0)
        with AllToAlls() as travels:
            optimizer.step()
        promised = [
            weight_traffic(optimizer, param, group, 2).step_bytes
            for group in optimizer.param_groups
            for param in group["params"]
            if group["role"] == "matrix"
        ]
        return travels.bytes, sum(promised)

    shapes = [shape for shape in MATRIX_SHAPES if shape != (6, 17)]
    (first, promised), (second, _) = run_distributed(worker, 2)
    assert len(first) == len(second) == 2 * ((len(shapes) + 1) // 2), "a pair of matrices at a time"
    assert sum(first) + sum(second) == 2 * 8 * sum(rows * columns for rows, columns in shapes)
    # promised is the larger share of each matrix; of an odd number of rows one more than half
    excess = 8 * sum(min(shape) for shape in shapes if max(shape) % 2)
    assert 2 * promised == sum(first) + sum(second) + 2 * excess


def test_traffic_counts_a_matrix_that_must_be_turned_over() -> None:
    optimizer = optimizer_of(matrix((2, 2)))
    assert promised_bytes(optimizer, (6, 17), 1) == 0
    assert promised_bytes(optimizer, (6, 18), 2) == 2 * 2 * 9 * 6
    turned = 4 * (17 * 3 + 9 * 6)
    assert promised_bytes(optimizer, (6, 17), 2) == 2 * 2 * 9 * 6 + turned
