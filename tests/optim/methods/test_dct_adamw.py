"""DCT-AdamW against its slow reference, and its corner cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import dct_matrix
from tests.optim.models import gradient
from tests.reference.adamw_in_dct import ReferenceDCTAdamW

STEPS = 24
SHAPES = [
    pytest.param((17, 6), 3, id="tall"),
    pytest.param((6, 17), 3, id="wide"),
    pytest.param((8, 8), 3, id="square"),
    pytest.param((1, 7), 1, id="one_row"),
    pytest.param((7, 1), 1, id="one_column"),
    pytest.param((9, 5), 5, id="full_rank_tall"),
    pytest.param((5, 9), 5, id="full_rank_wide"),
]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))


def optimizer_of(*params: nn.Parameter, **arguments: Any) -> optim.DCTAdamW:
    named = [(f"matrix {i}", param) for i, param in enumerate(params)]
    return optim.DCTAdamW([{"params": named, "role": "matrix"}], **arguments)


def cosine(k: int, d: int) -> Tensor:
    i = torch.arange(d, dtype=torch.float64)
    return torch.cos(torch.pi * k * (2 * i + 1) / (2 * d)) * (2 / d) ** 0.5


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("refresh_interval", [1, 7])
def test_equals_reference(shape: tuple[int, int], rank: int, refresh_interval: int) -> None:
    weight = matrix(shape)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.97), "eps": 1e-6}
    reference = ReferenceDCTAdamW(
        weight.detach().numpy().copy(), rank=rank, refresh_interval=refresh_interval, **settings
    )
    optimizer = optimizer_of(weight, rank=rank, refresh_interval=refresh_interval, **settings)
    chosen = set()
    for step in range(STEPS):
        weight.grad = gradient("weight", weight.shape, step)
        reference.step(weight.grad.numpy())
        optimizer.step()
        state = optimizer.state[weight]
        chosen.add(tuple(state["basis_index"].tolist()))
        assert state["basis_index"].tolist() == reference.indices
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state["exp_avg"].numpy(), reference.M, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state["exp_avg_sq"].numpy(), reference.V, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(state["column_age"].numpy(), np.rint(reference.age))
    assert state["step"] == STEPS
    if rank < min(shape):
        assert len(chosen) >= 3, "the gradients must make the columns change, or refreshes are not tested"


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_full_rank_is_adamw_in_the_rotated_basis(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    is_wide = shape[0] < shape[1]
    d = min(shape)
    rows = dct_matrix(d, torch.device("cpu"), torch.float64)

    def rotate(tensor: Tensor) -> Tensor:
        return (tensor.mT if is_wide else tensor) @ rows.mT

    rotated = nn.Parameter(rotate(weight.detach()))
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours = optimizer_of(weight, rank=d, refresh_interval=7, **settings)
    theirs = torch.optim.AdamW([rotated], **settings)
    for step in range(STEPS):
        weight.grad = gradient("weight", weight.shape, step)
        rotated.grad = rotate(weight.grad)
        ours.step()
        theirs.step()
    # The only difference is the rounding of two rotations of weights of size 1 per step, in float64.
    assert (rotate(weight.detach()) - rotated).abs().max() < 1e-12
    assert (ours.state[weight]["exp_avg"] - theirs.state[rotated]["exp_avg"]).abs().max() < 1e-13
    assert (ours.state[weight]["exp_avg_sq"] - theirs.state[rotated]["exp_avg_sq"]).abs().max() < 1e-13


def test_none_rank_keeps_a_quarter_of_the_directions_and_at_least_one() -> None:
    ranks = [optimizer_of(p).state[p]["basis_index"].numel() for p in map(matrix, [(16, 12), (12, 16), (3, 2), (7, 7)])]
    assert ranks == [3, 3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_the_dtypes_of_their_state(dtype: torch.dtype) -> None:
    weight = matrix((24, 12), dtype)
    before = weight.detach().clone()
    optimizer = optimizer_of(weight, rank=4, refresh_interval=5, lr=1e-2)
    for step in range(12):
        weight.grad = gradient("weight", weight.shape, step).to(dtype)
        optimizer.step()
    assert {key: value.dtype for key, value in optimizer.state[weight].items()} == {
        "step": torch.float32,
        "skipped_refreshes": torch.int32,
        "exp_avg": dtype,
        "exp_avg_sq": dtype,
        "column_age": torch.int32,
        "basis_index": torch.int32,
    }
    assert weight.dtype == dtype
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def test_the_first_gradient_that_is_not_zero_starts_the_clock() -> None:
    late, prompt = matrix((9, 6)), matrix((9, 6))
    late.data.copy_(prompt.data)
    late_optimizer = optimizer_of(late, rank=2, refresh_interval=3)
    prompt_optimizer = optimizer_of(prompt, rank=2, refresh_interval=3)
    for empty in (torch.zeros_like(late), None):
        late.grad = empty
        late_optimizer.step()
    for step in range(8):
        for weight, optimizer in ((late, late_optimizer), (prompt, prompt_optimizer)):
            weight.grad = gradient("weight", weight.shape, step)
            optimizer.step()
    assert torch.equal(late, prompt)


def test_the_first_update_of_a_column_that_enters_late_has_the_size_of_the_lr() -> None:
    weight = nn.Parameter(torch.zeros(9, 8, dtype=torch.float64))
    optimizer = optimizer_of(weight, rank=1, refresh_interval=5, lr=1e-2, weight_decay=0.0)
    for step in range(6):
        entering = step == 5
        weight.grad = cosine(3 if entering else 1, 8).repeat(9, 1)
        before = weight.detach().clone()
        optimizer.step()
    assert optimizer.state[weight]["basis_index"].tolist() == [3]
    assert optimizer.state[weight]["column_age"].tolist() == [1]
    moved = (weight.detach() - before) @ cosine(3, 8)
    torch.testing.assert_close(moved, torch.full_like(moved, -1e-2), rtol=1e-6, atol=0)


def test_a_column_that_stays_keeps_its_moments_and_one_that_returns_starts_anew() -> None:
    weight = nn.Parameter(torch.zeros(9, 8, dtype=torch.float64))
    optimizer = optimizer_of(weight, rank=2, refresh_interval=1)
    for pair in [(1, 2), (2, 3), (1, 3)]:
        weight.grad = sum(cosine(k, 8).repeat(9, 1) for k in pair)
        optimizer.step()
    state = optimizer.state[weight]
    assert state["basis_index"].tolist() == [1, 3]
    assert state["column_age"].tolist() == [1, 2]
    expected = torch.tensor([0.1, 0.9 * 0.1 + 0.1], dtype=torch.float64).expand(9, 2)
    torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-12, atol=1e-14)


def test_groups_without_names_do_not_mix_up_their_matrices() -> None:
    first, second = matrix((9, 6)), matrix((9, 6))
    groups = [{"params": [p], "role": "matrix"} for p in (first, second)]
    optimizer = optim.DCTAdamW(groups, rank=2)
    before = first.detach().clone()
    first.grad = torch.zeros_like(first)
    second.grad = gradient("weight", second.shape, 0)
    optimizer.step()
    assert torch.equal(first, before), "a zero gradient first changes nothing, whatever other groups do"
    assert not optimizer.state[first]["step"]
    assert optimizer.state[second]["step"] == 1
