"""Roles come from module types; every trainable parameter is in exactly one group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from lowrank_train import optim
from tests.optim.models import MixedModel, tiny_llama, tiny_opt


def roles(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {name: group["role"] for group in groups for name, _ in group["params"]}


def small_sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 10))


def llama_role(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "matrix" if "_proj.weight" in name else "vector"


def opt_role(name: str) -> str:
    if "embed_" in name:
        return "embedding"
    is_linear = any(part in name for part in ("_proj.", "fc1.", "fc2."))
    return "matrix" if is_linear and name.endswith("weight") else "vector"


@pytest.mark.parametrize("tied", [False, True])
def test_roles_of_llama(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    got = roles(optim.param_groups(model))
    assert got == {name: llama_role(name) for name, _ in model.named_parameters()}
    assert list(got.values()).count("matrix") == 2 * 7
    assert list(got.values()).count("head") == (0 if tied else 1)


def test_roles_of_opt() -> None:
    model = tiny_opt()
    got = roles(optim.param_groups(model))
    assert got == {name: opt_role(name) for name, _ in model.named_parameters()}
    assert list(got.values()).count("matrix") == 2 * 6
    assert list(got.values()).count("embedding") == 2
    assert "head" not in got.values()


def test_roles_of_a_plain_model() -> None:
    assert roles(optim.param_groups(small_sequential())) == {
        "0.weight": "embedding",
        "1.weight": "matrix",
        "1.bias": "vector",
        "2.weight": "vector",
        "2.bias": "vector",
        "3.weight": "matrix",
        "3.bias": "vector",
        "4.weight": "head",
        "4.bias": "vector",
    }


def test_a_linear_layer_is_a_matrix_where_there_is_no_embedding() -> None:
    assert roles(optim.param_groups(nn.Linear(4, 10))) == {"weight": "matrix", "bias": "vector"}


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), tiny_opt, small_sequential, MixedModel])
def test_every_trainable_parameter_exactly_once_and_no_frozen_one(make: Callable[[], nn.Module]) -> None:
    model = make()
    parameters: list[Tensor] = list(model.parameters())
    for frozen in parameters[::3]:
        frozen.requires_grad_(False)
    grouped = [param for group in optim.param_groups(model) for _, param in group["params"]]
    assert len(grouped) == len({id(param) for param in grouped})
    assert {id(param) for param in grouped} == {id(param) for param in parameters if param.requires_grad}
    assert len(grouped) < len(parameters)


def test_vectors_alone_are_exempt_from_weight_decay() -> None:
    optimizer = optim.create("adamw", MixedModel(), weight_decay=0.3)
    assert {group["role"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "embedding": 0.3,
        "matrix": 0.3,
        "head": 0.3,
        "vector": 0.0,
    }


def test_the_first_rule_that_matches_wins() -> None:
    rules: dict[str, dict[str, Any]] = {
        r"layers\.0\..*k_proj": {"rank": 2},
        "k_proj": {"rank": 3},
        r"layers\.0\.": {"role": "vector"},
        "norm": {"weight_decay": 0.7},
    }
    model = tiny_llama()
    groups = optim.param_groups(model, rules=rules)
    found = {name: group for group in groups for name, _ in group["params"]}
    first = found["model.layers.0.self_attn.k_proj.weight"]
    assert (first["role"], first["rank"]) == ("matrix", 2)
    second = found["model.layers.1.self_attn.k_proj.weight"]
    assert (second["role"], second["rank"]) == ("matrix", 3)
    assert found["model.layers.0.mlp.up_proj.weight"]["role"] == "vector"
    assert found["model.layers.0.input_layernorm.weight"]["weight_decay"] == 0.0, "a rule before 'norm' matched"
    assert found["model.layers.1.input_layernorm.weight"]["weight_decay"] == 0.7
    assert found["model.layers.1.mlp.up_proj.weight"]["role"] == "matrix"
    assert "rank" not in found["model.layers.1.mlp.up_proj.weight"]

    optimizer = optim.DCTAdamW(groups, rank=4)
    kept = {name: optimizer.state[param]["basis_index"].numel() for name, param in model.named_parameters()
            if "basis_index" in optimizer.state[param]}  # fmt: skip
    assert kept["model.layers.0.self_attn.k_proj.weight"] == 2
    assert kept["model.layers.1.self_attn.k_proj.weight"] == 3
    assert kept["model.layers.1.mlp.up_proj.weight"] == 4
    assert "model.layers.0.mlp.up_proj.weight" not in kept


def test_the_rules_of_the_caller_are_not_changed() -> None:
    rules = {"1": {"role": "vector", "lr": 0.5}}
    optim.param_groups(small_sequential(), rules=rules)
    assert rules == {"1": {"role": "vector", "lr": 0.5}}


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rule 'q_prj' matches no trainable parameter; names are like 0\.weight"):
        optim.param_groups(small_sequential(), rules={"1": {}, "q_prj": {"rank": 2}})


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rule '1' gives role 'matrx'; expected one of matrix, embedding"):
        optim.param_groups(small_sequential(), rules={"1": {"role": "matrx"}})


def test_a_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.param_groups(small_sequential().requires_grad_(False))
