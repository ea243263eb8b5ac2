"""WeLore against its slow reference; what a change of rank keeps; budgets, shards, checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowrank_train import optim
from lowrank_train.common.ranks import Ranks
from lowrank_train.optim import WeLoreAdamW
from lowrank_train.optim.low_rank.bases import Moments
from lowrank_train.optim.low_rank.bases.dense import rotate
from lowrank_train.optim.spectral.ranks import SCORES
from lowrank_train.optim.storage.quantization import read
from lowrank_train.train.checkpoint import Checkpoints
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, all_whole, assert_equal, build, laid_out_as, run_steps, states, weights
from tests.optim.sharded import AllReduces
from tests.reference.welore_adamw import ReferenceWeLoreAdamW

SHAPES = {"a": (12, 8), "b": (7, 10), "c": (9, 6)}
DECAY = {
    # of the spectrum of the gradient, in 4 steps each: what is flat takes the memory of what is steep
    "a": [0.98, 0.98, 0.3, 0.6, 0.3],
    "b": [0.3, 0.5, 0.98, 0.6, 0.98],
    "c": [0.3, 0.5, 0.4, 0.6, 0.3],
}
STEPS = 17  # ranks are chosen after 3, 7, 11 and 15
SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 4, "average_steps": 3, "reallocate_every": 4, "refresh_interval": 3}
HISTORY = {0: (4, 4, 4), 3: (8, 3, 2), 7: (8, 3, 2), 11: (3, 7, 4), 15: (4, 4, 4)}
"""Ranks after the step: the whole of a and b is AdamW."""


def gradient(name: str, step: int) -> Tensor:
    """(R, C) with a spectrum that falls as said; a function of its arguments."""
    rows, columns = SHAPES[name]
    m, d = max(rows, columns), min(rows, columns)
    directions = torch.randn(d, d, generator=torch.Generator().manual_seed(ord(name)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1000 * ord(name) + step)
    noise = torch.randn(m, d, generator=generator, dtype=torch.float64)
    spectrum = DECAY[name][min(4, step // 4)] ** torch.arange(d, dtype=torch.float64)
    tall = (noise * spectrum) @ torch.linalg.qr(directions).Q
    return tall if rows >= columns else tall.mT.contiguous()


class Three(nn.Module):
    """Its parameters are the matrices ``SHAPES``."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.named_parameters()), "role": "matrix"}]


def create(model: nn.Module, **settings: Any) -> WeLoreAdamW:
    return WeLoreAdamW(groups(model), **{**SETTINGS, **settings})


def train(model: nn.Module, optimizer: WeLoreAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        for name, param in model.named_parameters():
            param.grad = laid_out_as(param, gradient(name, step).to(param.dtype))
        optimizer.step()


def everything(model: nn.Module, optimizer: WeLoreAdamW) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


def budgeted_bytes(optimizer: WeLoreAdamW) -> int:
    """Of all matrices, without the sums of gradients."""
    return sum(
        value.numel() * value.element_size()
        for group in optimizer.param_groups
        if group["role"] == "matrix"
        for param in group["params"]
        for key, value in optimizer.state[param].items()
        if key != "gradient_gram"
    )


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "scale": 0.5, "betas": (0.7, 0.9)}, {"refresh_interval": 5}]
)
def test_equals_the_reference(settings: dict[str, Any]) -> None:
    """Through every kind of change: more, fewer, from and to AdamW, and a choice that is not taken."""
    model = Three()
    optimizer = create(model, basis="svd", **settings)
    start = {name: param.detach().clone().numpy() for name, param in model.named_parameters()}
    reference = ReferenceWeLoreAdamW(start, **{**SETTINGS, **settings})
    for step in range(21):
        train(model, optimizer, step, step + 1)
        reference.step({name: gradient(name, step).numpy() for name in SHAPES})
        assert optimizer.ranks == reference.ranks
        for factor in reference.factors:
            param = model.get_parameter(factor.name).detach()
            tall = param if param.shape[0] >= param.shape[1] else param.mT
            assert (tall - torch.from_numpy(factor.W)).abs().max() <= 1e-9
            if "basis" in optimizer.state[model.get_parameter(factor.name)]:
                basis = optimizer.state[model.get_parameter(factor.name)]["basis"]
                assert (basis - torch.from_numpy(factor.V)).abs().max() <= 1e-9
    assert set(reference.events) == {"more", "fewer", "to dense", "from dense", "kept"}


def test_the_ranks_of_these_tests_are_what_they_claim() -> None:
    model = Three()
    optimizer = create(model)
    for step in range(STEPS):
        assert tuple(optimizer.ranks.values()) == HISTORY[max(s for s in HISTORY if s <= step)]
        dense = optimizer.figures()["dense_matrices"]
        assert dense == sum("age" in state for state in optimizer.state.values()) == (3 <= step < 15)
        train(model, optimizer, step, step + 1)
    assert optimizer.figures() == {"rank_mean": 4.0, "rank_min": 4, "rank_max": 4, "dense_matrices": 0}


def test_the_control_is_galore_at_the_uniform_rank() -> None:
    ours, galore = Three(), Three()
    optimizer = create(ours, score="uniform", scale=0.25, eps=1e-6, moments="keep")
    other = optim.GaLoreAdamW(groups(galore), lr=1e-2, rank=4, refresh_interval=3)
    assert not any("gradient_gram" in state for state in optimizer.state.values())
    for step in range(8):
        for model, each in ((ours, optimizer), (galore, other)):
            for name, param in model.named_parameters():
                param.grad = gradient(name, step)
            each.step()
    assert_equal(weights(ours), weights(galore))
    assert set(optimizer.ranks.values()) == {4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "float32"])
def test_the_whole_budget_is_adamw_bit_for_bit(dtype: torch.dtype, state_dtype: str | None) -> None:
    ours, adamw = MixedModel(dtype), MixedModel(dtype)
    adamw.load_state_dict(ours.state_dict())
    for score in ("uniform", "energy"):
        optimizer = build("welore_adamw", ours, budget_bytes=10**9, score=score, state_dtype=state_dtype)
        assert optimizer.figures()["dense_matrices"] == len(optimizer.ranks)
        run_steps(ours, optimizer, 0, 8)
        run_steps(adamw, build("adamw", adamw, state_dtype=state_dtype), 0, 8)
        assert optimizer.figures()["dense_matrices"] == len(optimizer.ranks)
        assert_equal(weights(ours), weights(adamw))


@pytest.mark.parametrize("source", ["weight", "gradient", "mixed"])
@pytest.mark.parametrize("score", sorted(SCORES))
def test_equal_spectra_get_equal_ranks(source: str, score: str) -> None:
    weight = torch.randn(12, 8, dtype=torch.float64)
    params = [(name, nn.Parameter(weight.clone())) for name in ("one", "turned", "other")]
    params[1] = ("turned", nn.Parameter(weight.mT.clone()))
    params[2] = ("other", nn.Parameter(torch.randn(12, 8, dtype=torch.float64) ** 3))
    optimizer = WeLoreAdamW(
        [{"params": params, "role": "matrix"}], **{**SETTINGS, "average_steps": 1}, source=source, score=score
    )
    value, other = torch.randn(12, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64) ** 3
    for (_, param), grad in zip(params, (value, value.mT.clone(), other), strict=True):
        param.grad = grad
    optimizer.step()
    assert optimizer.ranks["one"] == optimizer.ranks["turned"]


def test_weight_spectra_are_those_before_the_second_step() -> None:
    params = {name: nn.Parameter(torch.zeros(12, 8, dtype=torch.float64)) for name in ("flat", "steep")}
    with torch.no_grad():
        params["flat"][:8] = torch.eye(8, dtype=torch.float64)
        params["steep"][:8] = torch.diag(0.2 ** torch.arange(8, dtype=torch.float64))
    for source in ("weight", "mixed"):
        optimizer = WeLoreAdamW(
            [{"params": list(params.items()), "role": "matrix"}],
            **{**SETTINGS, "lr": 0.0, "average_steps": 1, "reallocate_every": None},
            source=source,
        )
        for param in params.values():
            param.grad = torch.ones_like(param)
            param.grad[:8] += torch.eye(8, dtype=torch.float64)
        optimizer.step()
        assert optimizer.ranks["flat"] > 4 > optimizer.ranks["steep"]
        assert not any("gradient_gram" in state for state in optimizer.state.values())


def test_what_has_no_gradient_gets_the_least_rank() -> None:
    model = Three()
    optimizer = create(model, score="minmax", floor=2)
    for step in range(3):
        model.a.grad, model.c.grad = gradient("a", step), gradient("c", step)
        optimizer.step()
    assert optimizer.ranks["b"] == 2
    assert optimizer.state[model.b]["step"] == 0
    for step in range(3, 5):
        train(model, optimizer, step, step + 1)
    assert optimizer.state[model.b]["step"] == 2


# ------------------------------------------------------------------------------------------------------- change of rank


def orthonormality(basis: Tensor) -> float:
    return float((basis @ basis.mT - torch.eye(len(basis), dtype=basis.dtype)).abs().max())


def test_fewer_and_more_keep_the_leading_directions_bit_for_bit() -> None:
    model = Three()
    optimizer = create(model, refresh_interval=100)
    train(model, optimizer, 0, 2)
    before = {key: value.clone() for key, value in optimizer.state[model.c].items()}
    train(model, optimizer, 2, 3)
    after = optimizer.state[model.c]
    assert torch.equal(after["basis"], before["basis"][:2])
    assert after["column_age"].tolist() == [3, 3]
    train(model, optimizer, 3, 10)
    before = {key: value.clone() for key, value in after.items()}
    train(model, optimizer, 10, 11)
    assert torch.equal(after["basis"][:2], before["basis"])
    assert orthonormality(after["basis"]) < 1e-14
    assert after["column_age"].tolist() == [11, 11, 0, 0]
    assert not after["exp_avg"][:, 2:].any()
    train(model, optimizer, 11, 12)
    assert after["column_age"].tolist() == [12, 12, 1, 1]


def test_moments_of_columns_of_unequal_age_take_the_largest() -> None:
    """M_hat, not M, is what turns; a column of age 0 holds nothing, whatever is in it."""
    betas = (0.9, 0.99)
    age = torch.tensor([5, 2, 0], dtype=torch.int32)
    mean, square = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 5
    moments = Moments(mean * (1 - 0.9 ** age.double()), square * (1 - 0.99 ** age.double()), age)
    overlap = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q.mT
    turned = rotate(moments, overlap, betas)
    assert turned.age.tolist() == [5] * 6
    assert turned.age.dtype == torch.int32
    mean[:, 2] = square[:, 2] = 0
    expected = mean @ overlap
    torch.testing.assert_close(turned.exp_avg, expected * (1 - 0.9**5))
    spread = (square - mean.square()) @ overlap.square()
    torch.testing.assert_close(turned.exp_avg_sq, (spread + expected.square()).abs() * (1 - 0.99**5))
    nothing = rotate(Moments(mean[:, 2:], square[:, 2:], age[2:]), overlap[2:], betas)
    assert not nothing.exp_avg.any()
    assert nothing.age.tolist() == [0] * 6


@pytest.mark.parametrize("residual", ["error_feedback", "fira", "normalized"])
@pytest.mark.parametrize("basis", ["power", "svd"])
def test_every_rest_of_the_gradient_goes_on(residual: str, basis: str) -> None:
    model = Three()
    optimizer = create(model, residual=residual, basis=basis, rank=2)
    seen = set()
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        seen.add(tuple(optimizer.ranks.values()))
    assert len(seen) > 2
    assert all(value.isfinite().all() for value in everything(model, optimizer).values())


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.float32, "8bit"), (torch.bfloat16, None), (torch.float32, "bfloat16")]
)
def test_moments_survive_the_way_to_adamw_and_back_in_few_bits(dtype: torch.dtype, state_dtype: str | None) -> None:
    """Directions with 8-bit moments too; M_hat, as a matrix, is what it was."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(70, 512, generator=generator).to(dtype))
    group = [{"params": [("w", param)], "role": "matrix"}]
    optimizer = WeLoreAdamW(
        group, lr=1e-3, rank=33, average_steps=2, reallocate_every=2, hysteresis=0.0, state_dtype=state_dtype
    )
    steady = torch.randn(70, 3, generator=generator) @ torch.randn(3, 512, generator=generator)

    def step() -> None:
        param.grad = (steady + 1e-3 * torch.randn(70, 512, generator=generator)).to(dtype)
        optimizer.step()

    def lifted() -> Tensor:
        state = optimizer.state[param]
        width = param.shape[1] if "age" in state else state["column_age"].numel()
        exp_avg = read(state, "exp_avg", slice(None), width, torch.float32)
        if "age" in state:
            return exp_avg.float() / (1 - 0.9 ** float(state["age"]))
        return ((exp_avg.float() / (1 - 0.9 ** state["column_age"].clamp(min=1))) @ state["basis"].float()).mT

    step()
    for budget, dense in ((10**7, True), (None, False), (10**7, True)):
        before = lifted()
        optimizer.param_groups[0]["budget_bytes"] = budget
        step()
        state = optimizer.state[param]
        assert ("age" in state) == dense
        assert ("exp_avg_scale" in state) == (state_dtype == "8bit")
        assert (lifted() - before).norm() < 0.05 * before.norm()
        assert (state["age"] if dense else state["column_age"].max()) == state["step"]
        step()
    assert param.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("source", ["weight", "gradient", "mixed"])
@pytest.mark.parametrize(
    ("score", "settings"),
    [
        ("energy", {"rank": 3}),
        ("energy_per_cost", {"budget_bytes": 3000}),
        ("relative", {"multiple": 2, "floor": 2}),
        ("minmax", {"budget_bytes": 2400, "multiple": 3}),
        ("uniform", {"budget_bytes": 4567}),
        ("energy", {"budget_bytes": 3333, "state_dtype": "bfloat16"}),
    ],
)
def test_the_budget_is_never_exceeded(source: str, score: str, settings: dict[str, Any]) -> None:
    model = Three()
    optimizer = create(model, source=source, score=score, hysteresis=0.0, **settings)
    rank = settings.get("rank", 4)
    uniform = create(Three(), score="uniform", rank=rank, state_dtype=settings.get("state_dtype"))
    budget = settings.get("budget_bytes", budgeted_bytes(uniform))
    arguments = {"rank": 4, "source": source, "score": score, **settings}
    assert optim.predicted_state_bytes("welore_adamw", groups(model), **arguments) == optim.state_bytes(optimizer)
    for step in range(STEPS):
        assert budgeted_bytes(optimizer) <= budget
        train(model, optimizer, step, step + 1)
        found = optim.predicted_state_bytes("welore_adamw", groups(model), ranks=optimizer.ranks, **arguments)
        assert found == budgeted_bytes(optimizer)
        for name, rank in optimizer.ranks.items():
            k = min(SHAPES[name])
            assert rank == k or rank % settings.get("multiple", 1) == 0
            assert min(k, settings.get("floor", 1)) <= rank <= k


def test_a_larger_budget_never_takes_rank() -> None:
    found = []
    for budget in range(1500, 6000, 500):
        model = Three()
        optimizer = create(model, budget_bytes=budget)
        train(model, optimizer, 0, 3)
        found.append(tuple(optimizer.ranks.values()))
    assert all(a <= b for low, high in pairwise(found) for a, b in zip(low, high, strict=True))
    assert len(set(found)) > 4


def test_the_sums_of_gradients_exist_before_an_allocation_only() -> None:
    model = Three()
    optimizer = create(model)
    window = {0, 1, 2, 4, 5, 6, 8, 9, 10}
    squares = sum(min(shape) ** 2 for shape in SHAPES.values())
    for step in range(9):
        assert optim.state_bytes(optimizer) - budgeted_bytes(optimizer) == 8 * squares * (step in window)
        assert all(optimizer.coordinates_suffice(slot) == (step in (3, 7) and "age" not in slot.state)
                   for slot in optimizer.slots())  # fmt: skip
        train(model, optimizer, step, step + 1)


def test_a_smaller_rank_in_8_bits_may_cost_more_and_the_higher_is_taken() -> None:
    """Of 300 x 131 rank 31 is stored whole, 32 is not."""
    param = nn.Parameter(torch.empty(131, 300))

    def of(**settings: Any) -> WeLoreAdamW:
        return WeLoreAdamW([{"params": [("w", param)], "role": "matrix"}], state_dtype="8bit", **settings)

    assert of(rank=30, score="uniform").ranks == {"w": 32}
    assert budgeted_bytes(of(rank=30, score="uniform")) < budgeted_bytes(of(ranks={"w": 30}))
    assert of(rank=16, score="uniform", multiple=5).ranks == {"w": 35}


def test_groups_added_later_get_what_is_left() -> None:
    model = Three()
    whole = budgeted_bytes(create(model, score="uniform"))
    first = {"params": [("a", model.a), ("b", model.b)], "role": "matrix"}
    rest = {"params": [("c", model.c)], "role": "matrix"}
    optimizer = WeLoreAdamW([dict(first)], **SETTINGS, budget_bytes=whole)
    assert optimizer.ranks["a"] > 4
    optimizer.add_param_group(dict(rest))
    assert optimizer.ranks == {"a": 4, "b": 4, "c": 4}, "nothing was learnt yet"
    optimizer = WeLoreAdamW([dict(first)], **SETTINGS)
    for step in range(4):
        model.a.grad, model.b.grad = gradient("a", step), gradient("b", step)
        optimizer.step()
    before = optimizer.ranks
    assert before != {"a": 4, "b": 4}
    optimizer.add_param_group(dict(rest))
    assert {**optimizer.ranks, "c": 0} == {**before, "c": 0}
    assert budgeted_bytes(optimizer) <= whole
    train(model, optimizer, 4, 12)
    assert budgeted_bytes(optimizer) <= whole
    for group in optimizer.param_groups:
        group["budget_bytes"] = whole
    with pytest.raises(ValueError, match="too small"):
        optimizer.add_param_group(
            {"params": [("big", nn.Parameter(torch.ones(500, 400)))], "role": "matrix", "budget_bytes": whole}
        )
    assert len(optimizer.ranks) == len(optimizer.state) == 3


def bytes_of_each(ranks: Mapping[str, int]) -> list[int]:
    return [
        sum(value.numel() * value.element_size() for value in state.values())
        for state in create(Three(), ranks=ranks).state.values()
    ]


@pytest.mark.parametrize("factor", [0.0, 0.999, 1.001, 100.0])
def test_a_change_is_taken_if_it_moves_enough(factor: float) -> None:
    """The one after step 11; the first always is."""
    old, new = (dict(zip(SHAPES, HISTORY[step], strict=True)) for step in (3, 11))
    moved = sum(abs(a - b) for a, b in zip(bytes_of_each(old), bytes_of_each(new), strict=True))
    budget = sum(bytes_of_each(dict.fromkeys(SHAPES, 4)))
    model = Three()
    optimizer = create(model, hysteresis=factor * moved / budget)
    train(model, optimizer, 0, 3)
    assert optimizer.ranks == old
    train(model, optimizer, 3, 11)
    assert optimizer.ranks == (new if factor < 1 else old)


def test_without_an_interval_only_the_first() -> None:
    model = Three()
    optimizer = create(model, reallocate_every=None)
    train(model, optimizer, 0, STEPS)
    assert tuple(optimizer.ranks.values()) == HISTORY[3]


# ------------------------------------------------------------------------------------------------------- bad gradients


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    model = Three()
    optimizer = create(model)
    train(model, optimizer, 0, 1)
    before = optimizer.state[model.a]["gradient_gram"].clone()
    model.a.grad = torch.full_like(model.a, torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert torch.equal(optimizer.state[model.a]["gradient_gram"], before)


def test_a_spectrum_that_is_not_finite_keeps_all_ranks() -> None:
    model = Three()
    optimizer = create(model, source="weight")
    with torch.no_grad():
        model.b[0, 0] = torch.nan
    with pytest.warns(
        UserWarning, match=r"the spectrum of 'b' is not known .*ranks were not chosen anew \(1 times now\)"
    ):
        train(model, optimizer, 0, 1)
    assert set(optimizer.ranks.values()) == {4}
    assert optimizer.skipped_allocations == 1
    with torch.no_grad():
        model.b.copy_(Three().b)
    train(model, optimizer, 1, 5)
    assert optimizer.skipped_allocations == 1


def test_a_step_of_zero_gradients_is_not_counted() -> None:
    """Nor of dense matrices, which begin like the others with a gradient."""
    for settings in ({}, {"budget_bytes": 10**9}):
        model = Three()
        optimizer = create(model, **settings)
        before = everything(model, optimizer)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert_equal(everything(model, optimizer), before)


# ------------------------------------------------------------------------------------------------------------- sharded


def shard(model: nn.Module, placement: str) -> None:
    """Along the dimension that is not projected, or along the one that is; uneven."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, param in list(model.named_parameters()):
        unprojected = 0 if param.shape[0] >= param.shape[1] else 1
        dim = unprojected if placement == "preferred" else 1 - unprojected
        value = distribute_tensor(param.detach(), mesh, [Shard(dim)], src_data_rank=None)
        setattr(model, name, nn.Parameter(value))


CASES: dict[str, dict[str, Any]] = {
    "gradient": {},
    "mixed": {"source": "mixed", "basis": "svd", "weight_decay": 0.1},
    "weight": {"source": "weight", "hysteresis": 0.0},
}


def trained(placement: str | None) -> dict[str, tuple[list[dict[str, int]], dict[str, Tensor]]]:
    """By case: ranks after every step; weights and state."""
    results = {}
    for case, settings in CASES.items():
        model = Three()
        if placement is not None:
            shard(model, placement)
        optimizer = create(model, **settings)
        history = []
        for step in range(STEPS):
            train(model, optimizer, step, step + 1)
            history.append(optimizer.ranks)
        results[case] = (history, everything(model, optimizer))
    return results


@pytest.mark.parametrize(
    ("world_size", "placement"), [(1, "turned"), (2, "preferred"), (2, "turned"), (4, "preferred"), (4, "turned")]
)
def test_sharded_equals_one_process(world_size: int, placement: str) -> None:
    expected = trained(None)
    assert all(any(set(ranks.values()) != {4} for ranks in history) for history, _ in expected.values())
    by_rank = run_distributed(trained, world_size, placement)
    for results in by_rank:
        for case, (history, final) in results.items():
            assert history == expected[case][0], case
            assert_equal(final, expected[case][1], 1e-10)
            replicated = {key: value for key, value in final.items() if key.endswith(("basis", "gradient_gram", "age"))}
            assert_equal(replicated, {key: by_rank[0][case][1][key] for key in replicated})


def test_8_bits_sharded_within_blocks() -> None:
    """To AdamW and back, where shards share blocks of 128; 600 columns in 2."""

    def run(dim: int | None) -> tuple[list[int], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(70, 600, generator=generator)
        if dim is not None:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            value = distribute_tensor(value, mesh, [Shard(dim)], src_data_rank=None)
        param = nn.Parameter(value)
        group = [{"params": [("w", param)], "role": "matrix"}]
        optimizer = WeLoreAdamW(
            group, lr=1e-3, rank=33, average_steps=1, reallocate_every=1, hysteresis=0.0, state_dtype="8bit"
        )
        history = []
        for budget in (None, None, 10**7, 10**7, None, None):
            for parameters in optimizer.param_groups:
                parameters["budget_bytes"] = budget
            grad = torch.randn(70, 600, generator=generator)
            param.grad = laid_out_as(param, grad * torch.linspace(0.1, 3, 600))
            optimizer.step()
            history.append(optimizer.ranks["w"])
        return history, all_whole({"w": param, **optimizer.state[param]})

    ranks, expected = run(None)
    assert [rank == 70 for rank in ranks] == [False, False, True, True, False, False]
    for dim in (0, 1):
        for found, values in run_distributed(run, 2, dim):
            assert found == ranks
            assert (values["w"] - expected["w"]).abs().max() < 1e-4, "a code of 8 bits may fall the other way"
            assert (values["exp_avg"].int() - expected["exp_avg"].int()).abs().float().mean() < 0.05


def test_what_is_communicated() -> None:
    """Sums of gradients before an allocation, in one all-reduce; nothing in an ordinary step."""

    def worker() -> list[list[int]]:
        model = Three()
        shard(model, "preferred")
        optimizer = create(model, refresh_interval=100)
        train(model, optimizer, 0, 1)
        recorded = []
        for step in (1, 3, 4):
            with AllReduces() as collectives:
                train(model, optimizer, step, step + 1)
            recorded.append(collectives.bytes)
            if step == 1:
                train(model, optimizer, 2, 3)
        return recorded

    squares = 8 * sum(min(shape) ** 2 for shape in SHAPES.values())
    assert run_distributed(worker, 2) == [[[squares], [], [squares]]] * 2


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("saved_at", range(0, STEPS, 2))
def test_resuming_is_bit_exact(saved_at: int) -> None:
    """Between allocations and while one is prepared; into an optimizer of other ranks and settings."""
    model = Three()
    optimizer = create(model)
    train(model, optimizer, 0, saved_at)
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    found = everything(model, optimizer)
    train(model, optimizer, saved_at, STEPS)
    for settings in ({"rank": 1}, {"budget_bytes": 10**6}, {"ranks": {"a": 2, "b": 3, "c": 6}}):
        twin = Three()
        twin.load_state_dict(saved[0])
        resumed = create(twin, **settings)
        resumed.load_state_dict(copy.deepcopy(saved[1]))
        assert_equal(everything(twin, resumed), found)
        train(twin, resumed, saved_at, STEPS)
        assert_equal(everything(twin, resumed), everything(model, optimizer))


def test_copies_know_their_ranks() -> None:
    model = Three()
    optimizer = create(model)
    train(model, optimizer, 0, 5)
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.ranks == optimizer.ranks
    train(model, optimizer, 5, STEPS)
    train(twin, copied, 5, STEPS)
    assert_equal(everything(twin, copied), everything(model, optimizer))


def shapes_in(folder: str) -> dict[str, dict[str, tuple[int, ...]]]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry, about in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if entry.startswith("optim.state."):
            name, _, key = entry.removeprefix("optim.state.").rpartition(".")
            shapes.setdefault(name, {})[key] = tuple(about.size)
    return shapes


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("saved_at", "way"), [(5, "shapes"), (11, "shapes"), (11, "ranks")])
def test_a_checkpoint_of_two_ranks_loads_in_one_process(tmp_path: Any, saved_at: int, way: str) -> None:
    """With torch.distributed.checkpoint alone, as the class says."""
    settings = {} if way == "shapes" else {"average_steps": 1}  # no sum is waiting

    def save() -> dict[str, int]:
        model = Three()
        shard(model, "turned")
        optimizer = create(model, **settings)
        train(model, optimizer, 0, saved_at)
        dcp.save(
            {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}, checkpoint_id=tmp_path
        )
        return optimizer.ranks

    ranks, _ = run_distributed(save, 2)
    model, plain = Three(), Three()
    optimizer = create(model, **settings, **({"ranks": ranks} if way == "ranks" else {}))
    if way == "shapes":
        optimizer.prepare_to_load(shapes_in(str(tmp_path)))
    assert optimizer.ranks == ranks
    state = {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizer, state["optim"])
    train(model, optimizer, saved_at, STEPS)
    expected = create(plain, **settings)
    train(plain, expected, 0, STEPS)
    assert_equal(everything(model, optimizer), everything(plain, expected), 1e-10)


@pytest.mark.parametrize("saved_at", [5, 8])
def test_the_trainer_takes_over_the_ranks_of_a_checkpoint(tmp_path: Any, saved_at: int) -> None:
    def worker() -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh, dist.group.WORLD)
        folder = Checkpoints(tmp_path, ranks, keep=1, asynchronous=False)
        model, twin = Three(), Three()
        for each in (model, twin):
            shard(each, "preferred")
        optimizer, resumed = create(model), create(twin)
        train(model, optimizer, 0, saved_at)
        extra = {"extra": {"rank": torch.tensor(1)}}
        folder.save(saved_at, model, optimizer, extra, {})
        dist.barrier()  # the first rank gives it its name
        folder.load(tmp_path / f"step-{saved_at}", twin, resumed, {})
        assert_equal(everything(twin, resumed), everything(model, optimizer))
        train(model, optimizer, saved_at, STEPS)
        train(twin, resumed, saved_at, STEPS)
        assert_equal(everything(twin, resumed), everything(model, optimizer))

    run_distributed(worker, 2)


def damaged(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    other = copy.deepcopy(saved)
    other["param_groups"][0]["basis"] = "svd"
    yield other
    other = copy.deepcopy(saved)
    del other["state"][1]["basis"]
    yield other
    other = copy.deepcopy(saved)
    other["state"][2]["exp_avg"] = torch.zeros(9, 3)
    yield other


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model, twin = Three(), Three()
    optimizer, other = create(model), create(twin)
    train(twin, other, 0, 5)
    train(model, optimizer, 0, 2)
    before = everything(model, optimizer)
    for saved in damaged(other.state_dict()):
        with pytest.raises(ValueError, match="it was written "):
            optimizer.load_state_dict(saved)
        assert_equal(everything(model, optimizer), before)
    optimizer.prepare_to_load({})
    optimizer.prepare_to_load({"a": {"exp_avg": (3,)}, "unknown": {"step": ()}})
    assert_equal(everything(model, optimizer), before)


# ------------------------------------------------------------------------------------------------------ fused backward


class Runs(nn.Module):
    """Forward: an input's part of the loss whose gradient is what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.three = Three()

    def forward(self, step: int, share: float) -> Tensor:
        return sum((share * param * gradient(name, step)).sum() for name, param in self.three.named_parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_fused_backward_equals_plain(count: int) -> None:
    """Across changes of rank, which it must notice; micro-batches add up to the gradient."""
    results = []
    for fused in (False, True):
        model = Runs()
        optimizer = create(model.three, refresh_interval=100)
        if fused:
            optim.attach_to_backward(model, optimizer, accumulation_steps=count)
        for step in range(STEPS):
            for _ in range(count):
                model(step, 1 / count).backward()
            if fused:
                assert all(param.grad is None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model.three, optimizer))
    assert_equal(results[1], results[0], 0.0 if count == 1 else 1e-12)


def test_global_clipping_works_across_an_allocation_where_it_is_accepted() -> None:
    """A matrix that becomes dense afterwards keeps its gradient until ``step``."""
    results = []
    for fused in (False, True):
        model = Runs()
        optimizer = create(model.three, source="weight", reallocate_every=4, hysteresis=0.0)
        if fused:
            optim.attach_to_backward(model, optimizer, max_norm=0.5)
        for step in range(6):
            model(step, 1.0).backward()
            if not fused:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model.three, optimizer))
    assert_equal(results[1], results[0], 1e-10)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "activations"}, r"^source='activations' for 'a'; expected one of weight, gradient, mixed$"),
        ({"score": "entropy"}, r"^score='entropy' for 'a'; expected one of minmax, "),
        ({"basis": "dct"}, r"^basis='dct' for 'a'; expected one of subspace, power, svd$"),
        ({"basis": "nothing"}, r"basis='nothing'"),
        ({"residual": "apolo"}, r"^residual='apolo'; did you mean"),
        ({"budget_bytes": 0}, r"^budget_bytes=0 for 'a'; expected a whole number >= 1 or None$"),
        ({"budget_bytes": 1e6}, r"^budget_bytes=1000000\.0 for 'a'"),
        ({"multiple": 0}, r"^multiple=0 for 'a'; expected a whole number >= 1$"),
        ({"floor": True}, r"^floor=True for 'a'"),
        ({"reallocate_every": 0}, r"^reallocate_every=0 for 'a'; expected a whole number >= 1 or None$"),
        ({"average_steps": 0}, r"^average_steps=0 for 'a'"),
        ({"average_steps": 9}, r"^reallocate_every=4 for 'a' is less than the average_steps=9 "),
        ({"hysteresis": -0.1}, r"^hysteresis=-0\.1 for 'a'; expected a number >= 0$"),
        ({"hysteresis": float("nan")}, r"^hysteresis=nan for 'a'"),
        ({"rank": 7}, r"^rank=7 exceeds min\(m, n\)=6 for 'c'"),
        ({"budget_bytes": 100}, r"^a budget of 100 is too small: the least ranks cost .*; raise budget_bytes"),
        ({"rank": 1, "floor": 4}, r"^a budget of .* is too small.*lower floor"),
        ({"ranks": {"a": 2, "b": 2, "c": 2, "d": 2}}, r"^ranks has an entry for 'd', which is no matrix"),
        ({"ranks": {"a": 2, "b": 2}}, r"^ranks has no entry for 'c'; expected one for every matrix"),
        ({"ranks": {"a": 9, "b": 2, "c": 2}}, r"^rank=9 exceeds min\(m, n\)=8 for 'a'"),
        ({"ranks": {"a": 0, "b": 2, "c": 2}}, r"^rank=0 for 'a' of shape \(12, 8\); expected a whole number"),
        ({"ranks": {"a": None, "b": 2, "c": 2}}, r"^rank=None for 'a'; expected a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(Three(), **settings)


def test_settings_of_the_allocation_are_the_same_in_all_groups() -> None:
    model = Three()
    first = {"params": [("a", model.a)], "role": "matrix"}
    other = {"params": [("c", model.c)], "role": "matrix", "score": "minmax"}
    with pytest.raises(ValueError, match=r"'c' has score='minmax' and 'a' has 'energy'; expected the same for all"):
        WeLoreAdamW([first, other])
    WeLoreAdamW([first, {**other, "score": "energy", "rank": 3, "refresh_interval": 7}])


def test_every_matrix_has_a_name_of_its_own() -> None:
    model = Three()
    WeLoreAdamW([{"params": [model.a, model.b, model.c], "role": "matrix"}])
    WeLoreAdamW([{"params": [model.a, model.b], "role": "matrix"}, {"params": [model.c], "role": "vector"}])
    twice = [("w", model.a)], [("w", model.b)]
    with pytest.raises(ValueError, match=r"2 parameters are called 'w'; .*optim\.param_groups\(model\)"):
        WeLoreAdamW([{"params": named, "role": role} for named, role in zip(twice, ("matrix", "vector"), strict=True)])


def test_a_model_without_matrices_is_adamw() -> None:
    model = nn.LayerNorm(4)
    optimizer = optim.create("welore_adamw", model)
    run_steps(model, optimizer, 0, 12)
    assert (optimizer.ranks, optimizer.figures()) == ({}, {})


def test_given_ranks_are_kept() -> None:
    model = Three()
    ranks = {"a": 2, "b": 7, "c": 5}  # for the last AdamW takes less
    optimizer = create(model, ranks=ranks)
    assert optimizer.ranks == {**ranks, "c": 6}
    assert not any("gradient_gram" in state for state in optimizer.state.values())
    train(model, optimizer, 0, STEPS)
    assert optimizer.ranks == {**ranks, "c": 6}
    assert isinstance(model.a, nn.Parameter)
    assert not isinstance(model.a, DTensor)
