"""What every optimizer must do in any training loop: a new method is tested the day it has a name.

Over the same names ``tests/optim/shards/test_sharded.py`` tests that each, sharded, equals one process, and that a rank
without a gradient does not hang; ``test_contract.py`` state dicts, hooks and schedulers.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.optim.core.common_updates import ADAMW
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests import reference
from tests.optim.models import (
    LR,
    REFRESH_INTERVAL,
    MixedModel,
    assert_equal,
    build,
    gradient,
    plain_weights,
    prepare,
    run_steps,
    set_gradients,
    states,
    tolerance,
    trainable,
    trained_matrix,
    weights,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in optim.names()},
    **{residual: ("low_rank_adamw", {"residual": residual}) for residual in RESIDUALS},
    "svd": ("low_rank_adamw", {"basis": "svd", "residual": "drop"}),
    "dct_adamw 8bit": ("dct_adamw", {"state_dtype": "8bit"}),
    "point rank": ("riemannian_adamw", {"point_rank": 2, "point_refresh_interval": 2, "amsgrad": True}),
    "sst kept": ("sst", {"keep_sigma_moments": True}),
    "sst frozen 8bit": ("sst", {"keep_vector_moments": True}),
}
LAYERS: dict[str, dict[str, Any]] = {"sst frozen 8bit": {"frozen_dtype": "8bit", "gradient": "plain"}}
"""Settings of converted layers, by case."""

every_name = pytest.mark.parametrize("name", optim.names())
every_case = pytest.mark.parametrize("case", CASES)


def new_model(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return prepare(CASES[case][0], MixedModel(dtype), **LAYERS.get(case, {}))


def optimizer_of(case: str, model: nn.Module, **arguments: Any) -> optim.MatrixOptimizer:
    """New directions at every second step, except for what has them at every step."""
    name, settings = CASES[case]
    if " refresh_interval=" in optim.describe(name):
        settings = {"refresh_interval": 2, **settings}
    return build(name, model, **{**settings, **arguments})


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_never_written(case: str, dtype: torch.dtype) -> None:
    model = new_model(case, dtype)
    optimizer = optimizer_of(case, model)
    for step in range(4):
        set_gradients(model, step)
        held = {name: (p.grad, p.grad._version, p.grad.clone()) for name, p in trainable(model).items()}
        optimizer.step()
        assert all(param.grad is None for param in model.parameters() if not param.requires_grad)
        for name, param in trainable(model).items():
            grad, version, value = held[name]
            assert param.grad is grad
            assert grad._version == version, name
            assert torch.equal(grad, value), name


@every_case
def test_a_tensor_lr_and_a_scheduler_are_a_float_lr_and_a_scheduler(case: str) -> None:
    finals = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = new_model(case)
        optimizer = optimizer_of(case, model, lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
        before = weights(model)
        for step in range(7):  # 6 end with what sets a factor of ReLoRA back to zero
            run_steps(model, optimizer, step, step + 1)
            scheduler.step()
        finals.append(weights(model))
        assert all(not torch.equal(finals[-1][name], before[name]) for name in trainable(model))
    assert_equal(*finals, max(1e-13, tolerance(CASES[case][0]) / 1e3))


@every_case
def test_the_closure_is_called_once_with_gradients_enabled(case: str) -> None:
    model, twin = new_model(case), new_model(case)
    optimizer, twin_optimizer = optimizer_of(case, model), optimizer_of(case, twin)
    calls = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        set_gradients(model, 0)
        return "the loss"

    with torch.no_grad():
        assert optimizer.step(closure) == "the loss"
    assert calls == [True]
    set_gradients(twin, 0)
    assert twin_optimizer.step() is None
    assert_equal(weights(model), weights(twin))


@every_case
def test_a_missing_gradient_leaves_its_parameter_and_state_alone(case: str) -> None:
    """But for counters: a matrix's clock is that of its refreshes, which are due at one time on all ranks.

    Not so where state changes with or without a gradient, at a draw of SST, a restart of ReLoRA,
    new directions of points: these are put off.
    """
    model = new_model(case)
    never: dict[str, dict[str, Any]] = {
        "sst": {"resample_every": 100},
        "relora": {"restart_every": 100},
        "riemannian_adamw": {"point_refresh_interval": 100},
    }
    optimizer = optimizer_of(case, model, **never.get(CASES[case][0], {}))
    run_steps(model, optimizer, 0, 3)
    for step in (3, 4, 5):  # with and without a refresh
        missing = {name for i, name in enumerate(trainable(model)) if i % 3 == step % 3}
        before = {**weights(model), **states(model, optimizer)}
        set_gradients(model, step)
        for name, param in model.named_parameters():
            if name in missing:
                param.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        after = {**weights(model), **states(model, optimizer)}
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        counters = ("step", "clock", "skipped_refreshes")
        touched = {name for name in missing for key in changed if key.startswith(name) and not key.endswith(counters)}
        assert touched == set()
        assert changed >= set(trainable(model)) - missing
        assert not changed & (set(weights(model)) - set(trainable(model)))


@every_case
def test_gradients_of_any_layout_in_memory(case: str) -> None:
    """Transposed, a part of something larger, or one row for all."""
    finals = []
    for turned in (False, True):
        model = new_model(case)
        # more directions than a gradient of one row has would be of rounding alone
        few = {"score": "uniform"} if CASES[case][0] == "welore_adamw" else {}
        optimizer = optimizer_of(case, model, **few)
        for step in range(4):
            for i, (name, param) in enumerate(trainable(model).items()):
                value = gradient(name, param.shape, step)
                if i % 3 == 2:  # along the longer dimension: along the other the DCT would discard rounding only
                    row = value[:, :1] if value.ndim == 2 and value.shape[0] < value.shape[1] else value[:1]
                    value = row.expand(param.shape)
                if not turned:
                    value = value.contiguous()
                elif i % 3 == 0:
                    value = value.mT.contiguous().mT if value.ndim == 2 else value
                elif i % 3 == 1:
                    value = torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
                param.grad = value
            optimizer.step()
        finals.append({**weights(model), **states(model, optimizer)})
    assert_equal(*finals, 1e-10)


@every_case
def test_a_gradient_scaler_skips_what_overflows(case: str) -> None:
    model, twin = new_model(case, torch.float32), new_model(case, torch.float32)
    optimizer, twin_optimizer = optimizer_of(case, model), optimizer_of(case, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    run = 0
    for step in range(4):
        overflows = step == 2
        set_gradients(model, step)
        for param in trainable(model).values():
            param.grad *= scaler.get_scale()
        if overflows:
            trained_matrix(model.matrix_8x8).grad[0, 0] = torch.inf
        scaler.scale(torch.zeros(()))  # what makes it ready
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            set_gradients(twin, step)
            twin_optimizer.step()
            run += 1
    assert scaler.get_scale() == 2.0
    assert {state["step"].item() for state in optimizer.state.values() if state} == {float(run)}
    assert_equal(weights(model), weights(twin))


@every_name
def test_loss_falls(name: str) -> None:
    """Of a small regression, through autograd."""
    teacher = nn.Linear(12, 6)
    model = prepare(name, nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = optim.create(name, model, lr={"apollo_mini": 3e-4, "sst": 1e-2}.get(name, 3e-3))
    losses: list[float] = []
    for _ in range(60):
        x: Tensor = torch.randn(32, 12)
        loss = (model(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad(set_to_none=len(losses) % 2 == 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ----------------------------------------------------------------------------------------------------- hard gradients


@every_name
def test_a_zero_gradient_at_lr_0_changes_nothing(name: str) -> None:
    """What torch.distributed.checkpoint does to an optimizer that it believes to have no state.

    Of converted layers it changes the last digit, by which unit vectors are not quite that, and the age of moments.
    """
    model = prepare(name, MixedModel())
    optimizer = build(name, model, weight_decay=0.5)
    before, fresh = weights(model), states(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in trainable(model).values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    plain = optim.find(name).layers is None
    assert_equal(weights(model), before, 0.0 if plain else 1e-15)
    counted = {key for key, value in states(model, optimizer).items() if not torch.equal(value, fresh[key])}
    counters = (".step",) if plain else (".step", ".age")
    assert all(key.endswith(counters) for key in counted), "only the count of AdamW's updates, as in torch"
    if hasattr(optim.find(name), "skipped_refreshes"):
        assert not any(key.startswith("matrix") and "weight" in key for key in counted)


@every_name
def test_a_zero_gradient_decays_weights_at_most_and_leaves_no_trace(name: str) -> None:
    """Without directions yet, a method leaves the weight alone. Factors of layers decay by other rules."""
    model = prepare(name, MixedModel())
    optimizer = build(name, model, weight_decay=0.5 if optim.find(name).layers is None else 0.0)
    before, fresh = plain_weights(model), states(model, optimizer)
    for param in trainable(model).values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for key, value in plain_weights(model).items():
        allowed = before[key], before[key] * (1 - LR * 0.5)
        assert min((value - each).abs().max() for each in allowed) < 1e-14, key
    moments = {
        key for key in fresh if key.rpartition(".")[2] in ("exp_avg", "exp_avg_sq", "momentum", "error_feedback")
    }
    after = states(model, optimizer)
    assert not any(after[key].any() for key in moments)


@every_name
def test_a_gradient_that_is_not_finite_harms_its_own_matrix_alone(name: str) -> None:
    model = prepare(name, MixedModel())
    optimizer = build(name, model)
    before = plain_weights(model)
    for step in range(REFRESH_INTERVAL):
        set_gradients(model, step)
        if step > 0:
            trained_matrix(model.matrix_24x12).grad[0, 1] = torch.nan  # type: ignore[index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of directions that are not chosen anew: tests/optim/arguments
            optimizer.step()
    after = plain_weights(model)
    healthy = {key for key in after if not key.startswith("matrix_24x12")}
    assert all(after[key].isfinite().all() and not torch.equal(after[key], before[key]) for key in healthy)


# ------------------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_roles_that_are_not_the_methods_get_adamw(name: str) -> None:
    torch.manual_seed(0)
    model, twin = MixedModel(), MixedModel()
    twin.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    run_steps(model, optim.create(name, model, **settings), 0, 5)
    run_steps(twin, optim.AdamW(optim.param_groups(twin), **settings), 0, 5)
    own = {
        key
        for group in optim.param_groups(model)
        for key, _ in group["params"]
        if optim.find(name).updates.get(group["role"], ADAMW) is not ADAMW
    }
    expected = weights(twin)
    others = {key for key, value in weights(model).items() if not torch.equal(value, expected[key])}
    assert own - {"matrix_1x8.weight", "matrix_5x1.weight"} <= others <= own, "one direction of one is AdamW too"


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_bfloat16_follows_float32_to_its_precision(name: str) -> None:
    """Only storage is rounded, not arithmetic. Directions are chosen once, or at every step and are all."""
    finals = []
    chosen = {"refresh_interval": 100} if " refresh_interval=" in optim.describe(name) else {"rank": 12}
    given = {key: value for key, value in chosen.items() if f" {key}=" in optim.describe(name)}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(24, 12, dtype=dtype))  # zero, so that it is of the size of its updates
        optimizer = optim.create(name, [{"params": [("weight", weight)], "role": "matrix"}], lr=LR, **given)
        for step in range(8):
            weight.grad = gradient("weight", weight.shape, step).bfloat16().to(dtype)
            optimizer.step()
        assert weight.dtype == dtype
        assert weight.any()
        finals.append(weight.detach().float())
    exact, rounded = finals
    roundings = 16 if name == "ldadam" else 4  # it follows rounded directions anew at every step; others stay below 2.3
    assert (exact - rounded).norm() < roundings * 2**-8 * exact.norm()


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_takes_the_bytes_of_its_layouts_before_and_after_steps(name: str, dtype: torch.dtype) -> None:
    model = prepare(name, MixedModel(dtype))
    optimizer = build(name, model)
    layouts = optim.layout_bytes(optimizer)
    for steps in (0, 2 * REFRESH_INTERVAL + 1):
        run_steps(model, optimizer, 0, steps)
        assert optim.state_bytes(optimizer) == layouts


@every_name
def test_a_number_that_is_none_is_refused_by_its_name(name: str) -> None:
    """For every argument with a number as its default."""
    model = prepare(name, MixedModel())
    for key, default in {k: p.default for k, p in inspect.signature(optim.find(name)).parameters.items()}.items():
        if isinstance(default, float | int) and not isinstance(default, bool):
            with pytest.raises((ValueError, TypeError), match=key):
                optim.create(name, model, **{key: "much"})


def test_every_method_has_a_literal_reference() -> None:
    """Slow and obvious code in tests/reference; that of AdamW is torch's own."""
    files = Path(reference.__path__[0]).glob("*.py")
    modules = [importlib.import_module(f"tests.reference.{path.stem}") for path in files]
    covered = {name for module in modules for name in getattr(module, "REFERENCE_OF", ())}
    assert covered | {"adamw"} == set(optim.names())
