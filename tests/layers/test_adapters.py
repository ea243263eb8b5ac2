"""Adapters: what a conversion changes and what not, the paper's counts, the way back, FSDP2."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.lora import LowRankAdapters, add_adapters
from lowrank_train.models import build as models
from lowrank_train.models.fsdp import fill, shard_model
from tests.distributed import run_distributed
from tests.optim.models import all_whole, assert_equal, tiny_llama, tiny_opt, weights

RANK = 3
TOKENS = torch.arange(24).view(2, 12)


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return (tiny_llama() if kind == "llama" else tiny_opt()).to(dtype).eval()


def trained(model: nn.Module, steps: int = 5, **arguments: Any) -> optim.MatrixOptimizer:
    """Of the rank's own model, in place; a restart ends step 2."""
    optimizer = optim.create("relora", model, lr=1e-2, **{"restart_every": 3, **arguments})
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return optimizer


both = pytest.mark.parametrize("kind", ["llama", "opt"])


# ----------------------------------------------------------------------------------------------------------- conversion


@both
def test_a_conversion_leaves_outputs_roles_and_random_numbers(kind: str) -> None:
    model = tiny(kind)
    expected, names, dtype = model(TOKENS).logits, dict(model.named_parameters()), model.dtype
    generator = torch.get_rng_state()
    assert add_adapters(model, RANK) is model
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model(TOKENS).logits, expected)
    roles = {name: g["role"] for g in optim.param_groups(model) for name, _ in g["params"]}
    for name, param in model.named_parameters():
        assert param.dtype == dtype
        if "lora_" in name:
            assert param.requires_grad
            assert roles[name] == ("lora_a" if "lora_A" in name else "lora_b")
            assert bool(param.any()) == ("lora_A" in name)
        elif name.endswith("base_layer.weight"):
            assert not param.requires_grad
            assert roles[name] == "frozen"
        else:
            assert param.requires_grad
            assert roles[name] in ("embedding", "head", "vector")
            assert param is names[name.replace("base_layer.", "")]
    assert sum(role == "frozen" for role in roles.values()) == (14 if kind == "llama" else 12)
    assert not any(module.training for module in model.modules())


def test_the_draws_follow_from_the_seed_alone() -> None:
    first, again, other = (tiny("llama") for _ in range(3))
    add_adapters(first, RANK, seed=4)
    torch.manual_seed(99)
    add_adapters(again, RANK, seed=4)
    add_adapters(other, RANK, seed=5)
    assert_equal(weights(first), weights(again))
    drawn = [param for name, param in first.named_parameters() if "lora_A" in name]
    drawn += [param for name, param in other.named_parameters() if "lora_A" in name]
    assert len({param[0, 0].item() for param in drawn}) == len(drawn)


def test_parameters_frozen_before_stay_frozen() -> None:
    model = tiny("opt")
    model.get_input_embeddings().requires_grad_(False)
    add_adapters(model, RANK)
    assert not model.get_input_embeddings().weight.requires_grad


@both
def test_a_scale_other_than_one_is_the_layers_and_the_optimizers(kind: str) -> None:
    model = tiny(kind)
    add_adapters(model, RANK, alpha=6)
    trained(model, 2, alpha=6)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if "lora_B" in dict(module.named_children()):
            module.scaling["default"] = 1.0
            module.lora_B.default.weight.data *= 2
    torch.testing.assert_close(model(TOKENS).logits, twin(TOKENS).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "rank", "millions"),
    [
        ("opt_125m", 64, 50.92),
        ("opt_350m", 64, 57.52),
        ("opt_1.3b", 64, 164.42),
        ("llama_130m", 64, 60.38),
        ("llama_1b", 128, 250.71),
    ],
)
def test_as_many_parameters_are_trained_as_in_the_paper(name: str, rank: int, millions: float) -> None:
    """arXiv 2405.15481, column LoRA of the tables for OPT and LLaMA."""
    model = models.skeleton(models.architecture(ModelConfig(name=name)), torch.float32)
    LowRankAdapters(rank).convert(model)
    assert all(param.is_meta for param in model.parameters())
    groups = optim.param_groups(model)
    count = sum(p.numel() for group in groups if group["role"] != "frozen" for _, p in group["params"])
    assert round(count / 1e6, 2) == millions
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -------------------------------------------------------------------------------------------------------- the way back


@both
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_plain_state_dict_loads_into_the_plain_model_with_equal_logits(kind: str, alpha: float | None) -> None:
    model, plain = tiny(kind), tiny(kind)
    before = weights(plain)
    layers = LowRankAdapters(RANK, alpha=alpha)
    layers.convert(model)
    trained(model, alpha=alpha)
    state = model.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    plain.load_state_dict(layers.plain_state_dict(state), strict=True)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-12)
    assert_equal(dict(model.state_dict()), kept)
    assert all(not torch.equal(value, before[name]) for name, value in weights(plain).items() if "proj.weight" in name)


@both
def test_values_fill_a_converted_meta_model(kind: str) -> None:
    plain, layers = tiny(kind), LowRankAdapters(RANK, seed=2)
    expected = copy.deepcopy(plain)
    layers.convert(expected)
    with torch.device("meta"):
        model = tiny_llama() if kind == "llama" else tiny_opt()
    layers.convert(model)
    model.to(torch.float64).to_empty(device="cpu").eval()
    model.tie_weights()
    fill_from(model, plain, layers)
    assert_equal(weights(model), weights(expected))
    assert [name for name, module in model.named_modules() if layers.converted(module)] == [
        name for name, module in plain.named_modules() if type(module) is nn.Linear and name != "lm_head"
    ]


def fill_from(model: nn.Module, plain: nn.Module, layers: LowRankAdapters) -> None:
    """A (sharded) converted model from the whole weights of the plain one."""
    targets = [(name, module) for name, module in model.named_modules() if layers.converted(module)]
    adapted = {}
    for index, (name, module) in enumerate(targets):
        values = layers.values(index, module, plain.get_submodule(name))
        assert values.keys() == dict(module.named_parameters()).keys()
        adapted.update({f"{name}.{key}": value for key, value in values.items()})
    others = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, destination in [*model.named_parameters(), *model.named_buffers()]:
        fill(destination, adapted[name] if name in adapted else others[name].detach())


# ---------------------------------------------------------------------------------------------------------------- FSDP2


@both
def test_fsdp2_from_meta_equals_one_process(kind: str) -> None:
    layers = LowRankAdapters(RANK, alpha=4.0)

    def one() -> dict[str, Tensor]:
        model = tiny(kind)
        layers.convert(model)
        trained(model, alpha=4.0)
        return {**weights(model), "logits": model(TOKENS).logits.detach()}

    def worker() -> dict[str, Tensor]:
        plain = tiny(kind)
        with torch.device("meta"):
            model = (tiny_llama() if kind == "llama" else tiny_opt()).to(torch.float64).eval()
        layers.convert(model)
        shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), optim.ReLoRA, "float64")
        model.to_empty(device="cpu")
        model.tie_weights()
        fill_from(model, plain, layers)
        trained(model, alpha=4.0)
        logits = model(TOKENS).logits.detach()
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return {**all_whole(dict(model.named_parameters())), "logits": logits}

    expected = one()
    for result in run_distributed(worker, 2):
        assert_equal(result, expected, 1e-9)


def test_forward_and_backward_do_not_warn_in_mixed_precision() -> None:
    def worker() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = tiny("llama", torch.float32)
            add_adapters(model, RANK)
            shard_model(model, init_device_mesh("cpu", (2,)), optim.ReLoRA, "bfloat16")
            trained(model, 4)
            assert all(param.dtype == torch.float32 for param in model.parameters())
            loss: float = model(input_ids=TOKENS, labels=TOKENS).loss.item()
            return loss

    first, second = run_distributed(worker, 2)
    assert first == second < 3.4  # of 29 tokens one may guess ln 29 = 3.37


def test_adapters_after_sharding_are_refused() -> None:
    def worker() -> None:
        model = tiny("llama")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="the model is sharded already; convert the model before fully_shard"):
            add_adapters(model, RANK)

    run_distributed(worker, 1)


# ---------------------------------------------------------------------------------------------------- by name, errors


def test_lora_and_relora_by_name() -> None:
    given = {"rank": 2, "alpha": 5.0, "seed": 8, "lr": 1e-3}
    for name, optimizer in (("lora", optim.AdamW), ("relora", optim.ReLoRA)):
        method = methods.find(name, given)
        model = tiny("llama")
        layers = method.parametrization(given)
        layers.convert(model)
        built = optim.create(method.optimizer, model, **method.optimizer_arguments(given))
        assert type(built) is optimizer
        assert isinstance(layers, LowRankAdapters)
        assert (layers.rank, layers.alpha, layers.seed) == (2, 5.0, 8)
    assert built.defaults["alpha"] == 5.0
    assert built.defaults["seed"] == 8


def test_alpha_and_seed_mean_the_same_where_neither_is_given() -> None:
    """Or an optimizer and layers made by name would disagree."""
    layers, model = LowRankAdapters(RANK), tiny("llama")
    layers.convert(model)
    defaults = optim.ReLoRA(model).defaults
    assert (layers.alpha, layers.seed) == (defaults["alpha"], defaults["seed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank=0; expected a whole number >= 1"),
        ({"rank": 2.0}, r"rank=2\.0; expected a whole number >= 1"),
        ({"rank": 9}, r"rank=9 for 'model\.layers\.0\.self_attn\.q_proj'; expected 1 to 8, the weight's smaller side"),
        ({"rank": 5}, r"rank=5 for 'model\.layers\.0\.self_attn\.k_proj'; expected 1 to 4, the weight's smaller side"),
        ({"rank": 2, "alpha": -1}, r"alpha=-1; expected a number > 0, or None for the rank"),
        ({"rank": 2, "seed": "x"}, r"seed='x'; expected a whole number >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        LowRankAdapters(**arguments).convert(model)
    assert list(model.state_dict()) == before


def test_models_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matches no nn\.Linear of the model; it has '0'"):
        LowRankAdapters(1).convert(nn.Sequential(nn.Linear(2, 2)))
    model = tiny("llama")
    add_adapters(model, RANK)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, RANK)


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need peft.*pip install 'lowrank-train\[peft\]'"):
        LowRankAdapters(RANK)
