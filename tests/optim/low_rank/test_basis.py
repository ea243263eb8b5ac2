"""Properties every basis of the table must have, and the formulas of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import (
    BASES,
    Basis,
    Directions,
    Moments,
    dct_matrix,
    find_basis,
    hadamard_matrix,
)
from lowrank_train.optim.low_rank.bases.columns import ColumnBasis
from lowrank_train.optim.low_rank.bases.dct import DCT, FourierColumns
from lowrank_train.optim.low_rank.bases.random import RandomVectors
from lowrank_train.optim.low_rank.bases.svd import ExactSVD, SubspaceIteration
from tests.distributed import run_distributed
from tests.reference.directions import dct_vector, hadamard_vector

CPU = torch.device("cpu")
BETAS = (0.9, 0.99)
# (200, 100) is large enough for the fast Fourier transform, which the DCT prefers on CPUs from 96 directions on.
SIZES = [(1, 1), (2, 1), (4, 2), (5, 3), (8, 8), (12, 5), (20, 20), (31, 7), (64, 16), (200, 100)]

State = Mapping[str, Tensor]

every_basis = pytest.mark.parametrize("name", BASES)
every_size = pytest.mark.parametrize(
    ("name", "d", "r"), [(name, d, r) for name, basis in BASES.items() for d, r in SIZES if not basis.objection(d, r)]
)
COLUMNS = [name for name, basis in BASES.items() if "basis_index" in basis.state_tensors(8, 2, torch.float64)]
DENSE = [name for name in BASES if name not in COLUMNS]
ORTHONORMAL = [name for name, basis in BASES.items() if basis.is_orthonormal]


def choice(basis: Basis, gradient: Tensor, r: int, *, seed: int = 0, after: State | None = None) -> State:
    """What an optimizer does: the first directions for a gradient, or new ones after those of ``after``."""
    d = gradient.shape[1]
    state = after if after is not None else basis.start(d, r, gradient, seed)
    for _ in range(basis.rounds(0 if after is None else 1)):
        state = basis.choose(basis.statistics(gradient, state), d, r, seed)
    return state


def random_state(name: str, d: int, r: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
    return choice(BASES[name], torch.randn(d + 3, d, dtype=dtype), r, seed=seed)


def directions(name: str, state: State, d: int, r: int, dtype: torch.dtype = torch.float64) -> Directions:
    return BASES[name].directions(state, d, r, torch.empty((), dtype=dtype))


def vectors(name: str, state: State, d: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The directions as rows (r, d)."""
    return directions(name, state, d, r, dtype).lift(torch.eye(r, dtype=dtype))


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def test_the_sizes_of_these_tests_leave_no_basis_out() -> None:
    for name, basis in BASES.items():
        existing = [size for size in SIZES if not basis.objection(*size)]
        assert len(existing) == (8 if name == "hadamard" else len(SIZES)), name
    assert {"dct", "identity", "random_columns"} < set(COLUMNS)
    assert {"gaussian", "svd", "power"} < set(DENSE)
    assert set(BASES) - set(ORTHONORMAL) == {"gaussian"}


# ------------------------------------------------------------------------------------------------------ every basis


@every_size
def test_orthonormal_where_it_says_so(name: str, d: int, r: int) -> None:
    rows = vectors(name, random_state(name, d, r), d, r)
    assert rows.shape == (r, d)
    error = difference(rows @ rows.mT, torch.eye(r, dtype=rows.dtype))
    assert error < 1e-12 if BASES[name].is_orthonormal else error > 1e-3


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_orthonormal_in_float32_at_width_512(name: str) -> None:
    d, r = 512, 128
    rows = vectors(name, random_state(name, d, r, dtype=torch.float32), d, r, torch.float32).double()
    # 512 entries of about 1/sqrt(512), each off by 2^-24 relative: 3e-9 at random; the iteration works in float32.
    iterated = isinstance(BASES[name], SubspaceIteration)
    assert difference(rows @ rows.mT, torch.eye(r, dtype=rows.dtype)) < (3e-6 if iterated else 3e-7)


@every_size
def test_project_is_the_adjoint_of_lift(name: str, d: int, r: int) -> None:
    state, gradient = random_state(name, d, r), torch.randn(5, d, dtype=torch.float64)
    chosen, rows = directions(name, state, d, r), vectors(name, state, d, r)
    coordinates = torch.randn(5, r, dtype=torch.float64)
    assert chosen.project(gradient).shape == (5, r)
    assert difference(chosen.project(gradient), gradient @ rows.mT) < 1e-12
    assert difference(chosen.lift(coordinates), coordinates @ rows) < 1e-12


@every_size
def test_lifting_a_projection_is_idempotent_where_it_says_so(name: str, d: int, r: int) -> None:
    """And keeps all only if r = d."""
    chosen, gradient = directions(name, random_state(name, d, r), d, r), torch.randn(5, d, dtype=torch.float64)
    once = chosen.lift(chosen.project(gradient))
    error = difference(chosen.lift(chosen.project(once)), once)
    if BASES[name].is_orthonormal:
        assert error < 1e-12
        assert difference(once, gradient) > 1e-3 if r < d else difference(once, gradient) < 1e-12
    else:
        assert error > 1e-3


@every_size
def test_add_lift_adds_the_lift(name: str, d: int, r: int) -> None:
    """To rows of any strides and type: the optimizer hands it views of weights."""
    chosen, coordinates = directions(name, random_state(name, d, r), d, r), torch.randn(6, r, dtype=torch.float64)
    lifted = chosen.lift(coordinates)
    for rows in (torch.randn(6, d, dtype=torch.float64), torch.randn(d, 9, dtype=torch.float64).mT[2:8]):
        expected, given = rows + lifted, coordinates.clone()
        chosen.add_lift_(rows, given)
        assert difference(rows, expected) < 1e-12
        assert torch.equal(given, coordinates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_size
def test_add_lift_to_rows_of_few_bits_rounds_once(name: str, d: int, r: int, dtype: torch.dtype) -> None:
    state, coordinates = random_state(name, d, r, dtype=torch.float32), torch.randn(6, r)
    chosen = directions(name, state, d, r, torch.float32)
    for rows in (torch.randn(6, d).to(dtype), torch.randn(d, 6).to(dtype).mT):
        exact = rows.float() + chosen.lift(coordinates)
        chosen.add_lift_(rows, coordinates)
        assert rows.dtype == dtype
        # the nearest number of the type, but for ties that float32's own rounding decides otherwise
        assert ((rows.float() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@every_basis
@pytest.mark.parametrize("parts", [[4, 5], [0, 9], [3, 3, 3], [9]])
def test_statistics_add_over_row_shards(name: str, parts: list[int]) -> None:
    basis, d, r = BASES[name], 8, 3
    gradient, state = torch.randn(9, d, dtype=torch.float64), random_state(name, d, r)
    whole = basis.statistics(gradient, state)
    assert difference(sum(basis.statistics(part, state) for part in gradient.split(parts)), whole) < 1e-12


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_have_the_size_and_type_they_are_announced_with(
    name: str, d: int, r: int, dtype: torch.dtype
) -> None:
    """What is summed over the ranks, and so counted as communication."""
    basis = BASES[name]
    for state in (basis.start(d, r, torch.empty((), dtype=dtype), 0), random_state(name, d, r, dtype=dtype)):
        for m in (0, 7, 300):
            statistics = basis.statistics(torch.randn(m, d, dtype=dtype), state)
            assert tuple(statistics.shape) == basis.statistics_shape(d, r)
            assert statistics.dtype == torch.promote_types(dtype, basis.statistics_dtype)


@every_size
def test_statistics_are_zero_for_nothing_and_only_then(name: str, d: int, r: int) -> None:
    basis = BASES[name]
    for state in (basis.start(d, r, torch.empty(()), 0), random_state(name, d, r, dtype=torch.float32)):
        assert not basis.statistics(torch.zeros(4, d), state).any()
        assert not basis.statistics(torch.zeros(0, d), state).any()
        assert basis.statistics(torch.randn(4, d), state).any()
        assert basis.statistics(torch.randn(4, d) * 1e-12, state).any()
        hurt = torch.randn(4, d)
        hurt[1, 0] = float("nan")
        assert not basis.statistics(hurt, state).isfinite().all(), "or a broken gradient could choose directions"


@every_basis
def test_statistics_change_nothing(name: str) -> None:
    gradient, state = torch.randn(700, 8), random_state(name, 8, 3, dtype=torch.float32)
    before, held = gradient.clone(), {key: value.clone() for key, value in state.items()}
    BASES[name].statistics(gradient, state)
    assert torch.equal(gradient, before)
    assert all(torch.equal(state[key], value) for key, value in held.items())


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_choice_has_the_tensors_that_are_stored(name: str, d: int, r: int, dtype: torch.dtype) -> None:
    stored, state = BASES[name].state_tensors(d, r, dtype), random_state(name, d, r, dtype=dtype)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        key: spec.shape for key, spec in stored.items()
    }
    for key, spec in stored.items():
        assert state[key].is_floating_point() == spec.dtype.is_floating_point
        if not spec.dtype.is_floating_point:
            assert state[key].dtype == spec.dtype
        assert state[key].isfinite().all()


@pytest.mark.parametrize("name", [name for name, basis in BASES.items() if basis.start(4, 2, torch.empty(()), 0)])
def test_a_start_has_the_tensors_that_are_stored_and_depends_on_the_seed_alone(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        like = torch.empty((), dtype=dtype)
        start = BASES[name].start(9, 4, like, 3)
        stored = BASES[name].state_tensors(9, 4, dtype)
        assert {key: (tuple(value.shape), value.dtype) for key, value in start.items()} == {
            key: (spec.shape, spec.dtype) for key, spec in stored.items()
        }
        torch.randn(1)  # another position of the global generator
        assert all(torch.equal(value, start[key]) for key, value in BASES[name].start(9, 4, like, 3).items())
        assert all(not torch.equal(value, start[key]) for key, value in BASES[name].start(9, 4, like, 4).items())


@every_basis
def test_the_choice_does_not_depend_on_the_order_or_the_sign_of_rows(name: str) -> None:
    basis, d, r = BASES[name], 16, 4
    gradient = torch.randn(30, d, dtype=torch.float64)
    other = -gradient[torch.randperm(30)]
    rows = [vectors(name, choice(basis, G, r), d, r) for G in (gradient, other)]
    assert difference(*rows) < 1e-10


@every_basis
def test_a_basis_met_under_fake_tensors_does_not_hand_them_to_real_ones(name: str) -> None:
    """A memory tracker runs on fake tensors; what is cached must not be theirs."""
    basis, d, r = BASES[name], 24, 6  # a size of no other test, so that nothing is cached yet

    def steps() -> list[Tensor]:
        gradient = torch.randn(40, d)
        state = choice(basis, gradient, r)
        chosen = basis.directions(state, d, r, gradient)
        coordinates = chosen.project(gradient)
        chosen.add_lift_(gradient, coordinates)
        return [*state.values(), coordinates, gradient, chosen.lift(coordinates)]

    with FakeTensorMode():
        fake = steps()
    real = steps()
    assert all(type(value) is Tensor for value in real)
    assert [value.shape for value in fake] == [value.shape for value in real]


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"^basis='dctt'; did you mean 'dct'\? expected one of dct, dct_l1, gaussian"):
        find_basis("dctt")
    with pytest.raises(ValueError, match=r"^basis='wavelets'; expected one of "):
        find_basis("wavelets")
    with pytest.raises(ValueError, match=r"^basis=None; expected one of "):
        find_basis(None)  # type: ignore[arg-type]
    assert all(find_basis(name) is basis for name, basis in BASES.items())


# ---------------------------------------------------------------------------------------------------- carried moments


def random_moments(r: int, dtype: torch.dtype, *, one_age: bool = True) -> Moments:
    age = torch.full((r,), 13) if one_age else torch.randint(1, 50, (r,))
    mean = torch.randn(5, r, dtype=dtype)
    return Moments(mean, mean.square() + torch.rand(5, r, dtype=dtype), age.to(torch.int32))


@pytest.mark.parametrize("name", ORTHONORMAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_carried_to_the_same_directions_stay(name: str, dtype: torch.dtype) -> None:
    state = random_state(name, 16, 5, dtype=dtype)
    moments = random_moments(5, dtype, one_age=name in DENSE)
    carried = BASES[name].carry(moments, state, state, 16, BETAS)
    for before, after in zip(moments, carried, strict=True):
        assert after.dtype == before.dtype
        if name in COLUMNS or not before.is_floating_point():
            assert torch.equal(after, before)
        else:
            assert difference(after, before) < 1000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", DENSE)
def test_moments_carried_to_dense_directions(name: str) -> None:
    """The mean turns; the second moment follows LDAdam's estimator, here entry by entry."""
    basis, d, r = BASES[name], 16, 4
    old, new = (random_state(name, d, r, seed=seed) for seed in (1, 2))
    R = vectors(name, old, d, r) @ vectors(name, new, d, r).mT
    assert difference(R, torch.eye(r, dtype=R.dtype)) > 0.1, "or nothing is turned"
    moments = random_moments(r, torch.float64)
    exp_avg, exp_avg_sq, age = basis.carry(moments, old, new, d, BETAS)
    assert difference(exp_avg, moments.exp_avg @ R) < 1e-12
    assert torch.equal(age, moments.age)
    correction1, correction2 = (1 - beta**13 for beta in BETAS)
    mean, square = moments.exp_avg / correction1, moments.exp_avg_sq / correction2
    for i, k in itertools.product(range(5), range(r)):
        turned_mean = sum(mean[i, j] * R[j, k] for j in range(r))
        variance = sum((square[i, j] - mean[i, j] ** 2) * R[j, k] ** 2 for j in range(r))
        assert abs(exp_avg_sq[i, k] - abs(variance + turned_mean**2) * correction2) < 1e-12


@pytest.mark.parametrize("name", ["svd", "power"])
def test_a_permutation_of_directions_permutes_moments(name: str) -> None:
    order = [2, 0, 3, 1]
    old = random_state(name, 12, 4)
    moments = random_moments(4, torch.float64)
    carried = BASES[name].carry(moments, old, {"basis": old["basis"][order]}, 12, BETAS)
    assert difference(carried.exp_avg, moments.exp_avg[:, order]) < 1e-12
    assert difference(carried.exp_avg_sq, moments.exp_avg_sq[:, order]) < 1e-12


def test_a_second_moment_carried_is_never_negative() -> None:
    """Where an inconsistent estimate of the variance is negative, its magnitude is taken."""
    old, new = random_state("svd", 8, 3), random_state("svd", 8, 3)
    moments = random_moments(3, torch.float64)._replace(exp_avg_sq=torch.zeros(5, 3, dtype=torch.float64))
    carried = BASES["svd"].carry(moments, old, new, 8, BETAS)
    assert (carried.exp_avg_sq > 0).all()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("d", "r"), [(1, 1), (8, 3), (8, 8), (64, 16)])
def test_moments_carried_to_other_columns_turn_by_zeros_and_ones(name: str, d: int, r: int) -> None:
    old, new = (random_state(name, d, r, seed=seed) for seed in (1, 2))
    overlap = vectors(name, old, d, r) @ vectors(name, new, d, r).mT
    rotation = overlap.round()
    assert difference(overlap, rotation) < 1e-12
    assert r == d or not torch.equal(rotation, torch.eye(r, dtype=rotation.dtype)), "or nothing changes"
    moments = random_moments(r, torch.float64, one_age=False)
    for before, after in zip(moments, BASES[name].carry(moments, old, new, d, BETAS), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after.double(), before.double() @ rotation)


def test_columns_without_a_past_are_exactly_zero_and_columns_that_left_are_forgotten() -> None:
    old = {"basis_index": torch.tensor([1, 4, 6], dtype=torch.int32)}
    new = {"basis_index": torch.tensor([0, 4, 7], dtype=torch.int32)}
    nan = float("nan")
    moments = Moments(
        torch.tensor([[nan, 2.0, nan]]), torch.tensor([[nan, 3.0, nan]]), torch.tensor([9, 5, 9], dtype=torch.int32)
    )
    carried = BASES["dct"].carry(moments, old, new, 8, BETAS)
    assert carried.exp_avg.tolist() == [[0.0, 2.0, 0.0]]
    assert carried.exp_avg_sq.tolist() == [[0.0, 3.0, 0.0]]
    assert carried.age.tolist() == [0, 5, 0]


# ------------------------------------------------------------------------------------------------- choosing columns


FIXED = {name: basis for name, basis in BASES.items() if isinstance(basis, ColumnBasis)}


@pytest.mark.parametrize("name", [name for name, basis in FIXED.items() if basis.ranking == "l2"])
def test_the_columns_kept_leave_the_least_behind(name: str) -> None:
    """Against every other selection."""
    d, r = 8, 3
    gradient = torch.randn(9, d, dtype=torch.float64)

    def left_behind(columns: tuple[int, ...]) -> float:
        state = {"basis_index": torch.tensor(columns, dtype=torch.int32)}
        chosen = directions(name, state, d, r)
        return (gradient - chosen.lift(chosen.project(gradient))).square().sum().item()

    kept = tuple(choice(BASES[name], gradient, r)["basis_index"].tolist())
    assert kept == min(itertools.combinations(range(d), r), key=left_behind)


def gradient_with(columns: Mapping[int, list[float]], d: int = 8) -> Tensor:
    """A gradient whose product with the DCT has these columns."""
    wanted = torch.zeros(4, d, dtype=torch.float64)
    for k, values in columns.items():
        wanted[:, k] = torch.tensor(values, dtype=torch.float64)
    return wanted @ dct_matrix(d, CPU, torch.float64)


def test_l1_and_l2_rank_differently() -> None:
    # column 2: squares 9, magnitudes 3; column 5: squares 4, magnitudes 4
    gradient = gradient_with({2: [3, 0, 0, 0], 5: [1, -1, 1, -1]})
    assert choice(BASES["dct"], gradient, 1)["basis_index"].tolist() == [2]
    assert choice(BASES["dct_l1"], gradient, 1)["basis_index"].tolist() == [5]
    energies = BASES["dct"].statistics(gradient, {}), BASES["dct_l1"].statistics(gradient, {})
    for got, (two, five) in zip(energies, [(9 * 2**-32, 4 * 2**-32), (3, 4)], strict=True):  # in the unit of energy_
        expected = torch.zeros(8, dtype=torch.float64)
        expected[2], expected[5] = two, five
        assert difference(got, expected) < 1e-12 * two


@pytest.mark.parametrize(
    "basis",
    [
        *(pytest.param(basis, id=name) for name, basis in FIXED.items()),
        *(pytest.param(ColumnBasis(DCT("matmul"), ranking), id=f"matmul_{ranking}") for ranking in ("l1", "l2")),
    ],
)
def test_energies_are_those_of_the_product_with_all_columns(basis: ColumnBasis) -> None:
    """Of a gradient tall enough to be taken in several blocks."""
    d, m = 256, 2500
    gradient = torch.randn(m, d, dtype=torch.float64)
    all_columns = {"basis_index": torch.arange(d, dtype=torch.int32)}
    product = basis.directions(all_columns, d, d, gradient).project(gradient)
    expected = (product * 2**-16).square().sum(0) if basis.ranking == "l2" else product.abs().sum(0)
    torch.testing.assert_close(basis.statistics(gradient, {}), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FIXED)
def test_ties_go_to_the_smaller_index(name: str) -> None:
    def chosen(energies: Tensor, r: int) -> list[int]:
        return BASES[name].choose(energies, energies.numel(), r, 0)["basis_index"].tolist()

    assert chosen(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 2) == [1, 2]
    assert chosen(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 4) == [0, 1, 2, 3]
    assert chosen(torch.ones(5000), 3) == [0, 1, 2]  # long enough for an unstable sort to show


# ---------------------------------------------------------------------------------------------------------------- DCT

WIDTHS = [1, 2, 3, 4, 5, 8, 31, 36, 64, 97, 100, 683]


@pytest.mark.parametrize("d", [1, 2, 3, 16, 63])
def test_dct_matrix_equals_the_formula(d: int) -> None:
    expected = torch.stack([torch.from_numpy(dct_vector(k, d)) for k in range(d)])
    assert difference(dct_matrix(d, CPU, torch.float64), expected) < 1e-14


def test_dct_matrix_is_accurate_in_float32_at_width_2048() -> None:
    """Angles computed in float32 would be off by about 1e-3 here."""
    d = 2048
    rows = dct_matrix(d, CPU, torch.float32)
    assert rows.dtype == torch.float32
    for k, i in [(1, 0), (1023, 77), (2047, 2047), (2000, 1999), (0, 5)]:
        scale = math.sqrt((1 if k == 0 else 2) / d)
        expected = scale * math.cos(math.pi * k * (2 * i + 1) / (2 * d))
        assert abs(rows[k, i].item() - expected) < 1e-7 * scale


def some_columns(d: int) -> list[Tensor]:
    """Selections with both halves of the spectrum, one of them, the ends, the middle, and all."""
    everything = torch.arange(d)
    random = torch.randperm(d)[: max(1, d // 3)].sort().values
    picks = [everything, random, everything[:1], everything[-1:], everything[d // 2 :], everything[: d // 2 + 1]]
    return [pick.to(torch.int32) for pick in picks]


@pytest.mark.parametrize("d", WIDTHS)
def test_fourier_and_matrix_paths_are_the_formula(d: int) -> None:
    formula = torch.stack([torch.from_numpy(dct_vector(k, d)) for k in range(d)])
    gradient, like = torch.randn(6, d, dtype=torch.float64), torch.empty((), dtype=torch.float64)
    for index in some_columns(d):
        rows, coordinates = formula[index.long()], torch.randn(6, len(index), dtype=torch.float64)
        for path in ("fft", "matmul"):
            chosen = DCT(path).columns(index, d, like)
            assert isinstance(chosen, FourierColumns) == (path == "fft")
            assert difference(chosen.project(gradient), gradient @ rows.mT) < 1e-12
            assert difference(chosen.lift(coordinates), coordinates @ rows) < 1e-12


@pytest.mark.parametrize("d", WIDTHS)
def test_fourier_path_in_float32_is_as_accurate_as_the_matrix(d: int) -> None:
    index = torch.arange(d, dtype=torch.int32)
    exact = dct_matrix(d, CPU, torch.float64)
    gradient = torch.randn(6, d)
    for path in ("fft", "matmul"):
        chosen = DCT(path).columns(index, d, gradient)
        coordinates = chosen.project(gradient)
        assert coordinates.dtype == torch.float32
        assert difference(coordinates.double(), gradient.double() @ exact.mT) < 5e-6  # numbers of size 1, eps 1.2e-7
        assert difference(chosen.lift(coordinates).double(), coordinates.double() @ exact) < 5e-6


def test_the_fourier_path_is_taken_on_cpu_unless_there_are_few_columns() -> None:
    for r, kind in [(95, False), (96, True)]:
        chosen = DCT().columns(torch.arange(r), 128, torch.empty(()))
        assert isinstance(chosen, FourierColumns) == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(150, 101), (100, 151)])
def test_training_by_either_path_is_the_same(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit gradients too, for which torch has no Fourier transform on CPUs."""
    finals, columns = [], []
    for path in ("fft", "matmul"):
        monkeypatch.setitem(BASES, "dct", ColumnBasis(DCT(path)))  # type: ignore[arg-type]
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
        group = {"params": [("weight", weight)], "role": "matrix"}
        optimizer = optim.LowRankAdamW([group], lr=1e-2, rank=97, refresh_interval=2)
        for _ in range(4):
            weight.grad = torch.randn(shape).to(dtype)
            optimizer.step()
        finals.append(weight.detach().double())
        columns.append(optimizer.state[weight]["basis_index"])
    assert torch.equal(*columns)
    # of weights of size 1 to 4, whose updates of 1e-2 are amplified rounding of the coordinates
    assert difference(*finals) < {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-5}[dtype]


# ----------------------------------------------------------------------------------------------------------- Hadamard

HADAMARD = [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 44, 48, 60, 64, 68, 72, 80, 84, 88, 96, 104, 108, 120, 128]


def test_which_hadamard_sizes_exist() -> None:
    """Powers of two, and 2^k (p + 1) for primes p = 3 mod 4: every such size below 130, and those models have."""
    basis = BASES["hadamard"]
    assert [d for d in range(1, 130) if basis.objection(d, 1) is None] == HADAMARD
    for d in (768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 5504, 8192, 11008, 13824):
        assert basis.objection(d, 1) is None, d
    for d in (6, 10, 14, 36, 92, 1376, 2752):
        assert f"of size {d} is not known here" in str(basis.objection(d, 1))
        assert "basis='dct'" in str(basis.objection(d, 1))


@pytest.mark.parametrize("d", [*HADAMARD, 768])
def test_hadamard_matrix(d: int) -> None:
    matrix = hadamard_matrix(d, CPU, torch.float64)
    assert matrix.shape == (d, d)
    assert torch.equal(matrix.abs(), torch.full_like(matrix, 1 / d**0.5))
    assert difference(matrix @ matrix.mT, torch.eye(d, dtype=matrix.dtype)) < 1e-12


@pytest.mark.parametrize("d", [1, 2, 8, 32])
def test_hadamard_of_a_power_of_two_is_sylvesters(d: int) -> None:
    expected = torch.stack([torch.from_numpy(hadamard_vector(k, d)) for k in range(d)])
    assert difference(hadamard_matrix(d, CPU, torch.float64), expected) < 1e-15


# --------------------------------------------------------------------------------------------------- singular vectors


@pytest.mark.parametrize(("m", "d", "r"), [(20, 8, 3), (8, 8, 8), (300, 31, 7), (5, 9, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_is_the_singular_vectors_of_the_gradient(m: int, d: int, r: int, dtype: torch.dtype) -> None:
    """A shard may have fewer rows than columns."""
    gradient = torch.randn(m, d, dtype=dtype)
    rows = vectors("svd", choice(BASES["svd"], gradient, r), d, r)
    expected = torch.linalg.svd(gradient.double(), full_matrices=False).Vh[:r]
    assert difference((rows * expected).sum(1).abs(), torch.ones(r, dtype=torch.float64)) < 1e-11
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    assert (largest > 0).all(), "signs are fixed, so that moments which are kept meet the same sign"


def captured(rows: Tensor, gradient: Tensor) -> float:
    """Share of the gradient's energy inside the directions."""
    return ((gradient @ rows.mT).square().sum() / gradient.square().sum()).item()


def decaying(m: int, d: int, rate: float) -> Tensor:
    """Singular values 1, rate, rate^2, ..."""
    left, right = (torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q for n in (m, d))
    return left * rate ** torch.arange(d, dtype=torch.float64) @ right.mT


def test_svd_captures_the_most_energy() -> None:
    gradient = decaying(40, 16, 0.7)
    singular_values = torch.linalg.svdvals(gradient)
    best = (singular_values[:4].square().sum() / singular_values.square().sum()).item()
    assert captured(vectors("svd", choice(BASES["svd"], gradient, 4), 16, 4), gradient) == pytest.approx(
        best, abs=1e-13
    )
    for name in BASES.keys() - {"svd", "gaussian"}:
        assert captured(vectors(name, choice(BASES[name], gradient, 4), 16, 4), gradient) < best + 1e-13


@pytest.mark.parametrize("name", ["subspace", "power"])
def test_subspace_iteration_converges_to_the_singular_vectors(name: str) -> None:
    """On a decaying spectrum; each round shrinks the error by (s_5 / s_4)^2 = 0.25, six of them at first."""
    basis, d, r = BASES[name], 16, 4
    gradient = decaying(40, d, 0.5)
    exact = vectors("svd", choice(BASES["svd"], gradient, r), d, r)
    state, errors = None, []
    for _ in range(7):
        state = choice(basis, gradient, r, after=state)
        rows = state["basis"]
        errors.append(torch.linalg.matrix_norm(rows.mT @ rows - exact.mT @ exact, ord=2).item())
    rounds = basis.rounds(1)
    assert basis.rounds(0) == 6
    assert rounds == {"subspace": 2, "power": 1}[name]
    assert errors[0] < 0.25**6 * 100  # a random start is off by a factor
    for before, after in itertools.pairwise(errors):
        assert after == pytest.approx(before * 0.25**rounds, rel=0.2) or after < 1e-13
    rows = state["basis"]
    # each vector by itself, not only their span: the slowest is as wrong as (s_4 / s_3)^2 a round leaves it
    assert difference((rows * exact).sum(1).abs(), torch.ones(r, dtype=torch.float64)) < 1e-3


@pytest.mark.parametrize("name", ["subspace", "power", "svd"])
def test_the_same_gradient_again_keeps_the_signs_of_directions(name: str) -> None:
    gradient = decaying(40, 16, 0.5)
    first = choice(BASES[name], gradient, 4)
    second = choice(BASES[name], gradient, 4, after=first, seed=1)
    assert ((first["basis"] * second["basis"]).sum(1) > 0.9).all()


def test_a_gradient_of_lower_rank_than_asked_for_still_gives_orthonormal_directions() -> None:
    gradient = torch.randn(20, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    for name in ORTHONORMAL:
        rows = vectors(name, choice(BASES[name], gradient, 4), 8, 4)
        assert difference(rows @ rows.mT, torch.eye(4, dtype=torch.float64)) < 1e-12, name


def test_which_bases_one_rank_decides_on() -> None:
    assert {name for name, basis in BASES.items() if basis.owner_computed} == {"svd", "subspace", "power"}
    assert isinstance(BASES["svd"], ExactSVD)
    assert BASES["svd"].statistics_dtype == torch.float64


# ------------------------------------------------------------------------------------------------- random directions

RANDOM = ["gaussian", "random", "random_columns"]


def drawn(name: str, seed: int, d: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    state = BASES[name].choose(torch.ones(1, dtype=dtype), d, r, seed)
    return vectors(name, state, d, r, dtype)


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_gives_one_set_of_directions_whatever_the_gradient_or_its_type(name: str) -> None:
    first = drawn(name, 5, 30, 7)
    torch.randn(3)  # the global generator stands elsewhere, and is not moved by a draw
    position = torch.get_rng_state()
    assert torch.equal(drawn(name, 5, 30, 7), first)
    assert torch.equal(torch.get_rng_state(), position)
    assert difference(drawn(name, 5, 30, 7, torch.float32).double(), first) < 1e-6
    assert not torch.equal(drawn(name, 6, 30, 7), first)


def test_processes_draw_alike() -> None:
    seed = 987_654_321  # of no other test: what the parent draws now is not cached in its children

    def worker() -> list[Tensor]:
        torch.manual_seed(100 + dist.get_rank())
        torch.randn(dist.get_rank())
        return [drawn(name, seed, 33, 9) for name in RANDOM]

    by_rank = run_distributed(worker, 2)
    for name, *results in zip(RANDOM, *by_rank, strict=True):
        for result in results:
            assert torch.equal(result, drawn(name, seed, 33, 9)), name


def test_gaussian_directions_have_entries_of_variance_one_over_r() -> None:
    r, d = 32, 400
    rows = drawn("gaussian", 3, d, r)
    count = r * d
    # four standard errors of the mean, the variance and the fourth moment of N(0, 1/r)
    assert abs(rows.mean()) < 4 * (1 / r / count) ** 0.5
    assert abs(rows.square().mean() * r - 1) < 4 * (2 / count) ** 0.5
    assert abs(rows.pow(4).mean() * r**2 - 3) < 4 * (96 / count) ** 0.5
    products = rows @ rows.mT  # of different rows: independent
    products.fill_diagonal_(0)
    assert products.abs().max() < 6 * d**0.5 / r


def test_orthonormal_directions_from_a_seed_point_everywhere() -> None:
    """Each coordinate's share in the span is r / d on average over draws: no direction is preferred."""
    d, r, draws = 12, 3, 200
    basis = RandomVectors(orthonormal=True)
    share = torch.zeros(d, dtype=torch.float64)
    for seed in range(draws):
        state = basis.choose(torch.ones(1), d, r, seed)
        rows = basis.directions(state, d, r, torch.empty((), dtype=torch.float64)).lift(torch.eye(r).double())
        share += rows.square().sum(0) / draws
    # the share of one draw has variance below 0.25 * 0.25 = r / d (1 - r / d) / (d / 2 + 1)
    assert (share - r / d).abs().max() < 4 * (r / d * (1 - r / d) / (d / 2 + 1) / draws) ** 0.5


def test_random_columns_are_drawn_without_preference() -> None:
    d, r, draws = 10, 3, 600
    counts = torch.zeros(d)
    for seed in range(draws):
        index = BASES["random_columns"].choose(torch.ones(1), d, r, seed)["basis_index"].long()
        assert len(set(index.tolist())) == r
        assert torch.equal(index, index.sort().values)
        counts[index] += 1
    # each column is drawn with probability 0.3: 180 +- 11
    assert (counts - draws * r / d).abs().max() < 4 * (draws * r / d * (1 - r / d)) ** 0.5
