"""Optimizers by name, and the errors of their arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.low_rank.engine import LowRankOptimizer
from tests.optim.models import MixedModel, beside_layers, prepare, tiny_llama


def test_names_are_sorted_and_find_their_classes() -> None:
    assert optim.names() == sorted(optim.names())
    assert {"adamw", "dct_adamw"} <= set(optim.names())
    assert optim.names(of_matrices=True) == [name for name in optim.names() if optim.find(name).layers is None]
    assert {"relora", "riemannian_adamw", "sst"} == set(optim.names()) - set(optim.names(of_matrices=True))
    assert optim.find("adamw") is optim.AdamW
    assert optim.find("dct_adamw") is optim.DCTAdamW


@pytest.mark.parametrize("name", optim.names())
def test_every_name_creates_its_class_from_a_model_or_from_groups(name: str) -> None:
    model = prepare(name, MixedModel())
    for source in (model, optim.param_groups(model)):
        optimizer = optim.create(name, source, lr=0.5)
        assert type(optimizer) is optim.find(name)
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", optim.names())
def test_every_description_is_one_line_with_all_arguments(name: str) -> None:
    text = optim.describe(name)
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    parameters = list(inspect.signature(optim.find(name)).parameters.values())
    assert parameters[0].name == "params"
    assert text.endswith(", ".join(f"{parameter.name}={parameter.default!r}" for parameter in parameters[1:]))
    assert {"lr", "betas", "eps", "weight_decay"} <= {parameter.name for parameter in parameters}


def test_description_of_dct_adamw_shows_its_defaults() -> None:
    text = optim.describe("dct_adamw")
    for setting in ("lr=0.001,", "rank=None,", "refresh_interval=100,", "basis='dct',", "state_dtype=None"):
        assert setting in text


@pytest.mark.parametrize("name", optim.names())
def test_every_optimizer_says_where_it_is_published(name: str) -> None:
    cls = optim.find(name)
    assert "arXiv" in cls.published.paper or cls.published.paper == "this project"
    assert cls.published.when
    assert inspect.getdoc(cls) != inspect.getdoc(optim.MatrixOptimizer)


@pytest.mark.parametrize("name", [name for name in optim.names() if optim.find(name).layers is not None])
def test_a_model_without_the_layers_of_a_method_is_refused_with_the_way_to_make_them(name: str) -> None:
    for model in (MixedModel(), tiny_llama(), optim.param_groups(MixedModel())):
        with pytest.raises(
            ValueError, match=r"the model has no .*layers.*(convert it first: .*lowrank_train\.|keep_manifolds)"
        ):
            optim.create(name, model)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'dct_adam'; did you mean 'dct_adamw'\? expected one of"):
        optim.create("dct_adam", MixedModel())
    with pytest.raises(ValueError, match=r"unknown optimizer 'sgd'; expected one of adamw, "):
        optim.find("sgd")
    with pytest.raises(ValueError, match="unknown optimizer 'nothing'"):
        optim.describe("nothing")


def test_unknown_arguments_list_the_valid_ones() -> None:
    expected = (
        r"'dct_adamw' takes no argument 'ranks'; did you mean 'rank'\? expected one of lr, rank, refresh_interval"
    )
    with pytest.raises(ValueError, match=expected):
        optim.create("dct_adamw", MixedModel(), ranks=3)
    with pytest.raises(ValueError, match="optimizer 'adamw' takes no argument 'rank'; "):
        optim.check_arguments("adamw", ["lr", "rank"])
    optim.check_arguments("dct_adamw", ["lr", "rank", "betas"])


def test_plain_parameters_are_refused_where_roles_are_needed() -> None:
    model = MixedModel()
    with pytest.raises(ValueError, match=r"pass optim\.param_groups\(model\) instead of model\.parameters\(\)"):
        optim.DCTAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"parameter group 0 has role None; expected one of matrix"):
        optim.DCTAdamW([{"params": list(model.parameters())}])
    optim.AdamW(model.parameters())


def test_a_misspelt_role_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter group 0 has role 'matrices'; expected one of matrix"):
        optim.AdamW([{"params": [nn.Parameter(torch.ones(2))], "role": "matrices"}])


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank: Any) -> None:
    expected = rf"rank={rank!r} for 'model\.layers\.0\.self_attn\.q_proj\.weight' of shape \(8, 8\); expected a whole"
    with pytest.raises(ValueError, match=expected):
        optim.create("dct_adamw", tiny_llama(), rank=rank)


def test_a_rank_too_large_names_the_matrix_and_the_fix() -> None:
    expected = r"rank=5 exceeds min\(m, n\)=4 for 'model\.layers\.0\.self_attn\.k_proj\.weight' .*rules="
    with pytest.raises(ValueError, match=expected):
        optim.create("dct_adamw", tiny_llama(), rank=5)
    optim.DCTAdamW(optim.param_groups(tiny_llama(), rules={"[kv]_proj": {"rank": 4}}), rank=5)


@pytest.mark.parametrize("interval", [0, -3, 2.5, None])
def test_a_refresh_interval_below_one_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match=rf"refresh_interval={interval!r} for 'matrix_1x8\.weight'; expected a whole"):
        optim.create("dct_adamw", MixedModel(), refresh_interval=interval)


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("argument", ["lr", "weight_decay", "eps"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_numbers_are_refused(name: str, argument: str, value: float) -> None:
    groups = [{"params": [("w", nn.Parameter(torch.ones(3, 3)))], "role": "matrix"}]
    with pytest.raises(ValueError, match=rf"parameter group 0 has {argument}={value}; expected a number >= 0"):
        optim.create(name, beside_layers(name, groups), **{argument: value})


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9,), (0.9, 0.99, 0.999), (0.9, float("nan"))])
def test_betas_out_of_range_are_refused(name: str, betas: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter group 0 has betas=.*; expected two numbers in \[0, 1\)"):
        optim.create(name, prepare(name, MixedModel()), betas=betas)


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 0, 2), ()])
def test_role_matrix_needs_two_dimensions(name: str, shape: tuple[int, ...]) -> None:
    groups = [{"params": [("conv.weight", nn.Parameter(torch.ones(shape)))], "role": "matrix"}]
    with pytest.raises(ValueError, match=r"'conv\.weight' has role 'matrix' and shape .*; expected two non-empty"):
        optim.create(name, beside_layers(name, groups))
    groups = [{"params": [("conv.weight", nn.Parameter(torch.ones(2, 3, 4)))], "role": "matrix"}]
    optim.create(name, beside_layers(name, groups))


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("role", ["embedding", "matrix"])
def test_sparse_gradients_are_refused_by_name(name: str, role: str) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    groups = [{"params": [("tokens.weight", embedding.weight)], "role": role}]
    optimizer = optim.create(name, beside_layers(name, groups))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 'tokens\.weight' is sparse.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("name", optim.names())
def test_help_explains_every_argument_and_the_file_the_method(name: str) -> None:
    cls = optim.find(name)
    text = inspect.getdoc(cls) or ""
    for argument in inspect.signature(cls).parameters:
        assert text.count(f"\n    {argument}: ") == 1, argument
    assert "\nRaises:\n" in text
    module = inspect.getmodule(cls)
    assert module is not None
    assert "<-" in (module.__doc__ or "") or "``optim." in (module.__doc__ or ""), "an equation, or where it is"


@pytest.mark.parametrize("name", [n for n in optim.names() if issubclass(optim.find(n), LowRankOptimizer)])
def test_parts_are_the_defaults_of_the_arguments(name: str) -> None:
    cls = optim.find(name)
    assert issubclass(cls, LowRankOptimizer)
    parameters = inspect.signature(cls).parameters
    (group, *_) = optim.create(name, MixedModel()).param_groups
    for key, part in cls.parts._asdict().items():
        assert part == (parameters[key].default if key in parameters else group[key])
