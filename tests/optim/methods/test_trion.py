"""Trion against its slow reference, against Muon at full rank, and its corner cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.costs.sent import weight_traffic
from lowrank_train.optim.methods.muon import Muon
from lowrank_train.optim.methods.trion import Trion
from tests.distributed import run_distributed
from tests.optim.models import (
    MATRIX_SHAPES,
    MixedModel,
    assert_equal,
    gradient,
    set_gradients,
)
from tests.optim.sharded import AllReduces, promised_bytes, shard, trained
from tests.reference.trion import ReferenceTrion

STEPS = 20


def build(model: nn.Module, **arguments: Any) -> Trion:
    return Trion(optim.param_groups(model), **{"lr": 1e-2, **arguments})


def matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(gradient("initial", torch.Size(shape), 0).to(dtype))


def optimizer_of(*params: nn.Parameter, **arguments: Any) -> Trion:
    return Trion([{"params": list(params), "role": "matrix"}], **arguments)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("shape", "rank"), [((17, 6), 3), ((6, 17), 3), ((8, 8), 3), ((1, 7), 1), ((7, 1), 1), ((9, 5), 5), ((5, 9), 5)]
)
def test_equals_reference(shape: tuple[int, int], rank: int) -> None:
    weight = matrix(shape)
    settings: dict[str, Any] = {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.2, "rank": rank}
    reference = ReferenceTrion(weight.detach().numpy().copy(), **settings)
    optimizer = optimizer_of(weight, **settings)
    chosen = set()
    for step in range(STEPS):
        weight.grad = gradient("weight", weight.shape, step)
        reference.step(weight.grad.numpy())
        optimizer.step()
        state = optimizer.state[weight]
        assert state["basis_index"].tolist() == reference.indices
        chosen.add(tuple(reference.indices))
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=0, atol=1e-10)
        np.testing.assert_allclose(state["momentum"].numpy(), reference.M, rtol=0, atol=1e-12)
    assert state["step"] == STEPS
    if rank < min(shape):
        assert len(chosen) >= 3, "the gradients must make the columns change"


@pytest.mark.parametrize("basis", ["dct", "dct_l1", "hadamard", "identity"])
@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (8, 8)])
def test_at_full_rank_it_is_muon_in_any_basis(basis: str, shape: tuple[int, int]) -> None:
    """NS(B Q) Q^T = NS(B) for orthonormal Q, and NS does not see that Muon's average is 1 - mu times our sum."""
    ours, theirs = matrix(shape), matrix(shape)
    optimizers = (
        optimizer_of(ours, rank=8, basis=basis, lr=1e-2, weight_decay=0.1),
        Muon([{"params": [theirs], "role": "matrix"}], nesterov=False, lr=1e-2, weight_decay=0.1),
    )
    for step in range(STEPS):
        ours.grad = theirs.grad = gradient("weight", ours.shape, step)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).abs().max() < 1e-11


def test_in_the_identity_basis_only_the_columns_with_most_momentum_move() -> None:
    weight = nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))
    optimizer = optimizer_of(weight, rank=2, basis="identity", momentum=0.9, weight_decay=0.0)
    sizes = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    weight.grad = torch.linalg.qr(gradient("weight", weight.shape, 0)).Q * sizes
    optimizer.step()
    assert optimizer.state[weight]["basis_index"].tolist() == [1, 2]
    assert weight.any(dim=0).tolist() == [False, True, True, False]
    kept = torch.tensor([1.0, 0.9, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], weight.grad * kept, rtol=1e-12, atol=0)


def test_what_is_left_behind_is_stepped_along_in_time() -> None:
    """Error feedback: a weak column grows in M until it is chosen."""
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = optimizer_of(weight, rank=1, basis="identity", momentum=0.5)
    chosen = []
    for _ in range(12):
        weight.grad = torch.diag(torch.tensor([1.0, 0.9, 0.3, 0.0], dtype=torch.float64))
        optimizer.step()
        chosen += optimizer.state[weight]["basis_index"].tolist()
    assert {0, 1, 2} == set(chosen)


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(build, 10)
    monkeypatch.setattr("lowrank_train.optim.methods.trion.CHUNK_NUMBERS", 30)
    assert_equal(trained(build, 10), expected, 1e-12)


# ------------------------------------------------------------------------------------------------------- hard gradients


# ---------------------------------------------------------------------------------------------------------------- state


def test_state_is_muons_and_one_index_per_column() -> None:
    model = MixedModel(torch.bfloat16)
    optimizer = build(model)
    matrices = sum(r * c for r, c in MATRIX_SHAPES)
    columns = sum(max(1, min(shape) // 4) for shape in MATRIX_SHAPES)
    others = sum(p.numel() for p in model.parameters()) - matrices
    expected = 2 * matrices + 4 * columns + 2 * 2 * others + 4 * len(list(model.parameters()))
    assert optim.state_bytes(optimizer) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1\.0 for 'matrix_1x8\.weight'; expected a number in \[0, 1\)"),
        ({"rank": 0}, r"rank=0 for 'matrix_1x8\.weight' of shape \(1, 8\); expected a whole number"),
        ({"rank": 2}, r"rank=2 exceeds min\(m, n\)=1 for 'matrix_1x8\.weight'"),
        ({"basis": "svd"}, r"basis='svd' has no columns to choose from at every step; expected dct, dct_l1, hadamard"),
        ({"basis": "dtc"}, r"basis='dtc'; did you mean 'dct'\?"),
        ({"basis": "hadamard"}, r"basis='hadamard' for 'matrix_\d+x\d+\.weight' of shape"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MixedModel(), **arguments)


# -------------------------------------------------------------------------------------------------------------- sharded


def test_two_all_reduces_of_what_traffic_promises() -> None:
    def worker() -> tuple[list[int], int]:
        MATRIX_SHAPES.remove((6, 17))  # of odd width: it stays on dimension 0, and is turned over
        model = MixedModel()
        shard(model, Trion, "preferred")
        optimizer = build(model)
        set_gradients(model, 0)
        with AllReduces() as reduces:
            optimizer.step()
        promised = [
            weight_traffic(optimizer, param, group, 2).step_bytes
            for group in optimizer.param_groups
            for param in group["params"]
            if group["role"] == "matrix"
        ]
        return reduces.bytes, sum(promised)

    smaller = [min(shape) for shape in MATRIX_SHAPES if shape != (6, 17)]
    energies, grams = sum(smaller) * 8, sum(max(1, d // 4) ** 2 for d in smaller) * 8
    assert run_distributed(worker, 2) == [([energies, grams], energies + grams)] * 2


def test_traffic_counts_a_matrix_that_must_be_turned_over() -> None:
    optimizer = optimizer_of(matrix((2, 2)))
    assert promised_bytes(optimizer, (6, 17), 1, rank=2) == 0
    assert promised_bytes(optimizer, (6, 18), 2, rank=2) == 4 * (6 + 4)
    assert promised_bytes(optimizer, (6, 17), 2, rank=2) == 4 * (6 + 4) + 2 * 17 * 3 * 2 + 2 * 9 * 6 * 4
