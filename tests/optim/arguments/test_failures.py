"""Bad settings, bad gradients and checkpoints of something else: what is refused, survived, counted and warned of."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import BASES
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests.distributed import run_distributed
from tests.optim.models import (
    MixedModel,
    assert_equal,
    beside_layers,
    build,
    gradient,
    run_steps,
)
from tests.optim.sharded import shard

LOW_RANK = [name for name in optim.names() if hasattr(optim.find(name), "skipped_refreshes")]
WITH_RANK = [name for name in optim.names() if "rank" in inspect.signature(optim.find(name)).parameters]

every_low_rank = pytest.mark.parametrize("name", LOW_RANK)
every_basis = pytest.mark.parametrize("basis", BASES)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def create(name: str, *params: nn.Parameter, **arguments: Any) -> optim.MatrixOptimizer:
    """With new directions at every second step, where the method has that setting."""
    if "refresh_interval" in inspect.signature(optim.find(name)).parameters:
        arguments = {"refresh_interval": 2, **arguments}
    groups = [{"params": [(f"layer{i}.weight", param) for i, param in enumerate(params)], "role": "matrix"}]
    return optim.create(name, beside_layers(name, groups), **arguments)


def step(optimizer: optim.MatrixOptimizer, *gradients: Tensor | None) -> None:
    """Of the matrices of ``create``."""
    layers = [slot.param for slot in optimizer.slots() if slot.name.startswith("layer")]
    params = layers[: len(gradients)]
    for param, value in zip(params, gradients, strict=True):
        param.grad = value
    optimizer.step()


def held(optimizer: optim.MatrixOptimizer, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in optimizer.state[param].items()}


def directions(optimizer: optim.MatrixOptimizer, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: value for key, value in held(optimizer, param).items() if key.startswith("basis")}


def refresh_interval(optimizer: optim.MatrixOptimizer) -> int:
    return optimizer.param_groups[0]["refresh_interval"]


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", WITH_RANK)
def test_a_rank_above_the_smaller_dimension_is_refused(name: str) -> None:
    for shape in ((5, 9), (9, 5)):
        create(name, matrix(*shape), rank=5)
        expected = rf"^rank=6 exceeds min\(m, n\)=5 for 'layer1\.weight' of shape \({shape[0]}, {shape[1]}\); .*rules="
        with pytest.raises(ValueError, match=expected):
            create(name, matrix(20, 20), matrix(*shape), rank=6)


@pytest.mark.parametrize("name", WITH_RANK)
@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_a_rank_that_is_no_positive_whole_number_is_refused(name: str, rank: Any) -> None:
    with pytest.raises(ValueError, match=rf"^rank={rank!r} for 'layer0\.weight' of shape \(8, 9\); expected a whole"):
        create(name, matrix(8, 9), rank=rank)


@pytest.mark.parametrize("d", [6, 10, 14, 36])
@pytest.mark.parametrize("name", ["low_rank_adamw", "galore_adamw", "trion"])
def test_a_basis_that_does_not_exist_in_a_size_is_refused(name: str, d: int) -> None:
    create(name, matrix(12, 40), basis="hadamard")
    for shape in ((d, 40), (40, d)):
        expected = (
            rf"^basis='hadamard' for 'layer0\.weight' of shape \({shape[0]}, {shape[1]}\): a Hadamard matrix of size "
            rf"{d} is not known here; expected a power of two, .*: use basis='dct'"
        )
        with pytest.raises(ValueError, match=expected):
            create(name, matrix(*shape), basis="hadamard")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "dtc"}, r"^basis='dtc'; did you mean 'dct'\? expected one of dct, "),
        ({"basis": None}, r"^basis=None; expected one of dct, "),
        ({"residual": "error-feedback"}, r"^residual='error-feedback'; did you mean 'error_feedback'\? expected one "),
        ({"moments": "rotated"}, r"^moments='rotated' for 'layer0\.weight'; expected one of keep, reset, rotate$"),
        ({"refresh_interval": 0}, r"^refresh_interval=0 for 'layer0\.weight'; expected a whole number of steps >= 1$"),
        ({"refresh_interval": True}, r"^refresh_interval=True for "),
        ({"scale": -0.1}, r"^scale=-0\.1 for 'layer0\.weight'; expected a number >= 0$"),
        ({"scale": float("nan")}, r"^scale=nan for 'layer0\.weight'; expected a number >= 0$"),
        ({"residual_scale": "1"}, r"^residual_scale='1' for 'layer0\.weight'; expected a number >= 0$"),
        ({"seed": -1}, r"^seed=-1 for 'layer0\.weight'; expected a whole number >= 0$"),
        ({"seed": 1.0}, r"^seed=1\.0 for 'layer0\.weight'; expected a whole number >= 0$"),
        ({"state_dtype": "2bit"}, r"^state_dtype='2bit'; expected None or one of float32, bfloat16, 8bit, 4bit$"),
        ({"basis": "gaussian", "residual": "sign", "moments": "keep"}, r"^residual='sign' for .* orthonormal "),
        ({"basis": "gaussian", "residual": "drop", "moments": "rotate"}, r"^moments='rotate' for .* orthonormal "),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("low_rank_adamw", matrix(8, 9), **settings)


@pytest.mark.parametrize("rho", [-0.1, 1.0, float("nan"), "0.9"])
def test_a_share_of_the_momentum_out_of_range_is_refused(rho: Any) -> None:
    with pytest.raises(ValueError, match=rf"^rho={rho!r} for 'layer0\.weight'; expected a number in \[0, 1\)$"):
        create("ldadam", matrix(8, 9), rho=rho)


@pytest.mark.parametrize("name", optim.names())
def test_a_refused_setting_leaves_nothing_behind(name: str) -> None:
    """Of a group added later: the optimizer goes on as it was."""
    good = matrix(8, 9)
    optimizer = create(name, good)
    before, groups = set(optimizer.state), len(optimizer.param_groups)
    bad: dict[str, Any] = {"lr": -1.0}
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [("bad", matrix(8, 9))], "role": "matrix", **bad})
    assert good in before
    assert set(optimizer.state) == before
    assert len(optimizer.param_groups) == groups
    step(optimizer, gradient("g", good.shape, 0))


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_low_rank
def test_a_gradient_not_finite_at_a_refresh_keeps_the_old_directions(name: str, value: float) -> None:
    """Counted and warned of, by name; the other matrices go on."""
    hurt, healthy = matrix(9, 6), matrix(16, 20)
    optimizer = create(name, hurt, healthy, rank=2 if name != "apollo_mini" else 1)
    interval = refresh_interval(optimizer)
    for i in range(interval):
        step(optimizer, gradient("a", hurt.shape, i), gradient("b", healthy.shape, i))
    before, before_healthy = directions(optimizer, hurt), directions(optimizer, healthy)
    assert optimizer.skipped_refreshes == 0
    broken = gradient("a", hurt.shape, interval)
    broken[3, 3] = value
    expected = r"the gradient of 'layer0\.weight' is not finite: its directions were not chosen anew \(1 times now\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        step(optimizer, broken, gradient("b", healthy.shape, interval))
    assert len(caught) == 1
    assert_equal(directions(optimizer, hurt), before)
    after = directions(optimizer, healthy)
    assert any(not torch.equal(after[key], before_healthy[key]) for key in after)
    assert healthy.isfinite().all()
    assert optimizer.state[hurt]["skipped_refreshes"] == 1
    assert optimizer.state[healthy]["skipped_refreshes"] == 0
    assert optimizer.skipped_refreshes == 1


@every_basis
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_basis_is_chosen_by_a_first_gradient_that_is_not_finite(basis: str, value: float) -> None:
    """The weight and the clock stay, for as long as it takes; then all is as if nothing had been."""
    weights_at_end = []
    for broken_steps in (0, 3):
        torch.manual_seed(0)
        weight = matrix(12, 8)
        optimizer = create("low_rank_adamw", weight, rank=3, basis=basis, residual="drop", moments="keep")
        start, fresh = weight.detach().clone(), held(optimizer, weight)
        for i in range(broken_steps):
            broken = gradient("a", weight.shape, 100 + i)
            broken[5, 5] = value
            with pytest.warns(UserWarning, match=rf"'layer0\.weight' is not finite: .*\({i + 1} times now\)"):
                step(optimizer, broken)
            assert torch.equal(weight, start)
            fresh["skipped_refreshes"] += 1
            assert_equal(held(optimizer, weight), fresh)
        for i in range(5):
            step(optimizer, gradient("a", weight.shape, i))
        assert optimizer.state[weight]["step"] == 5
        assert optimizer.skipped_refreshes == broken_steps
        weights_at_end.append(weight.detach())
    assert torch.equal(*weights_at_end)


@every_basis
def test_no_basis_is_chosen_by_a_first_gradient_of_zero(basis: str) -> None:
    """Of a parameter that is not used yet; that is no failure, and nothing is said."""
    weight = matrix(12, 8)
    optimizer = create("low_rank_adamw", weight, rank=3, basis=basis, residual="drop", moments="keep", weight_decay=0.5)
    start, fresh = weight.detach().clone(), held(optimizer, weight)
    for empty in (torch.zeros_like(weight), None, torch.zeros_like(weight)):
        step(optimizer, empty)
        assert torch.equal(weight, start)
        assert_equal(held(optimizer, weight), fresh)
    assert optimizer.skipped_refreshes == 0
    step(optimizer, gradient("a", weight.shape, 0))
    assert optimizer.state[weight]["step"] == 1
    assert not torch.equal(weight, start)


@every_basis
@pytest.mark.parametrize("empty", [True, False], ids=["zero", "missing"])
def test_no_gradient_at_a_later_refresh_keeps_the_old_directions(basis: str, empty: bool) -> None:
    weight = matrix(12, 8)
    optimizer = create("low_rank_adamw", weight, rank=3, basis=basis, residual="drop", moments="keep")
    for i in range(2):
        step(optimizer, gradient("a", weight.shape, i))
    before, start = directions(optimizer, weight), weight.detach().clone()
    with pytest.warns(UserWarning, match=r"the gradient of 'layer0\.weight' is zero: .*\(1 times now\)"):
        step(optimizer, torch.zeros_like(weight) if empty else None)
    assert_equal(directions(optimizer, weight), before)
    assert optimizer.skipped_refreshes == 1
    assert torch.equal(weight, start) == (not empty), "momentum goes on under a zero gradient, not without one"
    step(optimizer, gradient("a", weight.shape, 2))
    step(optimizer, gradient("a", weight.shape, 3))
    assert any(not torch.equal(value, before[key]) for key, value in directions(optimizer, weight).items())
    assert weight.isfinite().all()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_treatment_survives_gradients_of_zero(residual: str) -> None:
    """At first, in between, and at a refresh."""
    weight = matrix(12, 8)
    optimizer = create("low_rank_adamw", weight, rank=3, residual=residual, refresh_interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, scale in enumerate([0, 1, 0, 0, 1, 1, 1, 0, 1, 0]):
            step(optimizer, scale * gradient("a", weight.shape, i))
            assert weight.isfinite().all()
            assert all(value.isfinite().all() for value in optimizer.state[weight].values())


@every_low_rank
def test_skipped_refreshes_are_saved(name: str) -> None:
    weight = matrix(9, 6)
    optimizer = create(name, weight)
    with pytest.warns(UserWarning, match="not finite"):
        step(optimizer, torch.full_like(weight, torch.nan))
    twin = create(name, matrix(9, 6))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.skipped_refreshes == 1


@pytest.mark.parametrize("name", ["svd", "subspace", "power", "dct"])
def test_a_gradient_not_finite_on_one_shard_is_refused_on_all(name: str) -> None:
    """Also where one rank decides, and the others are told."""

    def worker() -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        model = MixedModel()
        shard(model, optim.LowRankAdamW, "preferred")
        optimizer = build("low_rank_adamw", model, basis=name, residual="drop", refresh_interval=2)
        run_steps(model, optimizer, 0, 2)
        matrices = [p for key, p in model.named_parameters() if key.startswith("matrix") and "weight" in key]
        before = [directions(optimizer, param) for param in matrices]
        for i, param in enumerate(matrices):  # one after the other is broken, on rank 1 or 0
            local = param.grad.to_local()
            if dist.get_rank() == (i + 1) % 2 and local.numel():
                local.fill_(torch.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        kept = [directions(optimizer, param) for param in matrices]
        for one, other in zip(before, kept, strict=True):
            assert_equal(one, other)
        return {f"{i} {key}": value for i, found in enumerate(kept) for key, value in found.items()}, (
            optimizer.skipped_refreshes
        )

    (first, skipped), (second, skipped_too) = run_distributed(worker, 2)
    assert_equal(first, second)
    assert skipped == skipped_too > 0


# -------------------------------------------------------------------------------------------------------- checkpoints


def saved_by(name: str, **arguments: Any) -> dict[str, Any]:
    weight = matrix(12, 8)
    optimizer = create(name, weight, **arguments)
    step(optimizer, gradient("a", weight.shape, 0))
    return copy.deepcopy(optimizer.state_dict())


def refuses(optimizer: optim.MatrixOptimizer, saved: dict[str, Any], message: str) -> None:
    """And is as it was."""
    (param,) = optimizer.state
    before, settings = held(optimizer, param), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(held(optimizer, param), before)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == settings
    assert set(optimizer.state) == {param}
    step(optimizer, gradient("a", param.shape, 1))


@pytest.mark.parametrize("name", [name for name in WITH_RANK if name != "welore_adamw"])  # it takes it over
def test_a_checkpoint_of_another_rank_is_refused(name: str) -> None:
    optimizer = create(name, matrix(12, 8), rank=3)
    key = "basis_index" if name == "trion" else "exp_avg"
    refuses(
        optimizer,
        saved_by(name, rank=2),
        rf"^the saved '{key}' of 'layer0\.weight' has shape \(.*2,?\); expected \(.*3,?\): it was written with another "
        "rank or model; load it with the same$",
    )


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    refuses(create("dct_adamw", matrix(13, 8)), saved_by("dct_adamw"), r"has shape \(12, 2\); expected \(13, 2\)")
    refuses(create("muon", matrix(8, 12)), saved_by("muon"), r"has shape \(12, 8\); expected \(8, 12\)")


@pytest.mark.parametrize(
    ("written", "read"), [("dct", "svd"), ("svd", "random"), ("random", "identity"), ("power", "hadamard")]
)
def test_a_checkpoint_of_another_kind_of_basis_is_refused(written: str, read: str) -> None:
    saved = saved_by("low_rank_adamw", basis=written, residual="drop")
    optimizer = create("low_rank_adamw", matrix(12, 8), basis=read, residual="drop")
    refuses(
        optimizer, saved, r"the saved state of 'layer0\.weight' has .*basis.*; expected .*another optimizer or basis"
    )


SAME_TENSORS = [
    ("dct", "dct_l1"),
    ("dct", "identity"),
    ("identity", "random_columns"),
    ("hadamard", "dct"),
    ("svd", "subspace"),
    ("power", "svd"),
    ("gaussian", "random"),
]


@pytest.mark.parametrize(("written", "read"), SAME_TENSORS)
def test_a_checkpoint_of_another_basis_with_the_same_tensors_is_refused(written: str, read: str) -> None:
    """Column 3 of one matrix is not column 3 of another."""
    keys = [set(BASES[basis].state_tensors(8, 2, torch.float64)) for basis in (written, read)]
    assert keys[0] == keys[1]
    saved = saved_by("low_rank_adamw", basis=written, residual="drop", moments="keep")
    optimizer = create("low_rank_adamw", matrix(12, 8), basis=read, residual="drop", moments="keep")
    expected = rf"^the checkpoint was written with basis='{written}' and this optimizer has basis='{read}'"
    refuses(optimizer, saved, expected)


@pytest.mark.parametrize(("written", "read"), [("apollo", "apollo_mini"), ("error_feedback", "ldadam")])
def test_a_checkpoint_of_another_treatment_with_the_same_tensors_is_refused(written: str, read: str) -> None:
    saved = saved_by("low_rank_adamw", residual=written)
    optimizer = create("low_rank_adamw", matrix(12, 8), residual=read)
    expected = rf"^the checkpoint was written with residual='{written}' and this optimizer has residual='{read}'"
    refuses(optimizer, saved, expected)


@pytest.mark.parametrize(("written", "read"), [("drop", "fira"), ("error_feedback_8bit", "error_feedback")])
def test_a_checkpoint_of_another_treatment_is_refused(written: str, read: str) -> None:
    saved = saved_by("low_rank_adamw", residual=written)
    refuses(create("low_rank_adamw", matrix(12, 8), residual=read), saved, r"the saved state of 'layer0\.weight' has ")


def test_settings_that_do_not_change_what_state_means_come_from_the_checkpoint() -> None:
    saved = saved_by("low_rank_adamw", lr=0.5, refresh_interval=7, seed=3, moments="keep", scale=0.1)
    optimizer = create("low_rank_adamw", matrix(12, 8), lr=0.1, refresh_interval=9)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["refresh_interval"], group["seed"], group["scale"]) == (0.5, 7, 3, 0.1)
    assert group["moments"] == "keep"


def test_the_bases_of_vectors_and_of_groups_apart_do_not_matter() -> None:
    """Only a matrix has directions: a group of norms may have been written with any name of a basis."""
    model = MixedModel()
    saved = copy.deepcopy(build("low_rank_adamw", model, basis="identity").state_dict())
    for group in saved["param_groups"]:
        if group["role"] != "matrix":
            group["basis"] = "dct"
    build("low_rank_adamw", MixedModel(), basis="identity").load_state_dict(saved)


def test_a_checkpoint_of_before_there_was_a_choice_is_accepted() -> None:
    """It does not say its basis; there is nothing to compare."""
    saved = saved_by("dct_adamw")
    for group in saved["param_groups"]:
        del group["basis"], group["residual"]
    create("dct_adamw", matrix(12, 8)).load_state_dict(saved)
