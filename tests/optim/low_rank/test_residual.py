"""Each treatment of the discarded part by itself, on blocks made by hand; and the codec of the error feedback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import BASES, Directions
from lowrank_train.optim.low_rank.bases.directions import Columns, Vectors
from lowrank_train.optim.low_rank.residuals import RESIDUALS, Block, Previous, Rates, Residual, find_residual
from lowrank_train.optim.storage.quantization import decode_rows, encode_rows

M, D, R = 12, 9, 3
LR, S, T, BETA1 = 0.1, 0.25, 1.7, 0.8
RATES = Rates(LR, S, T, BETA1)
EPS = 1e-8  # beside |g| in phi

State = dict[str, Tensor]

every_residual = pytest.mark.parametrize("name", RESIDUALS)
ERROR_FEEDBACK = [name for name in RESIDUALS if name.startswith("error_feedback") or name == "ldadam"]
LIMITED = [name for name, residual in RESIDUALS.items() if residual.sums]


def vectors(*, orthonormal: bool = True) -> Vectors:
    normal = torch.randn(D, R, dtype=torch.float64)
    return Vectors((torch.linalg.qr(normal).Q if orthonormal else normal).mT.contiguous())


def new_state(residual: Residual, dtype: torch.dtype = torch.float64) -> State:
    return {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in residual.state_tensors(M, D, dtype).items()}


def rows_of(residual: Residual, state: State, rows: slice) -> State:
    keys = residual.state_tensors(M, D, torch.float64)
    return {key: state[key][rows] for key, spec in keys.items() if spec.layout == "rows"}


def step(
    residual: Residual,
    weight: Tensor,  # (M, D), changed
    gradient: Tensor,
    update: Tensor,  # (M, R)
    directions: Directions,
    state: State,
    *,
    rates: Rates = RATES,
    parts: tuple[int, ...] = (M,),
    previous: Previous | None = None,
    carried: Tensor | None = None,
) -> None:
    """What the optimizer does with a treatment, in blocks of the given heights."""
    ends = torch.tensor(parts).cumsum(0).tolist()
    blocks = []
    for height, end in zip(parts, ends, strict=True):
        rows = slice(end - height, end)
        whole = residual.recall(gradient[rows], rows_of(residual, state, rows))
        before = Previous(previous.directions, previous.exp_avg[rows]) if previous is not None else None
        momentum = carried[rows] if carried is not None else None
        coordinates = directions.project(whole)
        args = (whole, coordinates, update[rows].clone(), directions, momentum, before)
        blocks.append((rows, Block(*args)))
    factor = None
    if residual.sums:
        partial = [residual.partial_sums(block, rates) for _, block in blocks]
        assert all(sums.shape == (residual.sums,) for sums in partial)
        factor = residual.factor(torch.stack(partial).sum(0), state)
    for rows, block in blocks:
        residual.add_(weight[rows], block, rates, rows_of(residual, state, rows), factor)


def random_step() -> tuple[Tensor, Tensor, Tensor]:
    """Weight, gradient, update."""
    weight, gradient = torch.randn(2, M, D, dtype=torch.float64)
    return weight, gradient, torch.randn(M, R, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- the formulas


def phi(u: Tensor, g: Tensor) -> Tensor:
    return u.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + EPS)


def expected_step(name: str, A: Tensor, u: Tensor, V: Tensor) -> Tensor:
    """What is subtracted, over lr, at a first step (so that nothing is limited)."""
    g = A @ V.mT
    outside, inside = A - g @ V, S * u @ V
    if name in ("drop", *ERROR_FEEDBACK):
        return inside
    return {
        "sign": inside + T * outside.sign(),
        "normalized": inside + T * ((D - R) / D) ** 0.5 * outside / outside.square().mean(1, keepdim=True).sqrt(),
        "fira": inside + phi(u, g) * outside,
        "fira_released": inside + phi(u, g) * (A - S * g @ V),
        "apollo": S * phi(u, g) * A,
        "apollo_mini": S * u.norm() / (g.norm() + EPS) * A,
    }[name]


@every_residual
@pytest.mark.parametrize("kind", ["vectors", "columns", "not_orthonormal"])
def test_the_step_is_the_formula(name: str, kind: str) -> None:
    residual = RESIDUALS[name]
    if kind == "not_orthonormal" and residual.needs_orthonormal:
        assert name not in ("drop", "apollo", "apollo_mini")
        return
    directions = {
        "vectors": vectors(),
        "columns": Columns(torch.tensor([0, 4, 7]), D),
        "not_orthonormal": vectors(orthonormal=False),
    }[kind]
    weight, gradient, update = random_step()
    before, given = weight.clone(), gradient.clone()
    step(residual, weight, gradient, update, directions, new_state(residual))
    rows = directions.lift(torch.eye(R, dtype=torch.float64))
    close((before - weight) / LR, expected_step(name, gradient, update, rows))
    assert torch.equal(gradient, given), "gradients are never written"


@every_residual
def test_blocks_of_rows_make_the_whole(name: str) -> None:
    """And so do the shards of several ranks, if ``sums`` are added up."""
    residual, directions = RESIDUALS[name], vectors()
    weight, gradient, update = random_step()
    results = []
    for parts in ((12,), (5, 0, 6, 1)):
        target, state = weight.clone(), new_state(residual)
        for _ in range(2):
            step(residual, target, gradient, update, directions, state, parts=parts)
        results.append([target, *(value.double() for value in state.values())])
    for one, other in zip(*results, strict=True):
        close(other, one)


@every_residual
def test_views_of_weights_are_written_through(name: str) -> None:
    """A wide matrix is worked on transposed."""
    residual, directions = RESIDUALS[name], vectors()
    weight, gradient, update = random_step()
    plain, wide = weight.clone(), weight.mT.contiguous()
    for target in (plain, wide.mT):
        step(residual, target, gradient, update, directions, new_state(residual))
    close(wide.mT, plain)


@every_residual
def test_a_bfloat16_weight_takes_the_float32_step_rounded(name: str) -> None:
    residual, directions = RESIDUALS[name], Vectors(vectors().vectors.float())
    weight, gradient, update = (tensor.float() for tensor in random_step())
    exact, rounded = weight.bfloat16().float(), weight.bfloat16()
    for target in (exact, rounded):
        step(residual, target, gradient, update, directions, new_state(residual, torch.float32))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() <= 2 * 2**-9 * exact.abs().max(), "at most two roundings"


@every_residual
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0, dtype=torch.float64)], ids=["float", "tensor"])
def test_lr_0_moves_nothing(name: str, lr: Any) -> None:
    residual, directions = RESIDUALS[name], vectors()
    weight, gradient, update = random_step()
    before = weight.clone()
    step(residual, weight, gradient, update, directions, new_state(residual), rates=RATES._replace(lr=lr))
    assert torch.equal(weight, before)


@every_residual
def test_a_tensor_lr_is_a_float_lr(name: str) -> None:
    residual, directions = RESIDUALS[name], vectors()
    weight, gradient, update = random_step()
    results = [weight.clone(), weight.clone()]
    for target, lr in zip(results, (LR, torch.tensor(LR, dtype=torch.float64)), strict=True):
        step(residual, target, gradient, update, directions, new_state(residual), rates=RATES._replace(lr=lr))
    close(*results, 1e-14)


@every_residual
def test_no_gradient_and_no_update_move_nothing(name: str) -> None:
    """0 / 0 comes up in phi, in the limiter and in the normalisation."""
    residual, weight = RESIDUALS[name], torch.randn(M, D, dtype=torch.float64)
    before, state = weight.clone(), new_state(residual)
    for _ in range(2):
        step(residual, weight, torch.zeros(M, D).double(), torch.zeros(M, R).double(), vectors(), state)
    assert torch.equal(weight, before)
    assert not residual.recall(torch.zeros(M, D).double(), rows_of(residual, state, slice(None))).any()
    assert not any(state[key].any() for key in state.keys() & {"limiter_norm", "error_feedback_scale"})


@every_residual
def test_a_row_without_gradient_stays_where_it_is(name: str) -> None:
    """Though the other rows move."""
    residual = RESIDUALS[name]
    weight, gradient, update = random_step()
    gradient[4], update[4] = 0, 0
    before = weight.clone()
    step(residual, weight, gradient, update, vectors(), new_state(residual))
    assert torch.equal(weight[4], before[4])
    assert (weight != before).any(1).sum() == M - 1
    assert weight.isfinite().all()


def test_what_each_treatment_asks_for() -> None:
    """The flags by which the optimizer plans its work, its memory and its communication."""
    flags = {
        name: (residual.needs_orthonormal, residual.whole_gradient, residual.tracks_momentum, residual.sums)
        for name, residual in RESIDUALS.items()
    }
    feedback = (True, True, False, 0)
    assert flags == {
        "apollo": (False, True, False, 1),
        "apollo_mini": (False, True, False, 3),
        "drop": (False, False, False, 0),
        "error_feedback": feedback,
        "error_feedback_8bit": feedback,
        "fira": (True, True, False, 1),
        "fira_released": (True, True, False, 1),
        "ldadam": (True, True, True, 0),
        "normalized": feedback,
        "sign": feedback,
    }


def test_what_needs_only_coordinates_reads_no_more() -> None:
    """The gradient may be freed then, before the update."""
    for name, residual in RESIDUALS.items():
        if residual.whole_gradient:
            continue
        weight, gradient, update = random_step()
        directions = vectors()
        block = Block(torch.full_like(gradient, torch.nan), gradient, update.clone(), directions, None, None)
        residual.add_(weight, block._replace(coordinates=directions.project(gradient)), RATES, {}, None)
        assert weight.isfinite().all(), name


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"^residual='fire'; did you mean 'fira'\? expected one of apollo, apollo_mini"
    ):
        find_residual("fire")
    with pytest.raises(ValueError, match=r"^residual='qqq'; expected one of "):
        find_residual("qqq")
    with pytest.raises(ValueError, match=r"^residual=None; expected one of "):
        find_residual(None)  # type: ignore[arg-type]
    assert all(find_residual(name) is residual for name, residual in RESIDUALS.items())


# -------------------------------------------------------------------------------------------------------------- Fira


def moved_outside(name: str, *, scale: float = S) -> tuple[Tensor, Tensor, Tensor, Directions]:
    """What Fira adds beside lift(u): (M, D); with phi, g and the directions."""
    residual, directions = RESIDUALS[name], vectors()
    weight, gradient, update = random_step()
    before = weight.clone()
    rates = RATES._replace(scale=scale)
    step(residual, weight, gradient, update, directions, new_state(residual), rates=rates)
    outside = (before - weight) / LR - scale * directions.lift(update)
    g = directions.project(gradient)
    return outside, phi(update, g), g, directions


def test_fira_scales_what_is_orthogonal_to_the_directions() -> None:
    outside, _, _, directions = moved_outside("fira")
    assert directions.project(outside).abs().max() < 1e-12
    assert outside.norm() > 1


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_the_released_fira_leaks_what_its_scale_leaves_of_the_inside(scale: float) -> None:
    outside, scaling, g, directions = moved_outside("fira_released", scale=scale)
    close(directions.project(outside), (1 - scale) * scaling * g)


@pytest.mark.parametrize("name", LIMITED)
def test_sums_are_those_of_the_scaled_part(name: str) -> None:
    residual, directions = RESIDUALS[name], vectors()
    _, gradient, update = random_step()
    g = directions.project(gradient)
    block = Block(gradient, g, update, directions, None, None)
    inside = directions.lift(g)
    expected = {
        "fira": [(phi(update, g) * (gradient - inside)).norm() ** 2],
        "fira_released": [(phi(update, g) * (gradient - S * inside)).norm() ** 2],
        "apollo": [(phi(update, g) * gradient).norm() ** 2],
        "apollo_mini": [update.norm() ** 2, g.norm() ** 2, gradient.norm() ** 2],
    }[name]
    close(residual.partial_sums(block, RATES), torch.stack(expected))


# ------------------------------------------------------------------------------------------------------------ limiter


def limited(name: str, norms: list[float]) -> tuple[list[float], list[float]]:
    """Factors on |S|_F of these lengths, and what is remembered of each."""
    residual = RESIDUALS[name]
    state = new_state(residual)
    factors, remembered = [], []
    for norm in norms:
        # APOLLO-Mini: |u|^2 and |g|^2 = 4, so that its scaling is 1
        sums = [4.0, 4.0, norm**2] if residual.sums == 3 else [norm**2]
        factors.append(residual.factor(torch.tensor(sums, dtype=torch.float64), state).item())
        remembered.append(state["limiter_norm"].item())
    return factors, remembered


def approximately(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-8)  # APOLLO-Mini has 1e-8 beside |g|


@pytest.mark.parametrize("name", LIMITED)
def test_the_first_step_is_not_limited_and_later_ones_grow_by_a_hundredth(name: str) -> None:
    factors, remembered = limited(name, [1e6, 1e9, 1e9, 1.0099e6, 5.0, 5.05, 5.2])
    assert factors == approximately([1, 1.01e-3, 1.0201e-3, 1, 1, 1, 1.01 * 5.05 / 5.2])
    assert remembered == approximately([1e6, 1.01e6, 1.0201e6, 1.0099e6, 5, 5.05, 1.01 * 5.05])


@pytest.mark.parametrize("name", LIMITED)
def test_a_norm_of_zero_or_one_that_is_not_finite_does_not_stop_the_limiter_for_good(name: str) -> None:
    factors, remembered = limited(name, [0.0, 3.0, 0.0, 7.0, float("nan"), 2.0, 9.0])
    assert [factors[i] for i in (0, 1, 2, 3, 5, 6)] == approximately([1, 1, 1, 1, 1, 2.02 / 9])
    assert [remembered[i] for i in (0, 1, 2, 3, 5, 6)] == approximately([0, 3, 0, 7, 2, 2.02])


@pytest.mark.parametrize("name", LIMITED)
def test_the_limiter_remembers_at_least_float32(name: str) -> None:
    """In bfloat16 a norm could not grow by 1 %: 1.01 is 1.0078."""
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        assert RESIDUALS[name].state_tensors(M, D, dtype)["limiter_norm"].dtype == stored
    assert RESIDUALS[name].state_tensors(M, D, torch.float64)["limiter_norm"].dtype == torch.float64


@pytest.mark.parametrize("name", LIMITED)
def test_only_the_scaled_part_is_limited(name: str) -> None:
    """At a second step with a hundredfold gradient: S is 1.01 times as long as before, lift(u) as it is."""
    residual, directions, state = RESIDUALS[name], vectors(), new_state(RESIDUALS[name])
    weight, gradient, update = random_step()
    step(residual, weight, gradient, update, directions, state)
    norm = state["limiter_norm"].item()
    before = weight.clone()
    larger = torch.randn(M, D, dtype=torch.float64) * 100
    step(residual, weight, larger, 100 * update, directions, state)
    moved = (before - weight) / LR
    scaled = moved - S * directions.lift(100 * update) if name.startswith("fira") else moved / S
    assert scaled.norm().item() == pytest.approx(1.01 * norm, rel=1e-10)
    assert state["limiter_norm"].item() == pytest.approx(1.01 * norm, rel=1e-10)


# ----------------------------------------------------------------------------------------------------- error feedback


@pytest.mark.parametrize(("name", "relative"), [("error_feedback", 0.0), ("error_feedback_8bit", 0.5 / 127)])
def test_what_was_projected_and_what_is_owed_is_all_there_was(name: str, relative: float) -> None:
    residual, state = RESIDUALS[name], new_state(RESIDUALS[name])
    weight = torch.zeros(M, D, dtype=torch.float64)
    total, projected, allowed = torch.zeros(M, D).double(), torch.zeros(M, D).double(), 1e-12
    for _ in range(6):
        directions, (_, gradient, update) = vectors(), random_step()
        owed = residual.recall(torch.zeros_like(gradient), rows_of(residual, state, slice(None)))
        total += gradient
        projected += directions.lift(directions.project(gradient + owed))
        step(residual, weight, gradient, update, directions, state)
        owed = residual.recall(torch.zeros_like(gradient), rows_of(residual, state, slice(None)))
        allowed += relative * owed.abs().max().item() * 1.01  # rounding adds up, and is never fed back
        assert (projected + owed - total).abs().max() <= allowed
    assert owed.abs().max() > 1


def test_ldadam_owes_what_momentum_lost_by_the_change_of_directions() -> None:
    residual = RESIDUALS["ldadam"]
    weight, gradient, update = random_step()
    old, new, state = vectors(), vectors(), new_state(residual)
    state["error_feedback"].copy_(torch.randn(M, D))
    A = gradient + state["error_feedback"]
    exp_avg, carried = torch.randn(2, M, R, dtype=torch.float64)
    step(residual, weight, gradient, update, new, state, previous=Previous(old, exp_avg), carried=carried)
    lost = old.lift(exp_avg) - new.lift(carried)
    close(state["error_feedback"], A - new.lift(new.project(A)) + BETA1 / (1 - BETA1) * lost)


def test_ldadam_is_plain_error_feedback_while_directions_stay() -> None:
    weight, gradient, update = random_step()
    directions, results = vectors(), []
    for name in ("ldadam", "error_feedback"):
        target, state = weight.clone(), new_state(RESIDUALS[name])
        for _ in range(2):
            step(RESIDUALS[name], target, gradient, update, directions, state)
        results.append((target, state["error_feedback"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# -------------------------------------------------------------------------------------------------------------- codec


def round_trip(value: Tensor) -> Tensor:
    codes, scale = encode_rows(value)
    return decode_rows(codes, scale, value.dtype)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_within_half_a_level(d: int, dtype: torch.dtype) -> None:
    value = torch.randn(50, d, dtype=dtype) * 10 ** torch.linspace(-6, 6, 50, dtype=dtype).unsqueeze(1)
    decoded = round_trip(value)
    assert decoded.dtype == dtype
    level = value.abs().amax(1, keepdim=True) / 127
    assert ((decoded - value).abs() <= level * (0.5 + 1e-5)).all()
    assert torch.equal(decoded.sign() * (decoded != 0), value.sign() * (decoded != 0))


def test_relative_error_of_gaussian_rows() -> None:
    value = torch.randn(200, 64)
    error = (round_trip(value) - value).norm() / value.norm()
    # level / sqrt(12), with the largest of 64 numbers about 2.5: 0.006
    assert 0.003 < error < 0.01, "or it is not 8 bits"


@pytest.mark.parametrize("d", [7, 16, 31])
def test_what_is_representable_comes_back_exactly_and_in_its_order(d: int) -> None:
    value = (torch.arange(3 * d, dtype=torch.float64).view(3, d) % 255) - 127
    value[:, 0] = 127
    value[1] *= 0.5
    value[2] *= -4
    assert torch.equal(round_trip(value), value)


def test_rows_of_zeros_and_no_rows_at_all() -> None:
    value = torch.randn(5, 9)
    value[2] = 0
    decoded = round_trip(value)
    assert torch.equal(decoded[2], torch.zeros(9))
    assert decoded.isfinite().all()
    assert round_trip(value[:0]).shape == (0, 9)


def test_rows_do_not_touch_each_other() -> None:
    value = torch.randn(5, 9)
    before = round_trip(value)
    value[3] *= 1e6
    after = round_trip(value)
    assert torch.equal(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


@pytest.mark.parametrize("d", [1, 8, 101])
def test_codes_have_the_size_they_are_announced_with(d: int) -> None:
    stored = RESIDUALS["error_feedback_8bit"].state_tensors(5, d, torch.bfloat16)
    codes, scale = encode_rows(torch.randn(5, d))
    for value, spec in zip((codes, scale), stored.values(), strict=True):
        assert (tuple(value.shape), value.dtype, spec.layout) == (spec.shape, spec.dtype, "rows")
    assert sum(spec.shape[0] * spec.shape[1] * spec.dtype.itemsize for spec in stored.values()) == 5 * (d + 4)


# ---------------------------------------------------------------------------------------------------------- conflicts


def build(**settings: Any) -> Callable[[], optim.LowRankAdamW]:
    group = {"params": [("layer.weight", nn.Parameter(torch.randn(8, 16)))], "role": "matrix"}
    return lambda: optim.LowRankAdamW([group], rank=2, **settings)


@pytest.mark.parametrize("basis", BASES)
@every_residual
def test_directions_that_are_not_orthonormal_are_refused_where_the_rest_is_used(name: str, basis: str) -> None:
    make = build(basis=basis, residual=name, moments="keep")
    if BASES[basis].is_orthonormal or not RESIDUALS[name].needs_orthonormal:
        make()
        return
    expected = (
        rf"^residual='{name}' for 'layer\.weight' needs orthonormal directions, and those of basis='{basis}' are not; "
        r"use basis='random', or another residual$"
    )
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_moments_do_not_rotate_between_directions_that_are_not_orthonormal(basis: str, moments: str) -> None:
    make = build(basis=basis, residual="drop", moments=moments)
    if BASES[basis].is_orthonormal or moments != "rotate":
        make()
        return
    with pytest.raises(ValueError, match=r"^moments='rotate' for 'layer\.weight' needs .* or another moments$"):
        make()
