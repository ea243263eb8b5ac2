"""Conversion to spectral layers and back: the same outputs, everything else untouched, clear errors."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train import optim
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers import spectral
from lowrank_train.layers.plain import merge, merged_state_dict
from lowrank_train.layers.spectral import SpectralLinear, factorise, spectral_values, to_spectral
from lowrank_train.models import build as models
from lowrank_train.optim.spectral.factors import decode

VOCABULARY = 61
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama_9m",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "opt": (
        "opt_125m",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        },
    ),
    "opt_350m": (
        "opt_350m",  # post-norm, narrow embeddings between project_in and project_out
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        },
    ),
}
CONVERTED = {"llama": 2 * 7, "opt": 2 * 6, "opt_350m": 2 * 6}
FROZEN = ["float32", "bfloat16", "float16", "8bit"]
PUBLISHED = {  # name, rank: trainable parameters in millions as the paper prints them
    ("opt_125m", 64): "51.0",
    ("opt_350m", 64): "57.7",
    ("opt_1.3b", 64): "164.7",
    ("llama_130m", 64): "60.44",
    ("llama_1b", 128): "251.05",
}


def tiny(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny model whose biases and norms are not at their initial 0 and 1."""
    size, overrides = TINY[name]
    config = models.architecture(ModelConfig(name=size, overrides={**overrides, **changes}), vocab_size=VOCABULARY)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return model.eval()


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ids()).logits


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def layers_of(model: nn.Module) -> dict[str, SpectralLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpectralLinear)}


def only(model: nn.Module) -> SpectralLinear:
    (layer,) = layers_of(model).values()
    return layer


# -- the same outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", "factored", "materialised"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", TINY)
def test_converted_and_merged_models_have_the_same_outputs(
    name: str, dtype: torch.dtype, tolerance: float, path: Any
) -> None:
    model = tiny(name, dtype)
    expected = logits(model)
    assert to_spectral(model, 5, path=path) is model
    assert len(layers_of(model)) == CONVERTED[name]
    assert not any(isinstance(module, nn.Linear) for layer in model.get_decoder().layers for module in layer.modules())
    assert logits(model).dtype == dtype
    assert error(logits(model), expected) < tolerance
    assert merge(model) is model
    assert not layers_of(model)
    assert error(logits(model), expected) < tolerance


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("opt", {}),
        ("opt", {"tie_word_embeddings": False}),
        ("opt_350m", {}),
    ],
)
def test_everything_but_the_matrices_stays_the_very_same_tensor(name: str, changes: dict[str, Any]) -> None:
    model = tiny(name, **changes)
    matrices = {f"{key}.weight" for key in layers_of(to_spectral(copy.deepcopy(model), 4))}
    assert len(matrices) == CONVERTED[name]
    kept = {
        key: value
        for key, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        if key not in matrices
    }
    values = {key: value.detach().clone() for key, value in kept.items()}
    kinds = ("embed_tokens", "norm", "lm_head", *(() if name == "llama" else ("q_proj.bias", "fc1.bias")))
    for kind in (*kinds, *(("project_in", "project_out") if name == "opt_350m" else ())):
        assert any(kind in key for key in kept), kind
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == changes.get("tie_word_embeddings", name != "llama")
    for change in (lambda: to_spectral(model, 4), lambda: merge(model)):
        change()
        now = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for key, value in kept.items():
            assert now[key] is value, key
            assert torch.equal(value, values[key]), key
    assert now.keys() == kept.keys() | matrices


@pytest.mark.parametrize("name", TINY)
def test_a_merged_model_is_the_plain_one_again(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    original = copy.deepcopy(model)
    merge(to_spectral(model, 4))
    assert [(key, type(module)) for key, module in model.named_modules()] == [
        (key, type(module)) for key, module in original.named_modules()
    ]
    assert repr(model) == repr(original)
    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert (state[key].shape, state[key].dtype) == (value.shape, value.dtype)
        torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-13)
    assert all(param.requires_grad for param in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("frozen_dtype", [None, *FROZEN])
@pytest.mark.parametrize("name", TINY)
def test_a_merged_state_dict_loads_into_the_plain_model(name: str, frozen_dtype: str | None) -> None:
    model = tiny(name)
    plain = copy.deepcopy(model)
    to_spectral(model, 4, frozen_dtype=frozen_dtype)
    state = model.state_dict()
    keys = list(state)
    merged = merged_state_dict(state)
    assert list(state) == keys
    assert list(merged) == list(plain.state_dict())
    plain.load_state_dict(merged)
    expected = merge(model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
    assert not any(value.requires_grad for value in merged.values())


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_state_dict_of_a_bare_layer(rank: int, bias: bool) -> None:
    box = nn.Sequential(nn.Linear(6, 4, bias=bias, dtype=torch.float64))
    expected = box[0].weight.detach().clone()
    layer = only(to_spectral(box, rank, layers=""))
    merged = merged_state_dict(layer.state_dict())
    plain = nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_a_merged_state_dict_of_a_plain_model_is_itself() -> None:
    state = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).state_dict()
    merged = merged_state_dict(state)
    assert list(merged) == list(state)
    assert all(merged[key] is value for key, value in state.items())


# -- any module --------------------------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10, dtype=dtype), nn.GELU(), nn.Linear(10, 4, bias=False, dtype=dtype))


@pytest.mark.parametrize(("layers", "converted"), [("", ["0", "2"]), (r"^2$", ["2"]), ("0|2", ["0", "2"])])
def test_any_linear_layers_by_rule(layers: str, converted: list[str]) -> None:
    model, x = mlp(), torch.randn(3, 5, 6, dtype=torch.float64)
    expected = model(x)
    to_spectral(model, 2, layers=layers)
    assert list(layers_of(model)) == converted
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("root", [nn.Linear(6, 4), SpectralLinear(6, 4, 2)], ids=["convert", "merge"])
def test_a_layer_that_is_the_whole_model_is_converted_or_refused(root: nn.Module) -> None:
    """It has no parent to be replaced in: what must not happen is nothing."""
    convert = (lambda: to_spectral(root, 2, layers="")) if isinstance(root, nn.Linear) else (lambda: merge(root))
    try:
        made = convert()
    except ValueError:
        return
    assert type(made) is (SpectralLinear if isinstance(root, nn.Linear) else nn.Linear)


@pytest.mark.parametrize("same_parent", [True, False])
def test_a_layer_used_at_two_places_is_converted_once_and_stays_shared(same_parent: bool) -> None:
    shared = nn.Linear(6, 6, dtype=torch.float64)
    inner = [shared, nn.Tanh(), shared] if same_parent else [nn.Sequential(shared), nn.Tanh(), nn.Sequential(shared)]
    model = nn.Sequential(*inner)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    to_spectral(model, 2, layers="")
    uses = [module for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, SpectralLinear)]
    assert len(uses) == 2
    assert uses[0] is uses[1]
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    plain = nn.Sequential(*[nn.Linear(6, 6, dtype=torch.float64) if m is shared else m for m in inner])
    if same_parent:
        plain.load_state_dict(merged_state_dict(model.state_dict()))
        torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    merge(model)
    uses = [module for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    assert len(uses) == 2
    assert uses[0] is uses[1]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


class Lorentz(nn.Module):
    """A map onto the hyperboloid: the space coordinates are linear, time follows from them; as made, W lacks a rank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        space = self.linear(x)[..., 1:]
        return torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)


def test_a_linear_map_inside_a_hyperbolic_layer() -> None:
    model = nn.Sequential(Lorentz(7), Lorentz(7), nn.Linear(7, 3, dtype=torch.float64))
    x = torch.randn(9, 7, dtype=torch.float64)
    expected, inner = model(x), model[:2](x)
    to_spectral(model, 2, layers=r"\.linear$")
    assert list(layers_of(model)) == ["0.linear", "1.linear"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    point = model[:2](x)
    torch.testing.assert_close(point, inner, rtol=1e-12, atol=1e-12)
    on_hyperboloid = point[:, 1:].square().sum(1) - point[:, 0].square()
    torch.testing.assert_close(on_hyperboloid, -torch.ones_like(on_hyperboloid), rtol=1e-10, atol=0)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-12, atol=1e-12)


def test_subclasses_of_linear_layers_are_left_alone() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})
    to_spectral(model, 2, layers="")
    assert list(layers_of(model)) == ["other"]


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize(("out", "width"), [(12, 20), (20, 12), (16, 16)])
def test_a_weight_of_nearly_deficient_rank_is_kept(out: int, width: int, smallest: float) -> None:
    """Singular values in a cluster far below the largest: their vectors are barely determined, but W is."""
    k = min(out, width)
    u = torch.linalg.qr(torch.randn(out, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(width, k, dtype=torch.float64)).Q
    sigma = torch.ones(k, dtype=torch.float64)
    sigma[k // 3 :] = smallest * (1 + torch.rand(k - k // 3, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(width, out, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(u * sigma @ v.mT)
    weight = model[0].weight.detach().clone()
    layer = only(to_spectral(model, 3, layers=""))
    for kind in ("u", "v"):
        rows = torch.cat([getattr(layer, f"{kind}_active"), getattr(layer, f"{kind}_frozen")]).detach()
        torch.testing.assert_close(rows @ rows.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    assert error(layer.weight, weight) < 1e-12


# -- what a converted model is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_dtype", [None, *FROZEN])
@pytest.mark.parametrize("name", TINY)
def test_conversion_on_meta_has_the_same_parameters(name: str, frozen_dtype: str | None) -> None:
    real = to_spectral(tiny(name, torch.float32), 4, frozen_dtype=frozen_dtype)
    size, overrides = TINY[name]
    config = models.architecture(ModelConfig(name=size, overrides=overrides), vocab_size=VOCABULARY)
    meta = to_spectral(models.skeleton(config, torch.float32), 4, frozen_dtype=frozen_dtype)
    assert all(param.is_meta for param in meta.parameters())

    def described(model: nn.Module) -> list[tuple[Any, ...]]:
        return [(key, p.shape, p.dtype, p.requires_grad) for key, p in model.named_parameters()]

    assert described(meta) == described(real)
    assert list(meta.state_dict()) == list(real.state_dict())


@pytest.mark.parametrize(
    ("frozen_dtype", "stored"),
    [
        (None, torch.float64),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("8bit", torch.int8),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width", "rank"), [(4, 6, 2), (6, 4, 2), (5, 5, 1), (4, 6, 4), (5, 5, 5)])
def test_shapes_types_and_what_is_trained(
    out: int, width: int, rank: int, bias: bool, frozen_dtype: str | None, stored: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(width, out, bias=bias, dtype=torch.float64))
    layer = only(to_spectral(model, rank, layers="", frozen_dtype=frozen_dtype))
    wide, rest = torch.float64, min(out, width) - rank
    expected = {
        "u_active": ((rank, out), wide, True),
        "sigma_active": ((rank,), wide, True),
        "v_active": ((rank, width), wide, True),
    }
    if rest:
        expected["u_frozen"] = ((rest, out), stored, False)
        expected["sigma_frozen"] = ((rest,), wide, True)
        expected["v_frozen"] = ((rest, width), stored, False)
        if frozen_dtype == "8bit":
            expected["u_frozen_scale"] = ((rest, 1), wide, False)
            expected["v_frozen_scale"] = ((rest, 1), wide, False)
    if bias:
        expected["bias"] = ((out,), wide, True)
    assert {key: (tuple(p.shape), p.dtype, p.requires_grad) for key, p in layer.named_parameters()} == expected
    assert not list(layer.buffers())
    layer(torch.randn(3, width, dtype=torch.float64)).sum().backward()
    assert {key for key, p in layer.named_parameters() if p.grad is not None} == {
        key for key, (_, _, trained) in expected.items() if trained
    }


def test_triplets_are_orthonormal_and_their_values_those_of_the_weight() -> None:
    model = mlp()
    weight = model[0].weight.detach().clone()
    layer = to_spectral(model, 2, layers="0")[0]
    sigma = torch.cat([layer.sigma_active, layer.sigma_frozen]).detach()
    torch.testing.assert_close(sigma.sort(descending=True).values, torch.linalg.svdvals(weight), rtol=1e-10, atol=0)
    for kind in ("u", "v"):
        rows = torch.cat([getattr(layer, f"{kind}_active"), getattr(layer, f"{kind}_frozen")]).detach()
        torch.testing.assert_close(rows @ rows.mT, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_first_active_triplets_follow_sampling_and_seed() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)

    def drawn(**settings: Any) -> list[Tensor]:
        made = to_spectral(copy.deepcopy(model), 7, layers="", **settings)
        return [layer.sigma_active.detach() for layer in layers_of(made).values()]

    largest = torch.linalg.svdvals(model[0].weight.detach())[:7]
    for sampling in ("top", "sequential"):
        torch.testing.assert_close(drawn(sampling=sampling)[0], largest, rtol=1e-5, atol=0)
    for sampling in ("multinomial", "uniform"):
        first, second = drawn(sampling=sampling)
        assert torch.equal(first, drawn(sampling=sampling, seed=0)[0])
        assert not torch.equal(first, second)  # a layer draws for itself
        assert not torch.equal(first, drawn(sampling=sampling, seed=1)[0])
        assert first.unique().numel() == 7
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    drawn()
    assert torch.equal(torch.randn(3), expected)  # the global generator is left alone


def test_factors_and_values_fill_a_layer_made_elsewhere() -> None:
    linear = nn.Linear(9, 6, dtype=torch.float64)
    target = SpectralLinear(9, 6, 2, dtype=torch.float64, frozen_dtype="8bit")
    values = spectral_values(target, factorise(linear.weight, 2, seed=3, index=1), linear.bias)
    assert list(values) != []
    assert values.keys() == dict(target.named_parameters()).keys()
    with torch.no_grad():
        for key, value in values.items():
            target.get_parameter(key).copy_(value)
    assert error(target.weight, linear.weight.detach()) < 1.5e-2
    assert torch.equal(target.bias, linear.bias)


def test_the_weight_of_a_layer_is_a_copy_without_gradient() -> None:
    model = mlp(torch.float32)
    expected = model[0].weight.detach().clone()
    layer = to_spectral(model, 2, layers="0")[0]
    torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.float32, False)
    layer.weight.zero_()
    torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)
    assert "weight" not in dict(layer.named_parameters())
    assert "rank=2" in repr(layer)


@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
@pytest.mark.parametrize("name", TINY)
def test_every_trained_parameter_has_a_role_and_frozen_vectors_are_listed(name: str, frozen_dtype: str | None) -> None:
    model = to_spectral(tiny(name), 4, frozen_dtype=frozen_dtype)
    roles: dict[str, str] = {}
    for group in optim.param_groups(model):
        for key, param in group["params"]:
            assert key not in roles, key
            assert param is model.get_parameter(key)
            roles[key] = group["role"]
    assert roles.keys() == dict(model.named_parameters()).keys()
    for key, role in roles.items():
        factor = key.rpartition(".")[2]
        if factor in ("u_active", "v_active"):
            assert role == "singular_vectors", key
        elif factor in ("sigma_active", "sigma_frozen"):
            assert role == "singular_values", key
        elif "frozen" in factor:
            assert role == "frozen", key
        elif "embed" in key:
            assert role == "embedding", key
        elif "project" in key:
            assert role == "matrix", key
        else:
            assert role == ("head" if key == "lm_head.weight" else "vector"), key
        assert model.get_parameter(key).requires_grad == (role != "frozen"), key
    assert {"singular_vectors", "singular_values", "frozen", "embedding", "vector"} <= set(roles.values())
    assert ("head" in roles.values()) == (name == "llama")


@pytest.mark.parametrize(("name", "rank"), PUBLISHED)
def test_trainable_parameters_are_those_of_the_paper(name: str, rank: int) -> None:
    model = models.skeleton(models.architecture(ModelConfig(name=name)), torch.float32)
    to_spectral(model, rank)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    printed = PUBLISHED[name, rank]
    digits = len(printed.partition(".")[2])
    assert f"{trained / 1e6:.{digits}f}" == printed


@pytest.mark.parametrize(("out", "width", "rank"), [(24, 40, 5), (40, 24, 5), (32, 32, 32)])
def test_trainable_parameters_of_a_layer(out: int, width: int, rank: int) -> None:
    layer = SpectralLinear(width, out, rank, bias=False, device="meta")
    trained = sum(param.numel() for param in layer.parameters() if param.requires_grad)
    assert trained == rank * (out + width) + min(out, width)


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
def test_a_converted_model_can_be_copied_and_saved(duplicate: Any, frozen_dtype: str | None) -> None:
    model = to_spectral(mlp(), 2, layers="", frozen_dtype=frozen_dtype, path="factored", gradient="plain")
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x).detach()
    other = duplicate(model)
    assert torch.equal(other(x), expected)
    assert [(key, p.requires_grad) for key, p in other.named_parameters()] == [
        (key, p.requires_grad) for key, p in model.named_parameters()
    ]
    assert (other[0].gradient, other[0].path, other[0].frozen_dtype) == ("plain", "factored", frozen_dtype)
    with torch.no_grad():
        other[0].sigma_active.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("frozen_dtype", [None, *FROZEN])
def test_a_state_dict_restores_another_converted_model(frozen_dtype: str | None) -> None:
    model = to_spectral(mlp(), 2, layers="", frozen_dtype=frozen_dtype)
    other = to_spectral(mlp(), 2, layers="", frozen_dtype=frozen_dtype, seed=1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training: bool) -> None:
    model = to_spectral(mlp().train(training), 2, layers="")
    assert all(module.training == training for module in model.modules())
    assert all(module.training == training for module in merge(model).modules())


def test_evaluation_without_gradients_gives_the_outputs_of_training() -> None:
    model = to_spectral(tiny("llama"), 4)
    model.train()
    expected = model(ids()).logits
    assert expected.requires_grad
    model.eval()
    assert torch.equal(logits(model), expected)
    with torch.inference_mode():
        assert torch.equal(model(ids()).logits, expected)


# -- frozen vectors in few bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("frozen_dtype", "limit"), [("bfloat16", 4e-3), ("float16", 6e-4), ("8bit", 1.5e-2)])
@pytest.mark.parametrize(("out", "width"), [(64, 96), (96, 64), (128, 128), (32, 700)])
def test_frozen_vectors_in_few_bits_keep_the_weight(
    out: int, width: int, frozen_dtype: str, limit: float, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(width, out, bias=False, dtype=dtype))
    with torch.no_grad():
        nn.init.normal_(model[0].weight, std=0.02)
    weight = model[0].weight.detach().clone()
    layer = only(to_spectral(model, 8, layers="", frozen_dtype=frozen_dtype))
    assert 0 < error(layer.weight, weight) < limit
    for kind in ("u", "v"):
        scale = getattr(layer, f"{kind}_frozen_scale", None)
        stored = getattr(layer, f"{kind}_frozen").detach()
        length = decode(stored, None if scale is None else scale.detach(), torch.float64).norm(dim=1)
        tolerance = 1e-6 if frozen_dtype == "8bit" else limit
        torch.testing.assert_close(length, torch.ones_like(length), rtol=tolerance, atol=0)
    merged = merge(model)[0].weight
    assert merged.dtype == dtype
    assert error(merged.detach(), weight) < limit


def test_a_bfloat16_model_is_converted_and_merged_in_its_own_precision() -> None:
    model = nn.Sequential(nn.Linear(48, 32, dtype=torch.bfloat16))
    weight = model[0].weight.detach().clone()
    layer = only(to_spectral(model, 4, layers=""))
    assert layer.u_frozen.dtype == torch.bfloat16
    merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert error(model[0].weight.detach(), weight) < 6e-3


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_weight_of_zeros_is_refused_by_name() -> None:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with pytest.raises(ValueError, match=r"cannot convert '2'.*all zero"):
        to_spectral(model, 2, layers="")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 2] = value
    with pytest.raises(ValueError, match=r"cannot convert '0'.*not finite"):
        to_spectral(model, 2, layers="")


@pytest.mark.parametrize("rank", [0, -1, 7, 2.0, True, "4", None], ids=repr)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_rank_out_of_range_is_refused(rank: Any, device: str) -> None:
    with pytest.raises(ValueError, match=r"cannot convert '0'.*rank=.*whole number from 1 to 6"):
        to_spectral(mlp().to(device), rank, layers="0")
    with pytest.raises(ValueError, match=r"rank=.*whole number from 1 to 6"):
        SpectralLinear(6, 10, rank)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "natural"}, r"gradient='natural'; expected one of enhanced, plain"),
        ({"frozen_dtype": "4bit"}, r"frozen_dtype='4bit'; expected None or one of float32, bfloat16, float16, 8bit"),
        ({"frozen_dtype": torch.float16}, r"frozen_dtype=torch.float16; expected None or one of float32"),
        ({"path": "dense"}, r"path='dense'; expected one of auto, factored, materialised"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_spectral(mlp(), 2, layers="", **settings)
    with pytest.raises(ValueError, match=message):
        SpectralLinear(6, 4, 2, **settings)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unknown_sampling_is_refused(device: str) -> None:
    expected = r"sampling='best'; expected one of multinomial, uniform, sequential, top"
    with pytest.raises(ValueError, match=expected):
        to_spectral(mlp().to(device), 2, layers="", sampling="best")  # type: ignore[arg-type]


def test_rules_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matches no nn\.Linear of the model; it has '0', '2'"):
        to_spectral(mlp(), 2)  # the default rule is for LLaMA and OPT
    with pytest.raises(ValueError, match=r"layers='norm' matches no nn\.Linear.*it has none at all"):
        to_spectral(nn.Sequential(nn.LayerNorm(4)), 2, layers="norm")


def test_converting_twice_is_refused() -> None:
    model = to_spectral(mlp(), 2, layers="0")
    with pytest.raises(ValueError, match=r"spectral already \(its '0'\); merge it first"):
        to_spectral(model, 2, layers="2")


def test_merging_what_is_not_spectral_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="no spectral or low-rank layer to merge; it is plain already"):
        merge(model)
    merge(to_spectral(model, 2, layers=""))
    with pytest.raises(ValueError, match="no spectral or low-rank layer to merge; it is plain already"):
        merge(model)


def test_a_tied_weight_is_refused_by_both_names() -> None:
    with pytest.raises(ValueError, match=r"'lm_head' is tied to 'model.*embed_tokens\.weight'; leave it out"):
        to_spectral(tiny("opt"), 4, layers="")
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twins[1].weight = twins[0].weight
    with pytest.raises(ValueError, match=r"'0' is tied to '1\.weight'"):
        to_spectral(twins, 2, layers="")


@pytest.mark.parametrize("refused", ["tied", "sampling", "rule", "rank", "zero"])
def test_a_refused_conversion_leaves_the_model_as_it_was(refused: str) -> None:
    """What the caller corrects and tries again must not be half converted."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    settings: dict[str, Any] = {"layers": ""}
    if refused == "tied":
        model.add_module("3", nn.Linear(4, 8))
        model[3].weight = model[2].weight
    elif refused == "sampling":
        settings["sampling"] = "best"
    elif refused == "rule":
        settings["layers"] = "x"
    elif refused == "zero":
        nn.init.zeros_(model[1].weight)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"tied|sampling|matches no|rank=6|all zero"):
        to_spectral(model, 6 if refused == "rank" else 2, **settings)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is value for key, value in before.items())


def test_public_names() -> None:
    assert all(hasattr(spectral, name) for name in spectral.__all__)
