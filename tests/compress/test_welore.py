"""WeLore: spectra, ranks of one threshold, what is factored and what stays, calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.compress import calibration
from lowrank_train.compress.calibration import input_energies, input_moments, outlier_shares
from lowrank_train.compress.ranks import CLASSIFICATIONS, PlannedMatrix, compress, plan_ranks, rank_reduction
from lowrank_train.layers.choice import linear_layers
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.layers.plain import merge
from lowrank_train.spectra.spectrum import spectra
from tests.spectra.test_spectrum import build

KINDS = pytest.mark.parametrize("kind", ["llama", "opt"])


def uneven(kind: str) -> PreTrainedModel:
    """Matrices whose spectra fall at different rates, as those of trained models do."""
    model = build(kind).double()
    for index, linear in enumerate(linear_layers(model).values()):
        u, sigma, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        fall = torch.arange(1, len(sigma) + 1, dtype=torch.float64) ** -(index % 5 / 2)
        linear.weight.data = u @ (sigma * fall).diag() @ vh
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]:
    """Not to be changed: model and spectra of each kind."""
    return {kind: (model, spectra(model)) for kind, model in ((kind, uneven(kind)) for kind in ("llama", "opt"))}


Models = dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]


def tokens(count: int = 4, length: int = 12) -> Tensor:
    return torch.randint(300, (count, length), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------------- spectra


@KINDS
def test_spectra_are_those_of_torch(models: Models, kind: str) -> None:
    model, found = models[kind]
    assert list(found) == list(linear_layers(model))
    for name, linear in linear_layers(model).items():
        expected = torch.linalg.svdvals(linear.weight.detach())
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7 * float(expected[0]))


def test_spectra_name_what_is_not_finite() -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' has no singular values: .*not finite"):
        spectra(model)
    with pytest.raises(ValueError, match="layers='nothing' matches no"):
        spectra(model, "nothing")


# ----------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(
    ("shape", "first_dense"),
    [((32, 32), 16), ((48, 32), 20), ((100, 100), 50), ((8, 1000), 8), ((4096, 11008), 2986)],
)
def test_break_even_is_where_factors_stop_being_smaller(shape: tuple[int, int], first_dense: int) -> None:
    """50 % of a square matrix; 27.1 % off a 4096 x 11008 one."""
    m, n = shape
    low = [r for r in range(1, min(shape) + 1) if CLASSIFICATIONS["break_even"](r, m, n)]
    assert low == [r for r in range(1, min(shape) + 1) if r * (m + n) < m * n]
    assert low == list(range(1, first_dense))
    if shape == (4096, 11008):
        assert 1 - first_dense / 4096 == pytest.approx(0.271, abs=5e-4)


def test_half_is_the_papers_rule_and_all_takes_all() -> None:
    assert [r for r in range(1, 33) if CLASSIFICATIONS["half"](r, 32, 1000)] == list(range(1, 16))
    assert [r for r in range(1, 33) if CLASSIFICATIONS["half"](r, 33, 33)] == list(range(1, 17))
    assert [r for r in range(1, 33) if CLASSIFICATIONS["all"](r, 32, 48)] == list(range(1, 32))


@KINDS
@pytest.mark.parametrize("classification", CLASSIFICATIONS)
@pytest.mark.parametrize("score", ["minmax", "relative", "energy", "energy_per_cost", "uniform"])
def test_the_target_is_reached_up_to_one_step(models: Models, kind: str, classification: str, score: str) -> None:
    """Never missed; and one more tie of the threshold would miss it."""
    model, sigma = models[kind]
    for target in (0.1, 0.35, 0.5, 0.8):
        plan = plan_ranks(model, sigma, rank_reduction=target, score=score, classification=classification)
        assert [matrix.name for matrix in plan] == list(sigma)
        assert rank_reduction(plan) >= target - 1e-12
        for matrix in plan:
            k = min(matrix.rows, matrix.columns)
            assert matrix.full_rank == k
            assert 1 <= matrix.rank <= k
            assert matrix.is_low_rank == CLASSIFICATIONS[classification](matrix.rank, matrix.rows, matrix.columns)
            assert matrix.rank == k or matrix.is_low_rank
        if score == "uniform":
            continue  # all matrices of a shape tie
        # a matrix that leaves the low-rank ones jumps to its whole rank: no step is longer than that
        excess = sum(m.rank for m in plan) - (1 - target) * sum(m.full_rank for m in plan)
        assert -excess < max(m.full_rank for m in plan)


@KINDS
def test_ranks_fall_with_the_target_in_every_matrix(models: Models, kind: str) -> None:
    model, sigma = models[kind]
    before = [10**9] * len(sigma)
    for target in torch.linspace(0.02, 0.95, 40).tolist():
        ranks = [matrix.rank for matrix in plan_ranks(model, sigma, rank_reduction=target)]
        assert all(now <= then for now, then in zip(ranks, before, strict=True))
        before = ranks


def test_a_threshold_explains_all_ranks(models: Models) -> None:
    """What is kept scores at least as much as anything dropped, as the paper has it: one k for the whole model."""
    model, sigma = models["llama"]
    plan = plan_ranks(model, sigma, rank_reduction=0.6, classification="all")
    scaled = {name: (s - s[-1]) / (s[0] - s[-1]) for name, s in sigma.items()}
    kept = min(float(scaled[m.name][m.rank - 1]) for m in plan if m.rank > 1)
    dropped = max(float(scaled[m.name][m.rank]) for m in plan if m.rank < m.full_rank)
    assert dropped < kept
    assert len({m.rank for m in plan}) > 4


@KINDS
@pytest.mark.parametrize("classification", CLASSIFICATIONS)
def test_bytes_are_never_exceeded_and_what_is_left_is_one_step(models: Models, kind: str, classification: str) -> None:
    model, sigma = models[kind]
    whole = sum(linear.weight.numel() * 8 for linear in linear_layers(model).values())
    step = max(matrix.numel() * 8 for matrix in (linear.weight for linear in linear_layers(model).values()))
    for share in (0.2, 0.5, 0.75, 0.95):
        plan = plan_ranks(model, sigma, parameter_bytes=int(share * whole), classification=classification)
        after = sum(matrix.bytes_after for matrix in plan)
        assert after <= share * whole
        assert sum(matrix.bytes_before for matrix in plan) == whole
        if classification == "break_even":
            assert after > share * whole - (32 + 48) * 8  # one rank of the largest
        else:
            assert after > share * whole - step


def test_planned_bytes_are_those_of_the_compressed_model(models: Models) -> None:
    for model, sigma in models.values():
        before = sum(p.numel() * 8 for p in model.parameters())
        for classification in CLASSIFICATIONS:
            plan = plan_ranks(model, sigma, rank_reduction=0.45, classification=classification)
            small = compress(copy.deepcopy(model), plan)
            saved = sum(matrix.bytes_before - matrix.bytes_after for matrix in plan)
            assert sum(p.numel() * p.element_size() for p in small.parameters()) == before - saved
            assert saved > 0


def test_uniform_takes_the_same_share_of_every_matrix(models: Models) -> None:
    model, sigma = models["llama"]
    for target in (0.5, 0.75):
        plan = plan_ranks(model, sigma, rank_reduction=target, score="uniform", classification="all")
        assert {matrix.rank / matrix.full_rank for matrix in plan} == {1 - target}


def test_offsets_shift_single_shares(models: Models) -> None:
    model, sigma = models["llama"]
    offsets = {name: 0.125 if "layers.0." in name else -0.125 for name in sigma}
    plan = plan_ranks(model, sigma, rank_reduction=0.5, score="uniform", classification="all", offsets=offsets)
    for matrix in plan:
        assert matrix.rank / matrix.full_rank == (0.625 if "layers.0." in matrix.name else 0.375)


def test_ranks_keep_to_multiple_floor_and_ceiling(models: Models) -> None:
    model, sigma = models["llama"]
    plan = plan_ranks(model, sigma, rank_reduction=0.5, multiple=4, floor=6, ceiling=13)
    low = [matrix.rank for matrix in plan if matrix.is_low_rank]
    assert len(low) > 5
    assert {rank % 4 for rank in low} == {0}
    assert min(low) >= 8
    assert max(low) <= 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_reduction": 0.0}, r"rank_reduction=0.0; expected a share of the ranks to remove, above 0 and below 1"),
        ({"rank_reduction": 1.0}, r"rank_reduction=1.0; expected a share"),
        ({"rank_reduction": 1.5}, r"rank_reduction=1.5; expected a share"),
        ({"rank_reduction": float("nan")}, r"rank_reduction=nan; expected a share"),
        ({"rank_reduction": 0.999}, r"a budget of 0 is too small: the least ranks cost 14 \(floor=1, multiple=1\)"),
        ({"rank_reduction": 0.9, "floor": 8}, r"a budget of 44 is too small: the least ranks cost 112 \(floor=8"),
        ({"parameter_bytes": 1000}, r"a budget of 1,000 is too small: the least ranks cost"),
        ({}, "give exactly one of rank_reduction and parameter_bytes"),
        ({"rank_reduction": 0.5, "parameter_bytes": 10**6}, "give exactly one of"),
        ({"rank_reduction": 0.5, "classification": "third"}, "classification='third'; expected one of break_even"),
        ({"rank_reduction": 0.5, "score": "maxmin"}, "score='maxmin'; expected one of minmax"),
        ({"rank_reduction": 0.5, "multiple": 0}, "multiple=0; expected a whole number >= 1"),
        ({"rank_reduction": 0.5, "ceiling": 0}, "ceiling=0"),
    ],
)
def test_targets_that_cannot_be(models: Models, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ranks(*models["llama"], **settings)  # type: ignore[arg-type]


def test_spectra_of_another_model(models: Models) -> None:
    with pytest.raises(ValueError, match=r"no linear layer 'model.decoder.layers.0.*: the plan is of another model"):
        plan_ranks(models["llama"][0], models["opt"][1], rank_reduction=0.5)
    name = next(iter(models["llama"][1]))
    with pytest.raises(ValueError, match=rf"5 singular values for '{name}' of shape \(32, 32\)"):
        plan_ranks(models["llama"][0], {name: torch.ones(5)}, rank_reduction=0.5)


# ------------------------------------------------------------------------------------------------------------- compress


@KINDS
@pytest.mark.parametrize("classification", CLASSIFICATIONS)
def test_the_compressed_model_is_that_of_truncated_weights(models: Models, kind: str, classification: str) -> None:
    original, sigma = models[kind]
    model, expected = copy.deepcopy(original), copy.deepcopy(original)
    plan = plan_ranks(model, sigma, rank_reduction=0.4, classification=classification)
    for matrix in plan:
        linear = expected.get_submodule(matrix.name)
        if matrix.is_low_rank:
            u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
            linear.weight.data = u[:, : matrix.rank] @ s[: matrix.rank].diag() @ vh[: matrix.rank]
    assert compress(model, plan) is model
    factored = {matrix.name: matrix.rank for matrix in plan if matrix.is_factored}
    assert {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == factored
    assert model.config.low_rank == {"ranks": factored}
    if classification == "all":
        assert any(matrix.is_low_rank and not matrix.is_factored for matrix in plan)
    for matrix in plan:
        if not matrix.is_low_rank:
            assert torch.equal(model.get_submodule(matrix.name).weight, original.get_submodule(matrix.name).weight)
    with torch.no_grad():
        logits = model(tokens()).logits
        torch.testing.assert_close(logits, expected(tokens()).logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(merge(model)(tokens()).logits, logits, rtol=0, atol=1e-10)
    assert not hasattr(model.config, "low_rank")


def matrix(name: str, rank: int, *, low: bool = True) -> PlannedMatrix:
    return PlannedMatrix(name, 48, 32, rank, low, 4)


def test_what_cannot_be_compressed_leaves_the_model_as_it_is() -> None:
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    cases = {
        "no matrix qualifies: none would get smaller": [matrix(first, 32, low=False)],
        "no linear layer 'elsewhere': the plan is of another model": [matrix(first, 4), matrix("elsewhere", 4)],
        f"cannot factor '{second}': .*not finite": [matrix(first, 4), matrix(second, 4)],
        "rank=0; expected": [matrix(first, 4), matrix("model.layers.0.mlp.gate_proj", 0)],
    }
    model = build("llama")
    model.get_submodule(second).weight.data[0, 0] = torch.inf
    before, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    for message, plan in cases.items():
        with pytest.raises(ValueError, match=message):
            compress(model, plan)
        assert dict(model.named_modules()) == before
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not hasattr(model.config, "low_rank")


def test_a_compressed_model_is_not_compressed_again(models: Models) -> None:
    """Its configuration would name the factors of factors, and forget the first ranks."""
    model = copy.deepcopy(models["llama"][0])
    compress(model, plan_ranks(*models["llama"], rank_reduction=0.6))
    recorded = copy.deepcopy(model.config.low_rank)
    again = plan_ranks(model, spectra(model), rank_reduction=0.6)
    assert any(matrix.is_low_rank for matrix in again)
    with pytest.raises(ValueError, match="has low-rank layers already; compress the one it was made of, or merge"):
        compress(model, again)
    assert model.config.low_rank == recorded


# ---------------------------------------------------------------------------------------------------------- calibration


def literal_inputs(model: PreTrainedModel, batches: list[Tensor]) -> dict[str, Tensor]:
    """(tokens, in) of every block matrix, by torch's own hooks on forward."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        linear.register_forward_hook(lambda _, x, __, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2)))
        for name, linear in linear_layers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@KINDS
@pytest.mark.parametrize("memory_bytes", [1, 8 * 32 * 32 * 3, 2**40])
def test_moments_and_energies_are_means_over_all_tokens(
    models: Models, kind: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_MEMORY_BYTES", memory_bytes)
    model, _ = models[kind]
    model.eval()
    batches = [tokens()[:3], tokens()[3:]]
    inputs, linears = literal_inputs(model, batches), linear_layers(model)
    moments = list(input_moments(model, linears, batches))
    assert [name for name, _ in moments] == list(linears)
    energies = input_energies(model, linears, batches)
    for name, moment in moments:
        x = inputs[name].double()
        assert x.shape[0] == tokens().numel()
        torch.testing.assert_close(moment, torch.einsum("ti,tj->ij", x, x) / len(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(energies[name], (x**2).mean(0), rtol=1e-9, atol=1e-12)
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_whitening_loses_less_of_the_outputs_than_the_weights_alone(models: Models) -> None:
    """Of each layer's, on the text it was calibrated on; the ranks are the same."""
    original, sigma = models["opt"]
    batches = [torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    plan = plan_ranks(original, sigma, rank_reduction=0.6)
    chosen = {matrix.name: linear_layers(original)[matrix.name] for matrix in plan if matrix.is_low_rank}
    plain, white = copy.deepcopy(original), copy.deepcopy(original)
    compress(plain, plan)
    compress(white, plan, input_moments(original, chosen, batches))
    inputs = literal_inputs(original, batches)
    better = 0
    for name, linear in chosen.items():
        exact = inputs[name] @ linear.weight.detach().mT
        lost = [float((exact - inputs[name] @ m.get_submodule(name).weight.detach().mT).norm()) for m in (plain, white)]
        assert lost[1] <= lost[0] * (1 + 1e-6)
        better += lost[1] < 0.98 * lost[0]
    assert better > len(chosen) / 2


def test_calibration_reads_the_model_before_any_of_it_is_replaced(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes of one layer each, later layers would see the outputs of those truncated before."""
    original, sigma = models["llama"]
    plan = plan_ranks(original, sigma, rank_reduction=0.6)
    results = []
    for memory_bytes in (1, 2**40):
        monkeypatch.setattr(calibration, "_MEMORY_BYTES", memory_bytes)
        model = copy.deepcopy(original)
        chosen = {matrix.name: linear_layers(model)[matrix.name] for matrix in plan if matrix.is_low_rank}
        compress(model, plan, input_moments(model, chosen, [tokens(8, 16)]))
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12)


def test_outlier_shares_by_hand() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    first.weight.data = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    second.weight.data = torch.tensor([[-50.0, 1.0]])
    energies = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([4.0, 1.0])}
    # |W| ||x||: 1 2 1 2 and 100 1, of mean 107 / 6
    assert outlier_shares({"a": first, "b": second}, energies) == pytest.approx(1 / 6)
    assert outlier_shares({"a": first, "b": second}, energies, threshold=6) == 0
    assert outlier_shares({"a": first}, energies, threshold=1) == 0.5
