"""SST against its slow reference, and what an iteration, a round, a checkpoint and each option promise."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.layers.spectral import SpectralLinear, to_spectral
from tests.optim.models import assert_equal, gradient, states, weights
from tests.reference.sst import ReferenceSST

SPECTRAL = r"^(tall|square|wide)$"
RANK = 2
T3 = 4
LR = 1e-2


class Network(nn.Module):
    """A tall, a square and a wide matrix to be made spectral (k = 6, 10, 4), and parameters for AdamW."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=dtype)
        self.tall = nn.Linear(6, 10, dtype=dtype)
        self.square = nn.Linear(10, 10, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(10, dtype=dtype)
        self.wide = nn.Linear(10, 4, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.tall(self.embedding(tokens)))
        return self.wide(self.norm(torch.tanh(self.square(x)) + x))


def with_singular_values(model: Network, values: Callable[[Tensor], Tensor]) -> Network:
    for name in ("tall", "square", "wide"):
        weight = model.get_parameter(f"{name}.weight").data
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        weight.copy_((u * values(sigma)) @ vt)
    return model


def spectral_network(
    rank: int = RANK, *, dtype: torch.dtype = torch.float64, layers: str = SPECTRAL, **settings: Any
) -> Network:
    """Singular values are away from 0, where an SVD may give u_i and v_i any signs."""
    torch.manual_seed(0)
    plain = with_singular_values(Network(dtype), lambda sigma: sigma + 0.5)
    model = to_spectral(plain, rank, layers=layers, **settings)
    assert isinstance(model, Network)
    return model


def build(model: nn.Module, **settings: Any) -> optim.SST:
    return optim.SST(model, **{"lr": LR, "resample_every": T3, "resvd_every": 3, "warmup_steps": 3, **settings})


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Of data that follow from the step alone."""
    generator = torch.Generator().manual_seed(step % 3)
    tokens = torch.randint(0, 11, (16,), generator=generator)
    target = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    return (model(tokens) - target).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Steps first .. last - 1; the losses."""
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def step_with(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradient_of: Callable[[str, Tensor], Tensor] | None = None
) -> None:
    """A step with gradients made by hand; zeros unless told otherwise."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param) if gradient_of is None else gradient_of(name, param)
    optimizer.step()


def drawn_gradient(step: int) -> Callable[[str, Tensor], Tensor]:
    return lambda name, param: gradient(name, param.shape, step).to(param.dtype)


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpectralLinear)}


def merged(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in spectral_layers(model).items()}


def set_everywhere(optimizer: torch.optim.Optimizer, **settings: Any) -> None:
    for group in optimizer.param_groups:
        group.update(settings)


def sigma_of(layer: SpectralLinear) -> Tensor:
    frozen = [layer.sigma_frozen] if hasattr(layer, "sigma_frozen") else []
    return torch.cat([layer.sigma_active, *frozen]).detach()


class Decompositions:
    """Replaces ``decompose`` for an optimizer, and records the shapes it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.error = error
        self._original = optim.spectral.iterations.decompose
        monkeypatch.setattr("lowrank_train.optim.spectral.iterations.decompose", self)

    def __call__(self, weight: Tensor) -> dict[str, Tensor]:
        self.shapes.append(tuple(weight.shape))
        if self.error is not None:
            raise self.error
        return self._original(weight)


# -------------------------------------------------------------------------------------------------------- the reference


def active_set(layer: SpectralLinear, reference: ReferenceSST) -> list[int]:
    """Which of the reference's triplets are active, by what they hold: places and signs may differ."""
    u, v = layer.u_active.detach().numpy(), layer.v_active.detach().numpy()
    overlap = np.abs(u @ reference.U) * np.abs(v @ reference.V)
    chosen = overlap.argmax(1)
    assert overlap.max(1).min() > 1 - 1e-9
    assert len(set(chosen.tolist())) == layer.rank
    np.testing.assert_allclose(layer.sigma_active.detach().numpy(), reference.Sigma[chosen], rtol=0, atol=1e-9)
    return sorted(chosen.tolist())


def follow_reference(
    rank: int = RANK,
    *,
    layers: str = SPECTRAL,
    steps: int = 6 * T3 + 2,
    enhanced: bool = True,
    sampling: str = "multinomial",
    values: Callable[[Tensor], Tensor] = lambda sigma: sigma + 0.5,
    **settings: Any,
) -> dict[str, ReferenceSST]:
    """Train both; W, active triplets and all other parameters must agree after every step.

    The reference takes its gradients from a plain model that holds its own W. ``values``: of singular values.
    """
    torch.manual_seed(0)
    plain = with_singular_values(Network(), values)
    model = to_spectral(
        copy.deepcopy(plain), rank, layers=layers, gradient="enhanced" if enhanced else "plain", sampling=sampling
    )
    both: dict[str, Any] = {"lr": LR, "resample_every": T3, "resvd_every": 3, "warmup_steps": 3, **settings}
    optimizer = optim.SST(model, sampling=sampling, **both)
    references = {
        name: ReferenceSST(
            plain.get_submodule(name).weight.detach().numpy().copy(),
            **both,
            enhanced=enhanced,
        )
        for name in spectral_layers(model)
    }
    others = {name: p for name, p in plain.named_parameters() if name.removesuffix(".weight") not in references}
    decay = both.get("weight_decay", 0.0)
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay if p.ndim > 1 else 0.0} for p in others.values()],
        lr=LR,
        betas=both.get("betas", (0.9, 0.999)),
    )
    active = {name: active_set(layer, references[name]) for name, layer in spectral_layers(model).items()}
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in references}
    for name, reference in references.items():
        reference.begin_iteration(active[name])

    for step in range(steps):
        for name, reference in references.items():
            plain.get_submodule(name).weight.data.copy_(torch.from_numpy(reference.W()))
        plain.zero_grad()
        loss_of(plain, step).backward()
        adamw.step()
        for name, reference in references.items():
            reference.step(plain.get_submodule(name).weight.grad.numpy())
        train(model, optimizer, step, step + 1)
        for name, reference in references.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, SpectralLinear)
            ended = reference.end_iteration()
            np.testing.assert_allclose(layer.weight.numpy(), reference.W(), rtol=0, atol=1e-9)
            np.testing.assert_allclose(
                np.sort(sigma_of(layer).numpy()), np.sort(reference.Sigma), rtol=0, atol=1e-9, err_msg=name
            )
            chosen = active_set(layer, reference)
            if ended:
                reference.begin_iteration(chosen)
                seen[name].add(tuple(chosen))
            assert chosen == reference.S, f"{name} after step {step}"
        for name, param in others.items():
            torch.testing.assert_close(model.get_parameter(name), param, rtol=0, atol=1e-9)
    if both["resvd_every"] != 0:
        assert all((reference.Sigma > 0).all() for reference in references.values())
    if sampling == "multinomial" and rank == RANK:
        assert all(len(sets) >= 3 for sets in seen.values()), "the active triplets must change"
    return references


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enhanced": False},
        {"weight_decay": 0.3},
        {"betas": (0.5, 0.8), "warmup_steps": 9},
        {"keep_sigma_moments": True},
        {"keep_vector_moments": True},
        {"keep_vector_moments": True, "keep_sigma_moments": True, "resvd_every": 0},
        {"enhanced": False, "keep_vector_moments": True},
        {"resvd_every": 0},
        {"resvd_every": 1},
        {"sampling": "uniform"},
        {"sampling": "sequential"},
        {"sampling": "top"},
    ],
    ids=str,
)
def test_equals_reference(settings: dict[str, Any]) -> None:
    follow_reference(**settings)


def test_negative_singular_values_equal_reference() -> None:
    """Without re-SVD: the vectors of a singular value 0 are not unique."""
    settings: dict[str, Any] = {"resvd_every": 0, "keep_sigma_moments": True, "keep_vector_moments": True}
    references = follow_reference(**settings, values=lambda sigma: 0.05 * sigma)
    assert all(reference.negative > 0 for reference in references.values()), "the case must be met"


def test_at_full_rank_equals_reference() -> None:
    references = follow_reference(10, layers="^square$", resvd_every=2)
    assert list(range(10)) == references["square"].S


def test_one_active_triplet_equals_reference() -> None:
    follow_reference(1, steps=4 * T3)


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("resvd_every", [0, 1])
@pytest.mark.parametrize("sampling", ["multinomial", "sequential"])
def test_neither_a_draw_nor_a_decomposition_moves_w(
    dtype: torch.dtype, tolerance: float, resvd_every: int, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spectral_network(dtype=dtype)
    optimizer = build(model, resvd_every=resvd_every, sampling=sampling)
    decompositions = Decompositions(monkeypatch)
    train(model, optimizer, 0, T3 - 1)
    before, active = merged(model), weights(model)
    set_everywhere(optimizer, lr=0.0)
    train(model, optimizer, T3 - 1, T3)
    assert len(decompositions.shapes) == 3 * resvd_every
    assert_equal(merged(model), before, tolerance)
    after = weights(model)
    assert not any(torch.equal(after[f"{name}.u_active"], active[f"{name}.u_active"]) for name in before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_after_every_step_vectors_have_length_one_and_no_singular_value_is_negative(
    dtype: torch.dtype, tolerance: float
) -> None:
    model = spectral_network(dtype=dtype)
    optimizer = build(model, lr=0.3)
    smallest = math.inf
    for step in range(3 * T3 + 1):
        train(model, optimizer, step, step + 1)
        for layer in spectral_layers(model).values():
            for vectors in (layer.u_active, layer.v_active, layer.u_frozen, layer.v_frozen):
                assert (vectors.norm(dim=1) - 1).abs().max() < tolerance
            smallest = min(smallest, sigma_of(layer).min().item())
    assert smallest == 0, "the case must be met"


def test_frozen_vectors_do_not_move_between_draws() -> None:
    model = spectral_network()
    optimizer = build(model, resample_every=100)
    before = weights(model)
    train(model, optimizer, 0, 5)
    after = weights(model)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.endswith(("u_frozen", "v_frozen")), name


def test_gradients_are_never_written() -> None:
    model = spectral_network()
    optimizer = build(model)
    for step in range(T3 + 1):
        loss_of(model, step).backward()
        expected = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
        optimizer.step()
        assert all(torch.equal(model.get_parameter(name).grad, value) for name, value in expected.items())
        optimizer.zero_grad()


def test_the_global_generator_is_not_touched() -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=1)
    state = torch.get_rng_state()
    for step in range(2 * T3):
        step_with(model, optimizer, drawn_gradient(step))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ iterations and rounds


def test_an_iteration_begins_without_moments() -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=0)
    for step in range(1, 2 * T3 + 1):
        train(model, optimizer, step, step + 1)
        for name, value in states(model, optimizer).items():
            layer, _, rest = name.rpartition(".")
            if rest in ("exp_avg", "exp_avg_sq", "age") and layer.rpartition(".")[2].endswith(("active", "frozen")):
                assert value.any() == (step % T3 != 0), f"{name} after step {step}"
            elif rest == "age":
                assert value.eq(step % T3).all(), name
        assert optimizer.state[model.norm.weight]["step"] == step


def rows_by_content(model: nn.Module, optimizer: optim.SST, name: str) -> dict[bytes, dict[str, Tensor | None]]:
    """Of one layer: by the bits of u and v of a triplet, its sigma and all its state."""
    layer, found = model.get_submodule(name), {}
    for segment in ("active", "frozen"):
        u, v, sigma = (layer.get_parameter(f"{kind}_{segment}") for kind in ("u", "v", "sigma"))
        for i in range(len(sigma)):
            row: dict[str, Tensor | None] = {"sigma": sigma.detach()[i].clone()}
            for kind, param in (("u", u), ("v", v), ("sigma", sigma)):
                for key in ("exp_avg", "exp_avg_sq", "age"):
                    state = optimizer.state[param]
                    row[f"{kind}.{key}"] = state[key][i].clone() if key in state else None
            found[u.detach()[i].numpy().tobytes() + v.detach()[i].numpy().tobytes()] = row
    assert len(found) == layer.rank + len(layer.sigma_frozen)
    return found


@pytest.mark.parametrize("keep_sigma", [False, True])
@pytest.mark.parametrize("keep_vectors", [False, True])
def test_moments_that_are_kept_stay_with_their_triplet(keep_sigma: bool, keep_vectors: bool) -> None:
    """Against a twin that makes the same step, but does not draw after it."""
    model = spectral_network(RANK + 1)
    settings = {"keep_sigma_moments": keep_sigma, "keep_vector_moments": keep_vectors, "resvd_every": 0, "seed": 1}
    optimizer = build(model, warmup_steps=0, **settings)
    both_kinds: set[str] = set()
    for iteration in range(3):
        train(model, optimizer, iteration * T3, iteration * T3 + T3 - 1)
        twin_model, twin = copy.deepcopy((model, optimizer))
        set_everywhere(twin, resample_every=10**6)
        for one, its_optimizer in ((model, optimizer), (twin_model, twin)):
            train(one, its_optimizer, iteration * T3 + T3 - 1, (iteration + 1) * T3)
        for name in spectral_layers(model):
            before, after = rows_by_content(twin_model, twin, name), rows_by_content(model, optimizer, name)
            assert before.keys() == after.keys()
            for content, row in after.items():
                old = before[content]
                assert row["sigma"] == old["sigma"]
                stayed = row["u.age"] is not None and old["u.age"] is not None
                if row["u.age"] is not None:
                    both_kinds.add("drawn again" if stayed else "new")
                for key, value in row.items():
                    if value is None or key == "sigma":
                        continue
                    kept = keep_sigma if key.startswith("sigma") else keep_vectors and stayed
                    expected = old[key] if kept else torch.zeros_like(value)
                    assert expected is not None
                    assert torch.equal(value, expected), f"{name} {key}"
    assert both_kinds == {"drawn again", "new"}


@pytest.mark.parametrize("keep", [False, True])
def test_a_decomposition_ends_all_moments(keep: bool) -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=1, keep_sigma_moments=keep, keep_vector_moments=keep)
    train(model, optimizer, 0, T3)
    for layer in spectral_layers(model).values():
        for param in (layer.u_active, layer.v_active, layer.sigma_active, layer.sigma_frozen):
            assert not any(optimizer.state[param][key].any() for key in ("exp_avg", "exp_avg_sq", "age"))


@pytest.mark.parametrize("warmup_steps", [0, 1, 3, T3, 7])
@pytest.mark.parametrize("resvd_every", [0, 1])
def test_the_learning_rate_rises_anew_after_every_draw(warmup_steps: int, resvd_every: int) -> None:
    """Where the gradients of sigma are 1 a step of it is lr_t."""
    model = spectral_network()
    for layer in spectral_layers(model).values():
        for param in (layer.sigma_active, layer.sigma_frozen):
            param.data.add_(10)
    optimizer = build(model, warmup_steps=warmup_steps, resvd_every=resvd_every)
    ones = lambda name, param: torch.full_like(param, float("sigma" in name))  # noqa: E731
    for step in range(3 * T3):
        before = {name: sigma_of(layer).sum() for name, layer in spectral_layers(model).items()}
        step_with(model, optimizer, ones)
        expected = LR * min(1.0, (step % T3 + 1) / max(1, warmup_steps))
        for name, layer in spectral_layers(model).items():
            sigma = sigma_of(layer)
            assert (before[name] - sigma.sum()).item() / len(sigma) == pytest.approx(expected, rel=1e-6)


def test_the_warm_up_is_of_the_factors_only() -> None:
    model = spectral_network()
    optimizer = build(model, warmup_steps=100)
    before = model.wide.bias.detach().clone()
    step_with(model, optimizer, lambda name, param: torch.ones_like(param))
    torch.testing.assert_close(before - model.wide.bias, torch.full_like(before, LR), rtol=1e-6, atol=0)


def test_weight_decay_is_of_sigma() -> None:
    model = spectral_network()
    optimizer = build(model, warmup_steps=2, weight_decay=0.5, resample_every=3)
    before = weights(model)
    for _ in range(2):
        step_with(model, optimizer)
    left = (1 - LR * 0.5 / 2) * (1 - LR * 0.5)
    for name, value in weights(model).items():
        if "sigma" in name:
            torch.testing.assert_close(value, before[name] * left, rtol=1e-14, atol=0)
        elif name == "embedding.weight":
            torch.testing.assert_close(value, before[name] * (1 - LR * 0.5) ** 2, rtol=1e-14, atol=0)
        else:
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-15)


def shapes_by_iteration(monkeypatch: pytest.MonkeyPatch, iterations: int, **settings: Any) -> list[list[int]]:
    """The k of the layers that are decomposed at the end of iterations 1, 2, ..."""
    model = spectral_network()
    optimizer = build(model, **settings)
    decompositions, found = Decompositions(monkeypatch), []
    for step in range(iterations * T3):
        step_with(model, optimizer, drawn_gradient(step))
        if (step + 1) % T3 == 0:
            found.append([min(shape) for shape in decompositions.shapes])
        else:
            assert not decompositions.shapes
        decompositions.shapes.clear()
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"resvd_every": 0}, [[]] * 7),
        ({"resvd_every": 1}, [[6, 10, 4]] * 7),
        ({"resvd_every": 3}, [[], [], [6, 10, 4], [], [], [6, 10, 4], []]),
        ({"resvd_every": None}, [[], [], [], [], [6, 10, 4], [], []]),
    ],
    ids=str,
)
def test_when_layers_are_decomposed(
    settings: dict[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shapes_by_iteration(monkeypatch, 7, **settings) == expected


@pytest.mark.parametrize("resvd_every", [None, 0])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_sequential_gives_every_triplet_a_turn_in_each_round(rank: int, resvd_every: int | None) -> None:
    """From the start or a re-SVD to the next; nothing moves, so a singular value tells a triplet."""
    model = spectral_network(rank, sampling="sequential")
    optimizer = build(model, sampling="sequential", lr=0.0, resvd_every=resvd_every, resample_every=1)
    layers = spectral_layers(model)
    turns = math.ceil(10 / rank)
    everything = {name: {round(x, 9) for x in sigma_of(layer).tolist()} for name, layer in layers.items()}
    active: dict[str, list[set[float]]] = {name: [] for name in layers}
    for _ in range(3 * turns):
        for name, layer in layers.items():
            active[name].append({round(x, 9) for x in layer.sigma_active.tolist()})
        step_with(model, optimizer)
    for name in layers:
        for start in range(0, 2 * turns, turns):
            window = active[name][start : start + turns]
            assert set().union(*window) == everything[name], f"{name} from iteration {start}"
            if len(everything[name]) == turns * rank:
                assert sum(len(one) for one in window) == len(everything[name])


def test_layers_and_iterations_draw_differently() -> None:
    """Twins of one weight in the order of its singular values, so that only their place differs."""
    torch.manual_seed(0)
    first = nn.Linear(12, 12, dtype=torch.float64)
    model = to_spectral(nn.Sequential(first, copy.deepcopy(first)), 3, layers="")
    optimizer = build(model, lr=0.0, resvd_every=1, resample_every=1)
    drawn = []
    for _ in range(4):
        step_with(model, optimizer)
        for layer in spectral_layers(model).values():
            drawn.append(tuple(sorted(round(x, 9) for x in layer.sigma_active.tolist())))
    assert len(set(drawn)) >= 7


def test_seeds_of_an_optimizer_draw_differently_and_equal_ones_alike() -> None:
    results = []
    for seed in (0, 0, 1):
        model = spectral_network()
        train(model, build(model, seed=seed), 0, T3)
        results.append(weights(model))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["square.u_active"], results[2]["square.u_active"])


# ---------------------------------------------------------------------------------------------------- failures of a SVD


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("no convergence"), ValueError("not finite")], ids=repr)
def test_a_decomposition_that_fails_keeps_the_factors_and_training_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=1)
    train(model, optimizer, 0, T3 - 1)
    decompositions = Decompositions(monkeypatch, error)
    before = merged(model)
    set_everywhere(optimizer, lr=0.0)
    with pytest.warns(UserWarning, match=r"re-SVD of '(tall|square|wide)' failed") as warned:
        train(model, optimizer, T3 - 1, T3)
    assert len(warned) == 3
    assert optimizer.resvd_failures == optimizer.figures()["resvd_failures"] == 3
    assert_equal(merged(model), before, 1e-14)
    set_everywhere(optimizer, lr=LR)
    decompositions.error = None
    losses = train(model, optimizer, T3, 3 * T3)
    assert len(decompositions.shapes) == 3 + 6
    assert optimizer.resvd_failures == 3
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("factor", ["u_frozen", "v_active", "sigma_frozen", "sigma_active"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("sampling", ["multinomial", "top"])
def test_a_weight_that_is_not_finite_is_left_to_the_loss_to_report(factor: str, value: float, sampling: str) -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=1, sampling=sampling)
    model.square.get_parameter(factor).data.view(-1)[0] = value
    for step in range(2 * T3):
        ends = (step + 1) % T3 == 0
        warned = pytest.warns(UserWarning, match=r"re-SVD of 'square' failed") if ends else nullcontext()
        with warned:
            step_with(model, optimizer, drawn_gradient(step))
    assert optimizer.resvd_failures == 2
    after = weights(model)
    assert all(tensor.isfinite().all() for name, tensor in after.items() if not name.startswith("square"))


# ----------------------------------------------------------------------------------------------------------- checkpoint


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("saved_at", [0, T3 + 2, 2 * T3 - 1, 2 * T3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"keep_sigma_moments": True, "keep_vector_moments": True, "sampling": "sequential"}],
    ids=["paper", "ours"],
)
def test_resuming_is_bit_exact(saved_at: int, settings: dict[str, Any]) -> None:
    settings = {"resvd_every": 2, **settings}
    model = spectral_network()
    optimizer = build(model, **settings)
    train(model, optimizer, 0, saved_at)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, saved_at, 4 * T3 + 1)

    torch.manual_seed(1)
    resumed_model = to_spectral(Network(), RANK, layers=SPECTRAL, seed=9)
    resumed = build(resumed_model, **settings, lr=123.0)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed_model, resumed, saved_at, 4 * T3 + 1)
    assert_equal(weights(resumed_model), weights(model))
    assert_equal(states(resumed_model, resumed), states(model, optimizer))


@pytest.mark.parametrize("frozen_dtype", ["8bit", "float16"])
def test_resuming_with_narrow_frozen_vectors_is_bit_exact(frozen_dtype: str) -> None:
    def new() -> tuple[Network, optim.SST]:
        model = spectral_network(dtype=torch.float32, frozen_dtype=frozen_dtype)
        return model, build(model, resvd_every=2)

    model, optimizer = new()
    train(model, optimizer, 0, T3 + 1)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, T3 + 1, 3 * T3)
    resumed_model, resumed = new()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed_model, resumed, T3 + 1, 3 * T3)
    assert_equal(weights(resumed_model), weights(model))
    assert_equal(states(resumed_model, resumed), states(model, optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike_and_apart(duplicate: Any) -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=1)
    train(model, optimizer, 0, T3 + 1)
    twin_model, twin = duplicate((model, optimizer))
    before = weights(twin_model)
    train(model, optimizer, T3 + 1, 3 * T3 + 1)
    assert_equal(weights(twin_model), before)
    train(twin_model, twin, T3 + 1, 3 * T3 + 1)
    assert_equal(weights(twin_model), weights(model))
    assert_equal(states(twin_model, twin), states(model, optimizer))
    assert twin.figures().keys() == optimizer.figures().keys()


@pytest.mark.parametrize(
    ("setting", "value", "present"),
    [("tangent", True, False), ("negative_sigma", "reflect", "clamp"), ("staggered", True, False)],
)
def test_a_checkpoint_with_an_option_that_is_gone_is_refused_unless_it_was_off(
    setting: str, value: object, present: object
) -> None:
    model = spectral_network()
    optimizer = build(model)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group[setting] = value
    other_model = spectral_network()
    other = build(other_model)
    before = states(other_model, other)
    with pytest.raises(ValueError, match=f"{setting}={value!r}, an option that no longer exists; only {setting}="):
        other.load_state_dict(saved)
    assert_equal(states(other_model, other), before)
    for group in saved["param_groups"]:
        group[setting] = present
    other.load_state_dict(saved)
    assert_equal(states(other_model, other), states(model, optimizer))
    assert all(setting not in group for group in other.param_groups)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("resample_every", T3 + 1), ("resvd_every", 2), ("sampling", "top"), ("seed", 3)],
)
def test_a_checkpoint_of_another_schedule_is_refused(setting: str, value: Any) -> None:
    model = spectral_network()
    optimizer = build(model)
    before = states(model, optimizer)
    train(model, optimizer, 0, 2)
    other_model = spectral_network()
    other = build(other_model, **{setting: value})
    with pytest.raises(ValueError, match=f"{setting}="):
        other.load_state_dict(optimizer.state_dict())
    assert_equal(states(other_model, other), before)


def test_a_checkpoint_of_another_rank_is_refused() -> None:
    model, other_model = spectral_network(2), spectral_network(3)
    optimizer, other = build(model), build(other_model)
    with pytest.raises(ValueError, match=r"has shape \(2.*expected \(3.*rank"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other_model.load_state_dict(model.state_dict())


# --------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("as_groups", [False, True])
def test_a_model_without_spectral_layers_is_refused(as_groups: bool) -> None:
    model = Network()
    with pytest.raises(ValueError, match="to_spectral"):
        optim.SST(optim.param_groups(model) if as_groups else model)


@pytest.mark.parametrize("lacking", ["u_active", "v_active", "sigma_active", "u_frozen", "sigma_frozen", "v_frozen"])
def test_incomplete_groups_are_refused(lacking: str) -> None:
    groups = optim.param_groups(spectral_network())
    for group in groups:
        group["params"] = [(name, param) for name, param in group["params"] if name != f"square.{lacking}"]
    with pytest.raises(ValueError, match=f"'square'.*{lacking}"):
        build(groups)  # type: ignore[arg-type]


def test_only_trainable_parameters_are_refused() -> None:
    """``filter(requires_grad)``, as many scripts do: the frozen vectors could never be drawn."""
    groups = [group for group in optim.param_groups(spectral_network()) if group["role"] != "frozen"]
    with pytest.raises(ValueError, match="frozen"):
        build(groups)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="param_groups"):
        build(spectral_network().parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resample_every", 0),
        ("resample_every", 2.5),
        ("resample_every", True),
        ("resvd_every", -1),
        ("warmup_steps", -1),
        ("warmup_steps", None),
        ("sampling", "best"),
        ("vector_scale", 0),
        ("seed", "a"),
        ("seed", -1),
        ("keep_sigma_moments", "yes"),
        ("keep_vector_moments", 0),
        ("lr", -1.0),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
    ],
)
def test_arguments_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        build(spectral_network(), **{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("resample_every", 0), ("warmup_steps", -1), ("sampling", "best")])
def test_settings_of_a_group_out_of_range_are_refused(setting: str, value: Any) -> None:
    groups = optim.param_groups(spectral_network(), rules={"square": {setting: value}})
    with pytest.raises(ValueError, match=f"{setting}="):
        build(groups)  # type: ignore[arg-type]


def test_state_is_of_the_trained_only() -> None:
    model = spectral_network(frozen_dtype="8bit")
    optimizer = build(model)
    assert all(not optimizer.state[param] for param in model.parameters() if not param.requires_grad)
    layer = model.get_submodule("tall")
    assert isinstance(layer, SpectralLinear)
    r, k, out, width = RANK, 6, 10, 6
    own = [layer.u_active, layer.v_active, layer.sigma_active, layer.sigma_frozen]
    numbers = sum(value.numel() for param in own for key, value in optimizer.state[param].items() if "exp" in key)
    assert numbers == 2 * (r * (out + width) + k)
    assert all(optimizer.state[param]["age"].numel() == len(param) for param in own)


# -------------------------------------------------------------------------------------------------------- many settings


@pytest.mark.parametrize("frozen_dtype", ["float32", "float16", "bfloat16", "8bit"])
def test_narrow_frozen_vectors_train_for_whole_rounds(frozen_dtype: str) -> None:
    model = spectral_network(dtype=torch.float32, frozen_dtype=frozen_dtype)
    optimizer = build(model, lr=0.03)
    losses = train(model, optimizer, 0, 12 * T3 + 1)
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    expected = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "8bit": torch.int8}
    for layer in spectral_layers(model).values():
        assert layer.u_frozen.dtype == layer.v_frozen.dtype == expected[frozen_dtype]
        assert (layer.u_active.norm(dim=1) - 1).abs().max() < 1e-6
        assert sigma_of(layer).min() >= 0
        assert layer.weight.isfinite().all()


@pytest.mark.parametrize(("frozen_dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8), ("8bit", 1 / 60)])
@pytest.mark.parametrize("resvd_every", [0, 1])
def test_narrow_frozen_vectors_move_w_by_their_rounding(frozen_dtype: str, error: float, resvd_every: int) -> None:
    model = spectral_network(dtype=torch.float32, frozen_dtype=frozen_dtype)
    optimizer = build(model, lr=0.0, resample_every=1, resvd_every=resvd_every)
    before = merged(model)
    step_with(model, optimizer)
    for name, value in merged(model).items():
        assert (value - before[name]).norm() <= 2 * error * before[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_train(dtype: torch.dtype) -> None:
    model = spectral_network(dtype=torch.float32).to(dtype)
    optimizer = build(model, resvd_every=2)
    for step in range(4 * T3 + 1):
        step_with(model, optimizer, drawn_gradient(step))
    for layer in spectral_layers(model).values():
        assert layer.u_active.dtype == dtype
        assert (layer.u_active.float().norm(dim=1) - 1).abs().max() < 2**-7
        assert optimizer.state[layer.u_active]["exp_avg"].dtype == torch.float32
        assert layer.weight.isfinite().all()


def test_vectors_have_a_rate_of_their_own() -> None:
    def prepare(optimizer: optim.SST) -> None:
        for group in optimizer.param_groups:
            if group["role"] == "singular_vectors":
                group["lr"] = 3 * LR

    assert_equal(trained_weights(vector_scale=3.0), trained_weights(prepare=prepare), 1e-12)


def trained_weights(
    steps: int = 3 * T3 + 1, prepare: Callable[[optim.SST], None] | None = None, **settings: Any
) -> dict[str, Tensor]:
    model = spectral_network()
    optimizer = build(model, **settings)
    if prepare is not None:
        prepare(optimizer)
    train(model, optimizer, 0, steps)
    return {**weights(model), **states(model, optimizer)}


def test_tensor_lr_equals_float_lr() -> None:
    by_tensor = trained_weights(lr=torch.tensor(LR, dtype=torch.float64), weight_decay=0.1)
    assert_equal(by_tensor, trained_weights(weight_decay=0.1), 1e-12)


def test_a_learning_rate_scheduler_multiplies_the_warm_up() -> None:
    """A step of sigma, whose gradients are 1, is lr_t."""
    model = spectral_network()
    for layer in spectral_layers(model).values():
        for param in (layer.sigma_active, layer.sigma_frozen):
            param.data.add_(10)
    optimizer = build(model, resvd_every=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(2 * T3):
        before = sigma_of(model.square).sum()  # type: ignore[arg-type]
        step_with(model, optimizer, lambda name, param: torch.full_like(param, float("sigma" in name)))
        moved = (before - sigma_of(model.square).sum()).item() / 10  # type: ignore[arg-type]
        assert moved == pytest.approx(LR / (1 + step) * min(1, (step % T3 + 1) / 3), rel=1e-6)
        scheduler.step()


def test_groups_have_learning_rates_of_their_own() -> None:
    model = spectral_network()
    groups = optim.param_groups(model)
    for group in groups:
        group["lr"] = LR if group["role"].startswith("singular") else 0.0
    before = weights(model)
    train(model, build(groups), 0, 2)  # type: ignore[arg-type]
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) != name.endswith(("active", "sigma_frozen")), name


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model = spectral_network()
    optimizer = build(model)
    calls: Iterator[int] = iter(range(100))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, next(calls))
        loss.backward()
        return loss

    returned = [optimizer.step(closure).item() for _ in range(3 * T3 + 1)]
    twin = spectral_network()
    assert returned == train(twin, build(twin), 0, 3 * T3 + 1)
    assert_equal(weights(model), weights(twin))


def test_a_missing_gradient_leaves_a_factor_alone_and_the_clock_goes_on() -> None:
    """Up to the exchange of rows at the end: the singular values of a layer are those it had."""
    model = spectral_network()
    optimizer = build(model, resvd_every=0)
    layers = spectral_layers(model)
    before = {name: sigma_of(layer).sort().values for name, layer in layers.items()}
    for step in range(T3):
        kept = model.tall.u_active.detach().clone()
        for name, param in model.named_parameters():
            is_given = param.requires_grad and not name.startswith("tall.")
            param.grad = gradient(name, param.shape, step) if is_given else None
        optimizer.step()
        assert torch.equal(model.tall.u_active, kept) == (step + 1 < T3)
    assert optimizer.figures()["iteration"] == 1
    for name, layer in layers.items():
        assert torch.equal(sigma_of(layer).sort().values, before[name]) == (name == "tall")


def test_zero_gradients_move_nothing() -> None:
    model = spectral_network()
    optimizer = build(model)
    before = merged(model)
    for _ in range(3 * T3):
        step_with(model, optimizer)
    assert_equal(merged(model), before, 1e-12)


def test_figures_say_where_the_schedule_stands() -> None:
    model = spectral_network()
    optimizer = build(model)
    keys = {
        "iteration",
        "round",
        "orthogonality_error",
        "sampled_share",
        "resvd_time_share",
        "resvd_failures",
    }
    assert optimizer.figures().keys() == keys
    for step in range(4 * T3 + 1):
        train(model, optimizer, step, step + 1)
        figures = optimizer.figures()
        assert figures.keys() == keys
        assert figures["iteration"] == (step + 1) // T3
        assert figures["round"] == (step + 1) // (3 * T3)
        if step + 1 >= T3:
            assert all(math.isfinite(value) for value in figures.values())
            assert 0 < figures["orthogonality_error"] < 1
            assert 0 < figures["sampled_share"] < 1
            assert 0 <= figures["resvd_time_share"] <= 1
    assert figures["resvd_failures"] == 0
    assert figures["resvd_time_share"] > 0


def test_the_sampled_share_is_of_the_triplets_just_drawn() -> None:
    model = spectral_network(sampling="top")
    optimizer = build(model, sampling="top", resvd_every=0)
    train(model, optimizer, 0, T3)
    shares = [(layer.sigma_active.sum() / sigma_of(layer).sum()).item() for layer in spectral_layers(model).values()]
    assert optimizer.figures()["sampled_share"] == pytest.approx(sum(shares) / 3)


def test_unused_rounds_have_figures() -> None:
    model = spectral_network()
    optimizer = build(model, resvd_every=0)
    train(model, optimizer, 0, T3)
    figures = optimizer.figures()
    assert figures["round"] == 0
    assert figures["resvd_time_share"] == 0
