"""Every published low-rank method, and every combination of their parts, against the slow reference; special settings.

The reference chooses its own directions wherever they follow from the gradients. Drawn ones, and the start of an
iteration, are those the optimizer drew, and that they are drawn as they should be is tested here separately.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import find_basis
from lowrank_train.optim.low_rank.bases.svd import SubspaceIteration
from tests.optim.models import gradient
from tests.reference import directions
from tests.reference.low_rank import ReferenceLowRankAdamW

STEPS = 20
REFRESH_INTERVAL = 7  # directions are chosen at steps 0, 7 and 14
RANKS = {(12, 24): 4, (24, 12): 4, (8, 8): 3, (17, 6): 2, (6, 17): 2, (5, 4): 2}
POWERS_OF_TWO = {(8, 8): 3, (5, 4): 2, (4, 9): 2, (16, 30): 5}
TWICE = (17, 6)  # two matrices of one shape, whose work may be shared

ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.97), "eps": 1e-6}

Starts = dict[tuple[int, int], np.ndarray]
Groups = list[dict[str, Any]]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    """The matrices (r, d) that subspace iterations have started from, by (d, r)."""
    seen: Starts = {}
    original = SubspaceIteration.start

    def start(self: SubspaceIteration, d: int, r: int, like: Tensor, seed: int) -> dict[str, Tensor]:
        drawn = original(self, d, r, like, seed)
        seen[d, r] = drawn["basis"].double().numpy().copy()
        return drawn

    monkeypatch.setattr(SubspaceIteration, "start", start)
    return seen


def gradient_at(name: str, shape: tuple[int, int], step: int) -> Tensor:
    """Of growing and shrinking size, so that the limiter of Fira and APOLLO is met on both sides."""
    return (1 + 0.8 * math.sin(step)) * gradient(name, torch.Size(shape), step)


def gradient_of_some_rows(name: str, shape: tuple[int, int], step: int) -> Tensor:
    """As of tokens that do not occur: two rows in three of a tall matrix, columns of a wide one, are 0."""
    whole = gradient_at(name, shape, step)
    in_tall = whole if shape[0] >= shape[1] else whole.mT
    in_tall[step % 3 :: 3] = 0
    in_tall[(step + 1) % 3 :: 3] = 0
    return whole


def matrix(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def one_matrix(param: nn.Parameter, **group: Any) -> Groups:
    return [{"params": [("weight", param)], "role": "matrix", **group}]


def rows_of(optimizer: optim.MatrixOptimizer, group: dict[str, Any], param: Tensor) -> np.ndarray:
    """The directions (r, d) that a matrix has now."""
    state, d = optimizer.state[param], min(param.shape)
    r = state["column_age"].numel()
    chosen = find_basis(group["basis"]).directions(state, d, r, param.detach())
    return chosen.lift(torch.eye(r, dtype=torch.float64)).numpy().copy()


def chooser(basis: str, rows: list[np.ndarray], start: np.ndarray | None) -> directions.Chooser:
    """The reference's own, or one that repeats what was drawn."""
    if basis in ("gaussian", "random"):
        return directions.given(dict(enumerate(rows)))
    if basis == "random_columns":
        return directions.given_columns({step: list(np.nonzero(V)[1]) for step, V in enumerate(rows)})
    if basis in ("subspace", "power"):
        assert start is not None
        return directions.iterated(start, rounds=2 if basis == "subspace" else 1, first=6)
    return {
        "dct": directions.dct,
        "dct_l1": directions.dct_l1,
        "hadamard": directions.hadamard,
        "identity": directions.identity,
        "svd": directions.svd,
    }[basis]


def check(
    make: Callable[[Groups], optim.MatrixOptimizer],
    starts: Starts,
    *,
    basis: str,
    ranks: dict[tuple[int, int], int] | None = None,
    gradient_at: Callable[[str, tuple[int, int], int], Tensor] = gradient_at,
    **settings: Any,
) -> None:
    """One optimizer of many matrices follows one reference per matrix, at every step."""
    ranks = ranks or (POWERS_OF_TWO if basis == "hadamard" else RANKS)
    shapes = [*ranks, TWICE] if TWICE in ranks else list(ranks)
    params = {f"{i} {shape}": matrix(shape) for i, shape in enumerate(shapes)}
    references: dict[str, ReferenceLowRankAdamW] = {}
    groups = [
        {"params": [(name, param)], "role": "matrix", "rank": ranks[tuple(param.shape)]}
        for name, param in params.items()
    ]
    initial = {name: param.detach().numpy().copy() for name, param in params.items()}
    optimizer = make(groups)
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    weights: dict[str, list[np.ndarray]] = {name: [] for name in params}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = gradient_at(name, tuple(param.shape), step)
        optimizer.step()
        for name, param in params.items():
            weights[name].append(param.detach().numpy().copy())
            rows[name].append(rows_of(optimizer, group_of[param], param))

    for name, param in params.items():
        d, r = min(param.shape), ranks[tuple(param.shape)]
        choose = chooser(basis, rows[name], starts.get((d, r)))
        reference = references[name] = ReferenceLowRankAdamW(initial[name], choose=choose, rank=r, **settings)
        for step in range(STEPS):
            reference.step(gradient_at(name, tuple(param.shape), step).numpy())
            where = f"{name} after step {step}"
            assert reference.directions is not None
            np.testing.assert_allclose(
                rows[name][step], reference.directions.rows, rtol=1e-9, atol=1e-9, err_msg=f"directions of {where}"
            )
            np.testing.assert_allclose(weights[name][step], reference.weight, rtol=1e-9, atol=1e-9, err_msg=where)
    chosen_anew = [
        not np.allclose(rows[name][0], rows[name][step])
        for name, param in params.items()
        for step in range(0, STEPS, settings["refresh_interval"])
        if ranks[tuple(param.shape)] < min(param.shape)
    ]
    assert any(chosen_anew) or not chosen_anew, "or refreshes are not tested"


# ------------------------------------------------------------------------------------------------------------- presets

PRESETS: dict[str, dict[str, Any]] = {
    "DCTAdamW": {"basis": "dct", "residual": "drop", "moments": "rotate"},
    "GaLoreAdamW": {"basis": "subspace", "residual": "drop", "moments": "keep", "scale": 0.25},
    "Fira": {"basis": "subspace", "residual": "fira", "moments": "keep", "scale": 0.25},
    "FRUGAL": {"basis": "random_columns", "residual": "sign", "moments": "reset"},
    "APOLLO": {"basis": "gaussian", "residual": "apollo", "moments": "keep"},
    "APOLLOMini": {"basis": "gaussian", "residual": "apollo_mini", "moments": "keep", "scale": math.sqrt(128)},
    "LDAdam": {"basis": "power", "residual": "ldadam", "moments": "rotate", "betas": (0.908, 0.99), "rho": 0.908},
}
DEFAULT_INTERVALS = {"DCTAdamW": 100, "GaLoreAdamW": 200, "Fira": 200, "FRUGAL": 200, "APOLLO": 200, "APOLLOMini": 200}


@pytest.mark.parametrize("name", PRESETS)
def test_published_method_equals_its_reference(name: str, starts: Starts) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    if name != "LDAdam":
        settings["refresh_interval"] = REFRESH_INTERVAL
    ranks = dict.fromkeys(RANKS, 1) if name == "APOLLOMini" else RANKS
    check(
        lambda groups: getattr(optim, name)(groups, **settings),
        starts,
        ranks=ranks,
        **{"refresh_interval": 1, **settings, **PRESETS[name]},
    )


def test_galore_with_exact_singular_vectors(starts: Starts) -> None:
    settings: dict[str, Any] = {**ADAM, "refresh_interval": REFRESH_INTERVAL}
    check(
        lambda groups: optim.GaLoreAdamW(groups, basis="svd", **settings),
        starts,
        **{**settings, **PRESETS["GaLoreAdamW"], "basis": "svd"},
    )


@pytest.mark.parametrize(("name", "interval"), DEFAULT_INTERVALS.items())
def test_published_method_changes_directions_when_its_authors_do(name: str, interval: int) -> None:
    assert inspect.signature(getattr(optim, name)).parameters["refresh_interval"].default == interval


def test_ldadam_changes_directions_at_every_step() -> None:
    weight = matrix((9, 6))
    optimizer = optim.LDAdam(one_matrix(weight, rank=2))
    seen = []
    for step in range(4):
        weight.grad = gradient_at("weight", (9, 6), step)
        optimizer.step()
        seen.append(rows_of(optimizer, optimizer.param_groups[0], weight))
    assert all(not np.allclose(seen[i], seen[i + 1], atol=1e-3) for i in range(3))


def test_apollo_mini_has_one_direction_unless_told_otherwise() -> None:
    weight = matrix((9, 6))
    assert optim.APOLLOMini(one_matrix(weight)).state[weight]["exp_avg"].shape == (9, 1)


# -------------------------------------------------------------------------------------------------- every combination

BASES = [
    "dct",
    "dct_l1",
    "gaussian",
    "hadamard",
    "identity",
    "power",
    "random",
    "random_columns",
    "subspace",
    "svd",
]
RESIDUALS = [
    "apollo",
    "apollo_mini",
    "drop",
    "error_feedback",
    "error_feedback_8bit",
    "fira",
    "fira_released",
    "ldadam",
    "normalized",
    "sign",
]
ANY_DIRECTIONS = ("apollo", "apollo_mini", "drop")  # the others subtract what was projected: orthonormal ones only


def combination(
    basis: str,
    residual: str,
    moments: str,
    starts: Starts,
    *,
    refresh_interval: int = REFRESH_INTERVAL,
    **of_check: Any,
) -> None:
    settings: dict[str, Any] = {
        **ADAM,
        "basis": basis,
        "residual": residual,
        "moments": moments,
        "refresh_interval": 1 if residual == "ldadam" else refresh_interval,
        "scale": 0.7,
        "residual_scale": 1.3,
    }
    check(lambda groups: optim.LowRankAdamW(groups, **settings), starts, rho=0.0, **of_check, **settings)


POSSIBLE = [(b, r) for b in BASES for r in RESIDUALS if b != "gaussian" or r in ANY_DIRECTIONS]
EACH = {("gaussian", "drop"), *((b, r) for b, r in POSSIBLE if b == "dct" or r == "error_feedback")}
"""Every basis with one residual, every residual with one basis: they meet in ``project`` and ``lift`` alone."""
DRAWN = random.Random(0).sample([pair for pair in POSSIBLE if pair not in EACH], 15)


@pytest.mark.parametrize(("basis", "residual"), [*sorted(EACH), *DRAWN])
def test_residual_in_basis_equals_its_reference(basis: str, residual: str, starts: Starts) -> None:
    combination(basis, residual, "keep" if basis == "gaussian" else "rotate", starts)


@pytest.mark.parametrize("residual", [r for r in RESIDUALS if r not in ANY_DIRECTIONS])
def test_directions_that_are_not_orthonormal_are_refused(residual: str) -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        optim.LowRankAdamW(one_matrix(matrix((9, 6))), basis="gaussian", residual=residual, rank=2)


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize(
    ("basis", "residual"), [*((b, "drop") for b in BASES), ("dct", "fira"), ("dct", "error_feedback")]
)
def test_moments_in_basis_equal_their_reference(basis: str, moments: str, residual: str, starts: Starts) -> None:
    combination(basis, residual, moments, starts)


@pytest.mark.parametrize(
    ("basis", "residual"),
    [
        *(("random_columns", residual) for residual in RESIDUALS if residual != "ldadam"),
        *((basis, residual) for basis in ("dct", "power", "random") for residual in ("drop", "error_feedback")),
    ],
)
def test_new_directions_at_every_step_equal_their_reference(basis: str, residual: str, starts: Starts) -> None:
    """But power iteration on a rounded error: the reference itself turns 1e-15 into 1e-2 within 20 such steps."""
    combination(basis, residual, "rotate", starts, refresh_interval=1)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("rank", [1, None], ids=["one_direction", "all_directions"])
def test_extreme_ranks_equal_their_reference(rank: int | None, residual: str, starts: Starts) -> None:
    """All directions: of unit vectors, so that the discarded part is exactly 0 and has no sign."""
    ranks = {shape: rank or min(shape) for shape in RANKS}
    combination("identity", residual, "rotate", starts, ranks=ranks)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("basis", ["dct", "svd"])
def test_blocks_of_rows_equal_their_reference(
    basis: str, residual: str, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks as small as they get, and with every matrix summed up by itself."""
    monkeypatch.setattr("lowrank_train.optim.shards.blocks._CPU_BLOCK_NUMBERS", 1)
    monkeypatch.setattr("lowrank_train.optim.low_rank.engine._CHUNK_NUMBERS", 1)
    combination(basis, residual, "rotate", starts, ranks={(40, 6): 2, (6, 40): 2, (33, 17): 4, (17, 6): 2})


@pytest.mark.parametrize("residual", [r for r in RESIDUALS if not r.endswith("bit")])
@pytest.mark.parametrize("basis", ["dct", "random"])
def test_rows_without_gradient_equal_their_reference(basis: str, residual: str, starts: Starts) -> None:
    ranks = {shape: 2 for shape in RANKS if max(shape) > 10}
    # Not the rounded errors: a row of 4-bit codes, projected, gives halves of a code, which round-off sends either way.
    combination(basis, residual, "rotate", starts, ranks=ranks, gradient_at=gradient_of_some_rows)


def test_matrices_of_one_optimizer_may_be_treated_differently() -> None:
    treatments = [
        {"basis": "dct", "residual": "fira", "moments": "keep", "refresh_interval": 3},
        {"basis": "svd", "residual": "apollo_mini", "moments": "rotate", "refresh_interval": 4},
        {"basis": "identity", "residual": "sign", "moments": "reset", "refresh_interval": 1},
        {"basis": "dct_l1", "residual": "error_feedback_8bit", "moments": "rotate", "refresh_interval": 7},
    ]
    params = [matrix((9, 6)) for _ in treatments]
    initial = [param.detach().numpy().copy() for param in params]
    optimizer = optim.LowRankAdamW(
        [
            {"params": [(str(i), param)], "role": "matrix", **treatment}
            for i, (param, treatment) in enumerate(zip(params, treatments, strict=True))
        ],
        rank=2,
        **ADAM,
    )
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = gradient_at(str(i), (9, 6), step)
        optimizer.step()
    for i, treatment in enumerate(treatments):
        settings = {key: value for key, value in treatment.items() if key != "basis"}
        choose = chooser(str(treatment["basis"]), [], None)
        reference = ReferenceLowRankAdamW(initial[i], choose=choose, rank=2, **ADAM, **settings)  # type: ignore[arg-type]
        for step in range(STEPS):
            reference.step(gradient_at(str(i), (9, 6), step).numpy())
        np.testing.assert_allclose(params[i].detach().numpy(), reference.weight, rtol=1e-9, atol=1e-9, err_msg=str(i))


# ---------------------------------------------------------------------------------------------- drawn directions


@pytest.mark.parametrize("basis", ["gaussian", "random", "random_columns"])
def test_drawn_directions(basis: str) -> None:
    """New at a refresh and then only, of the right distribution, and the same in every run."""
    r, d = 24, 60
    runs = []
    for _ in range(2):
        weight = matrix((70, d))
        optimizer = optim.LowRankAdamW(
            one_matrix(weight), basis=basis, residual="drop", moments="keep", rank=r, refresh_interval=2
        )
        seen = []
        for step in range(6):
            weight.grad = gradient_at("weight", (70, d), step)
            optimizer.step()
            seen.append(rows_of(optimizer, optimizer.param_groups[0], weight))
        runs.append(seen)
    for step in range(6):
        np.testing.assert_array_equal(runs[0][step], runs[1][step])
        if step:
            assert np.array_equal(seen[step], seen[step - 1]) == (step % 2 == 1)
    weight = matrix((70, d))
    other = optim.LowRankAdamW(one_matrix(weight), basis=basis, residual="drop", moments="keep", rank=r, seed=1234)
    weight.grad = gradient_at("weight", (70, d), 0)
    other.step()
    assert not np.array_equal(rows_of(other, other.param_groups[0], weight), seen[0])
    for V in seen[::2]:
        if basis == "gaussian":  # N(0, 1/r): mean 0, variance 1/r, to four standard errors
            count = r * d
            assert abs(V.mean()) < 4 * (1 / r / count) ** 0.5
            assert abs(V.var() - 1 / r) < 4 / r * (2 / count) ** 0.5
            assert 0.9 < (np.abs(V) < 1 / r**0.5).mean() / 0.6827 < 1.1
        else:
            np.testing.assert_allclose(V @ V.T, np.eye(r), atol=1e-12)
        if basis == "random":
            share = np.sum(V**2, axis=0)  # of each coordinate in the span; r / d on average, none left out
            assert 0.05 < share.min() < share.max() < 0.95
        if basis == "random_columns":
            assert set(np.unique(V)) == {0.0, 1.0}
            assert list(np.nonzero(V)[1]) == sorted(np.nonzero(V)[1])


# ----------------------------------------------------------------------------------------------------- special settings

NOTHING_DISCARDED = [r for r in RESIDUALS if r not in ("apollo", "apollo_mini")]


@pytest.mark.parametrize("residual", NOTHING_DISCARDED)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (8, 8)])
def test_all_unit_vectors_make_adamw(residual: str, shape: tuple[int, int]) -> None:
    ours = matrix(shape)
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = optim.LowRankAdamW(
        one_matrix(ours),
        basis="identity",
        residual=residual,
        moments="rotate",
        rank=min(shape),
        refresh_interval=1,
        **ADAM,
    )
    adamw = torch.optim.AdamW([theirs], **ADAM)
    for step in range(STEPS):
        ours.grad = gradient_at("weight", shape, step)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("basis", ["dct", "hadamard", "svd", "random", "subspace"])
@pytest.mark.parametrize("residual", ["drop", "error_feedback", "normalized"])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (8, 8)])
def test_all_directions_make_adamw_in_a_rotated_basis(basis: str, residual: str, shape: tuple[int, int]) -> None:
    is_wide, d = shape[0] < shape[1], min(shape)
    ours = matrix(shape)
    optimizer = optim.LowRankAdamW(
        one_matrix(ours), basis=basis, residual=residual, rank=d, refresh_interval=1000, **ADAM
    )
    ours.grad = gradient_at("weight", shape, 0)
    before = ours.detach().clone()
    optimizer.step()
    V = torch.from_numpy(rows_of(optimizer, optimizer.param_groups[0], ours))

    def rotated(tensor: Tensor) -> Tensor:
        return (tensor.mT if is_wide else tensor) @ V.mT

    theirs = nn.Parameter(rotated(before))
    adamw = torch.optim.AdamW([theirs], **ADAM)
    for step in range(STEPS):
        ours.grad = gradient_at("weight", shape, step)
        if step:
            optimizer.step()
        theirs.grad = rotated(ours.grad)
        adamw.step()
        assert (rotated(ours.detach()) - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("basis", [basis for basis in BASES if basis not in ("gaussian", "random_columns")])
@pytest.mark.parametrize("residual", ["sign", "normalized", "fira"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_all_directions_nothing_is_left_to_be_scaled(basis: str, residual: str, dtype: torch.dtype) -> None:
    """A - lift(g) is round-off then, of which every sign is as large as an update. Keys and values of GQA are like it:
    256 rows, at a rank of 256."""
    finals = []
    for name in (residual, "drop"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 8, dtype=dtype))
        optimizer = optim.LowRankAdamW(one_matrix(weight), basis=basis, residual=name, rank=8, refresh_interval=100)
        for step in range(8):
            weight.grad = gradient_at("weight", (16, 8), step).to(dtype)
            optimizer.step()
        finals.append(weight.detach())
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["fira", "fira_released"])
def test_a_gradient_inside_the_directions_does_not_arm_the_limiter(residual: str) -> None:
    """|S| is exactly 0 then, and the next step is free to have any size: it is not held to 1.01 times round-off."""
    weight = matrix((12, 9))
    initial = weight.detach().numpy().copy()
    optimizer = optim.LowRankAdamW(
        one_matrix(weight), basis="identity", residual=residual, rank=3, refresh_interval=100, **ADAM
    )
    reference = ReferenceLowRankAdamW(
        initial,
        choose=directions.identity,
        residual=residual,
        moments="rotate",
        rank=3,
        refresh_interval=100,
        **ADAM,
    )
    for step in range(8):
        weight.grad = gradient_at("weight", (12, 9), step)
        if step == 3:
            weight.grad *= (
                optimizer.state[weight]["basis_index"]
                .new_zeros(9)
                .index_fill(0, optimizer.state[weight]["basis_index"].long(), 1)
            )
        optimizer.step()
        reference.step(weight.grad.numpy())
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=1e-9, atol=1e-9, err_msg=str(step))


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("basis", ["dct", "power", "svd", "random"])
@pytest.mark.parametrize("refresh_interval", [1, 3])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_ldadam_loses_no_momentum(basis: str, moments: str, refresh_interval: int, shape: tuple[int, int]) -> None:
    """E + lift(M) / (1 - b1) + the sum of lift(M) of all steps before = the sum of all gradients.

    However moments are treated: what a change of directions takes from M comes back with the weight b1 + b1^2 + ...
    that it would have had in all later steps.
    """
    weight = matrix(shape)
    optimizer = optim.LowRankAdamW(
        one_matrix(weight),
        basis=basis,
        residual="ldadam",
        moments=moments,
        rank=2,
        refresh_interval=refresh_interval,
        **ADAM,
    )
    total, applied = 0.0, 0.0
    for step in range(STEPS):
        weight.grad = gradient_at("weight", shape, step)
        total = total + (weight.grad if shape[0] >= shape[1] else weight.grad.mT).numpy()
        optimizer.step()
        state = optimizer.state[weight]
        lifted = state["exp_avg"].numpy() @ rows_of(optimizer, optimizer.param_groups[0], weight)
        owed = state["error_feedback"].numpy()
        np.testing.assert_allclose(owed + lifted / (1 - ADAM["betas"][0]) + applied, total, atol=1e-10)
        applied = applied + lifted


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_frugal_is_adamw_on_its_columns_and_sign_descent_on_the_others(shape: tuple[int, int]) -> None:
    is_wide = shape[0] < shape[1]
    ours = matrix(shape)
    optimizer = optim.FRUGAL(one_matrix(ours, rank=2), weight_decay=0.1, lr=1e-2)
    initial = (ours.detach().mT if is_wide else ours.detach()).clone()
    gradients = [gradient_at("weight", shape, step) for step in range(STEPS)]
    for ours.grad in gradients:
        optimizer.step()
    kept = optimizer.state[ours]["basis_index"].tolist()
    others = [k for k in range(6) if k not in kept]

    adam = nn.Parameter(initial[:, kept].clone())
    adamw = torch.optim.AdamW([adam], lr=1e-2, weight_decay=0.1, eps=optimizer.param_groups[0]["eps"])
    sign = initial[:, others].clone()
    for whole in gradients:
        G = whole.mT if is_wide else whole
        adam.grad = G[:, kept].clone()
        adamw.step()
        sign = (1 - 1e-2 * 0.1) * sign - 1e-2 * G[:, others].sign()
    final = ours.detach().mT if is_wide else ours.detach()
    assert (final[:, kept] - adam).abs().max() < 1e-12
    assert (final[:, others] - sign).abs().max() < 1e-12


def test_a_gradient_in_discarded_columns_alone_moves_those_by_its_sign() -> None:
    """Chosen at the first step, the columns 0 and 1 see nothing at the second but their own momentum."""
    weight = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    optimizer = optim.LowRankAdamW(
        one_matrix(weight), basis="identity", residual="sign", rank=2, refresh_interval=9, lr=1e-2, weight_decay=0.0
    )
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    first[:, :2] = 1.0
    second[:, 2:] = gradient_at("weight", (7, 3), 0)
    weight.grad = first
    optimizer.step()
    assert torch.equal(weight.detach()[:, 2:], torch.zeros(7, 3, dtype=torch.float64)), "the sign of 0 is 0"
    weight.grad = second
    optimizer.step()
    torch.testing.assert_close(weight.detach()[:, 2:], -1e-2 * second[:, 2:].sign(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_scale_0_leaves_the_discarded_part_alone(residual: str) -> None:
    """Decay, and what the residual adds by itself."""
    weight = matrix((9, 6))
    initial = weight.detach().clone()
    optimizer = optim.LowRankAdamW(
        one_matrix(weight),
        basis="identity",
        residual=residual,
        moments="rotate",
        rank=2,
        refresh_interval=1,
        scale=0.0,
        lr=1e-2,
        weight_decay=0.1,
    )
    weight.grad = gradient_at("weight", (9, 6), 0)
    optimizer.step()
    outside = weight.grad.clone()
    outside[:, optimizer.state[weight]["basis_index"]] = 0
    phi = 2**0.5 / (weight.grad - outside).norm(dim=1, keepdim=True)  # the first u is a sign, of 2 elements per row
    added = {
        "sign": outside.sign(),
        "normalized": (4 / 6) ** 0.5 * 6**0.5 * outside / outside.norm(dim=1, keepdim=True),
        "fira": phi * outside,
        "fira_released": phi * weight.grad,
    }.get(residual, torch.zeros_like(initial))
    torch.testing.assert_close(weight.detach(), (1 - 1e-3) * initial - 1e-2 * added, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("residual", ["sign", "normalized"])
def test_residual_scale_0_drops_the_discarded_part(residual: str) -> None:
    finals = []
    for name, settings in ((residual, {"residual_scale": 0.0}), ("drop", {})):
        torch.manual_seed(0)
        weight = matrix((9, 6))
        optimizer = optim.LowRankAdamW(
            one_matrix(weight), basis="dct", residual=name, rank=2, refresh_interval=3, **settings
        )
        for step in range(8):
            weight.grad = gradient_at("weight", (9, 6), step)
            optimizer.step()
        finals.append(weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["APOLLO", "APOLLOMini"])
def test_apollo_moves_along_the_gradient_as_far_as_adam_would_in_its_projection(name: str) -> None:
    """At the first step u is a sign: a row is as long as sqrt(r) |G_i| / |P G_i|; for Mini the matrix."""
    weight = nn.Parameter(torch.zeros(9, 6, dtype=torch.float64))
    rank, scale = (3, 1.0) if name == "APOLLO" else (1, math.sqrt(128))
    optimizer = getattr(optim, name)(one_matrix(weight, rank=rank), lr=1e-2, weight_decay=0.0)
    weight.grad = gradient_at("weight", (9, 6), 0)
    optimizer.step()
    G, V = weight.grad, torch.from_numpy(rows_of(optimizer, optimizer.param_groups[0], weight))
    g = G @ V.mT
    lengths = (rank**0.5 / g.norm(dim=1, keepdim=True)) if name == "APOLLO" else 9**0.5 / g.norm()
    torch.testing.assert_close(weight.detach(), -1e-2 * scale * lengths * G, rtol=1e-5, atol=0)


def test_apollo_with_all_unit_vectors_has_rows_as_long_as_those_of_adam() -> None:
    """As long as the gradient shrinks, so that the limiter is never met."""
    weight = nn.Parameter(torch.zeros(9, 5, dtype=torch.float64))
    theirs = nn.Parameter(torch.zeros(9, 5, dtype=torch.float64))
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.999)}
    optimizer = optim.LowRankAdamW(
        one_matrix(weight), basis="identity", residual="apollo", moments="keep", rank=5, **settings
    )
    adamw = torch.optim.AdamW([theirs], **settings)
    for step in range(4):
        before, their_before = weight.detach().clone(), theirs.detach().clone()
        weight.grad = 0.7**step * gradient("weight", torch.Size((9, 5)), step)
        theirs.grad = weight.grad.clone()
        optimizer.step()
        adamw.step()
        moved, their_move = weight.detach() - before, theirs.detach() - their_before
        torch.testing.assert_close(moved.norm(dim=1), their_move.norm(dim=1), rtol=1e-6, atol=0)
        assert (torch.cosine_similarity(moved, -weight.grad) > 1 - 1e-12).all()


@pytest.mark.parametrize("residual", [r for r in RESIDUALS if not r.endswith("bit")])
@pytest.mark.parametrize("basis", ["dct", "subspace"])
def test_the_size_of_gradients_does_not_matter(basis: str, residual: str) -> None:
    """Adam, and so every method built on it, is invariant to it, up to eps: nothing may be compared with a constant."""
    finals = []
    for size in (1.0, 1e4):
        torch.manual_seed(0)
        weight = matrix((9, 6))
        optimizer = optim.LowRankAdamW(
            one_matrix(weight),
            basis=basis,
            residual=residual,
            moments="rotate",
            rank=2,
            refresh_interval=1 if residual == "ldadam" else 3,
            eps=1e-12,
        )
        for step in range(8):
            weight.grad = size * gradient_at("weight", (9, 6), step)
            optimizer.step()
        finals.append(weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("basis", ["dct", "svd", "random", "gaussian"])
@pytest.mark.parametrize("residual", ["drop", "apollo", "fira", "error_feedback_8bit"])
def test_a_wide_matrix_is_a_tall_one_transposed(basis: str, residual: str) -> None:
    if basis == "gaussian" and residual not in ANY_DIRECTIONS:
        residual = "apollo_mini"
    tall = matrix((9, 6))
    wide = nn.Parameter(tall.detach().mT.clone())
    settings: dict[str, Any] = {"basis": basis, "residual": residual, "moments": "keep", "rank": 2}
    optimizers = [optim.LowRankAdamW(one_matrix(p), refresh_interval=3, **settings) for p in (tall, wide)]
    for step in range(8):
        tall.grad = gradient_at("weight", (9, 6), step)
        wide.grad = tall.grad.mT.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(wide.detach().mT, tall.detach(), rtol=1e-12, atol=1e-13)


def test_in_two_dimensions_hadamard_and_cosine_are_one_basis() -> None:
    finals = []
    for basis in ("dct", "hadamard"):
        torch.manual_seed(0)
        weight = matrix((9, 2))
        optimizer = optim.LowRankAdamW(one_matrix(weight), basis=basis, residual="fira", rank=1, refresh_interval=1)
        for step in range(8):
            weight.grad = gradient_at("weight", (9, 2), step)
            optimizer.step()
        finals.append(weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-12, atol=1e-13)
