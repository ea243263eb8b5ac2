"""What of real architectures gets the method, and what is said where AdamW takes the place of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lowrank_train import optim
from lowrank_train.optim.arguments.caller import CoverageWarning
from tests.optim.models import MixedModel, gradient, tiny_llama, tiny_opt, weights

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}


def built(model: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**{"pad_token_id": 0, **settings}))


def gpt2() -> nn.Module:
    return built("GPT2LMHeadModel", "GPT2Config", **GPT2)


def mixtral() -> nn.Module:
    return built("MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=1, num_local_experts=4)


def qwen3_moe() -> nn.Module:
    more = {"num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}
    return built("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **SMALL, **more)


def gpt_oss() -> nn.Module:
    more = {"num_key_value_heads": 1, "num_local_experts": 4, "head_dim": 8}
    return built("GptOssForCausalLM", "GptOssConfig", **SMALL, **more)


def classifier() -> nn.Module:
    return built("LlamaForSequenceClassification", "LlamaConfig", **SMALL, num_labels=3)


def wide_classifier() -> nn.Module:
    return built("LlamaForSequenceClassification", "LlamaConfig", **SMALL, num_labels=12)


def bert() -> nn.Module:
    return built("BertForSequenceClassification", "BertConfig", **SMALL, num_labels=2)


def vit() -> nn.Module:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return built("ViTForImageClassification", "ViTConfig", **sizes, image_size=8, patch_size=4, num_labels=10)


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class OwnLinear(nn.Module):
    """As users write it; (in, out)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.bias = nn.Parameter(torch.zeros(columns))


def own_layers() -> nn.Module:
    return nn.Sequential(OwnLinear(8, 12), nn.Tanh(), OwnLinear(12, 12), nn.Bilinear(6, 8, 5), nn.LSTM(5, 8))


def normed() -> nn.Module:
    cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(8, 8))
    new = parametrizations.weight_norm(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 12))
    table = parametrizations.weight_norm(nn.Embedding(9, 8))
    return nn.ModuleDict({"cross": cross, "old": old, "weight": new[0], "spectral": new[1], "table": table})


COVERED: dict[Callable[[], nn.Module], tuple[float, float]] = {
    gpt2: (0.0, 0.93),
    mixtral: (0.2, 0.98),
    qwen3_moe: (0.4, 0.97),
    gpt_oss: (0.2, 0.93),
    classifier: (0.97, 0.98),
    wide_classifier: (0.9, 0.98),
    bert: (0.9, 0.9),
    vit: (0.7, 0.7),
    attention: (0.5, 0.9),
    own_layers: (0.0, 0.85),
    normed: (0.2, 0.9),
    tiny_llama: (0.9, 0.95),
    tiny_opt: (0.8, 0.85),
}
"""Shares of the numbers outside of embeddings and heads: roughly before roles were recognised, and at least now."""


def roles(model: nn.Module) -> dict[str, str]:
    return {name: group["role"] for group in optim.param_groups(model) for name, _ in group["params"]}


@pytest.mark.parametrize("make", COVERED, ids=lambda make: make.__name__)
def test_most_numbers_of_real_architectures_get_the_method_and_nothing_is_warned(make: Callable[[], nn.Module]) -> None:
    model = make()
    numbers: dict[str, int] = {}
    for name, role in roles(model).items():
        numbers[role] = numbers.get(role, 0) + model.get_parameter(name).numel()
    others = sum(count for role, count in numbers.items() if role not in ("embedding", "head"))
    assert numbers["matrix"] >= COVERED[make][1] * others, numbers
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        for name in ("adamw", "dct_adamw", "muon", "scale"):
            optimizer = optim.create(name, model)
            assert f"{numbers['matrix']:,} numbers by {type(optimizer).__name__}" in repr(optimizer)


def test_heads_and_what_is_too_thin_for_a_matrix_are_none() -> None:
    assert roles(classifier())["score.weight"] == "head"
    assert roles(wide_classifier())["score.weight"] == "head"
    assert roles(bert())["classifier.weight"] == "head"
    assert roles(vit())["classifier.weight"] == "head"
    value = nn.ModuleDict({"pretrained_model": tiny_llama(), "v_head": nn.ModuleDict({"summary": nn.Linear(8, 1)})})
    found = roles(value)
    assert found["v_head.summary.weight"] == "vector"
    assert found["pretrained_model.lm_head.weight"] == "head"
    of_norms = roles(normed())
    assert of_norms["weight.parametrizations.weight.original0"] == "vector"
    assert of_norms["weight.parametrizations.weight.original1"] == "matrix"
    assert (of_norms["old.weight_g"], of_norms["old.weight_v"]) == ("vector", "matrix")
    assert of_norms["table.parametrizations.weight.original1"] == "embedding"
    assert {of_norms[f"cross.{key}_proj_weight"] for key in "qkv"} == {"matrix"}
    assert roles(gpt_oss())["model.layers.0.mlp.experts.gate_up_proj_bias"] == "vector"
    assert roles(mixtral())["model.layers.0.mlp.gate.weight"] == "matrix"


def test_the_head_in_the_wrapper_of_peft_is_a_head() -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings, modules_to_save=["lm_head"]))
    assert roles(model)["base_model.model.lm_head.modules_to_save.default.weight"] == "head"
    model = peft.get_peft_model(classifier(), peft.LoraConfig(**settings, modules_to_save=["score"]))
    found = roles(model)
    assert found["base_model.model.score.modules_to_save.default.weight"] == "head"
    assert [role for name, role in found.items() if "lora_A" in name] == ["matrix"] * 2


class AsLinear(nn.Module):
    """The layer of a GPT-2, written with nn.Linear."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, module in model.named_modules():
            if type(module).__name__ == "Conv1D":
                linear = nn.Linear(module.weight.shape[0], module.weight.shape[1], dtype=module.weight.dtype)
                linear.weight.data = module.weight.detach().T.clone()
                linear.bias.data = module.bias.detach().clone()
                self.add_module(name.replace(".", "-"), linear)


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_weights_stored_as_in_by_out_are_trained_as_linear_layers_are(name: str) -> None:
    """Muon and Trion scale by outputs over inputs, SCALE divides by the norm of each output."""
    torch.manual_seed(0)
    theirs = gpt2().double()
    ours = AsLinear(theirs)
    plain = {key: p for key, p in theirs.named_parameters() if roles(theirs)[key] == "matrix"}
    groups = [group for group in optim.param_groups(theirs) if group["role"] == "matrix"]
    assert [group["weight_layout"] for group in groups] == ["in,out"]
    more = {"rank": 4} if "rank" in optim.describe(name) else {}
    optimizers = optim.create(name, groups, **more), optim.create(name, ours, **more)
    before = weights(ours)
    for step in range(3):
        for key, param in plain.items():
            param.grad = gradient(key, param.shape, step)
            linear = ours.get_submodule(key.removesuffix(".weight").replace(".", "-"))
            linear.weight.grad = param.grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    for key, param in plain.items():
        own = f"{key.removesuffix('.weight').replace('.', '-')}.weight"
        assert (param.T - ours.get_parameter(own)).abs().max() < 1e-9, key
        assert not torch.equal(before[own], weights(ours)[own])


# ------------------------------------------------------------------------------------------------------- what is said


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize("name", [name for name in optim.names(of_matrices=True) if optim.find(name).needs_roles])
def test_little_coverage_is_said_once_with_numbers_and_the_rule_that_ends_it(name: str) -> None:
    model = resnet()
    with pytest.warns(CoverageWarning) as said:
        optimizer = optim.create(name, model)
    (warning,) = said
    assert warning.filename == __file__
    text = str(warning.message)
    assert f"{type(optimizer).__name__} updates 80 of the 1,493 numbers" in text
    assert "Conv2d, 4 tensors of 1,392 numbers, such as '2.weight' (16 x 8 x 3 x 3)" in text
    assert "vector: 7 tensors of 1,413 numbers by AdamW; 2 of them, 1,368 numbers, have two dimensions" in repr(
        optimizer
    )
    rules: dict[str, Any] = eval(text.partition("rules=")[2].rstrip(")"))  # as the user pastes it
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        groups = optim.param_groups(model, rules=rules)
        assert {g["weight_layout"] for g in groups if g["role"] == "matrix" and "weight_layout" in g} == {"out,rest"}
        optimizer = optim.create(name, groups)
        for key in (*dict(model.named_parameters()),):
            model.get_parameter(key).grad = torch.ones_like(model.get_parameter(key))
        optimizer.step()


def test_nothing_is_said_where_all_roles_are_alike_or_bytes_are_counted() -> None:
    from lowrank_train.optim.costs.sent import communicated_bytes

    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        optim.create("adamw", resnet())
        optim.AdamW(resnet().parameters())
        optim.predicted_state_bytes("muon", resnet())
        communicated_bytes("muon", resnet(), world_size=2)
        for model in (tiny_llama(), tiny_opt(), MixedModel()):
            for name in optim.names(of_matrices=True):
                optim.create(name, model, **({"rank": 1} if "rank" in optim.describe(name) else {}))


def test_matrices_that_are_no_layers_of_the_method_are_named() -> None:
    from lowrank_train.layers.spectral import to_spectral

    model = to_spectral(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), rank=4, layers="^0$")
    with pytest.warns(CoverageWarning, match=r"AdamW, and not the method of SST, updates 1 matrices of 48 numbers"):
        optimizer = optim.create("sst", model)
    assert "matrix: 1 tensor of 48 numbers by AdamW" in repr(optimizer)


def test_an_unknown_layout_is_an_error() -> None:
    group: dict[str, Any] = {"params": [("w", nn.Parameter(torch.ones(4, 4)))], "role": "matrix", "weight_layout": "oi"}
    with pytest.raises(ValueError, match=r"group 0 has weight_layout='oi'; expected one of 'out,in', 'in,out', 'out,r"):
        optim.create("muon", [group])


def test_what_owns_a_weight_is_not_part_of_a_state_dict() -> None:
    optimizer = optim.create("muon", MixedModel())
    assert all("modules" not in group for group in optimizer.state_dict()["param_groups"])


def test_biases_of_a_stack_are_exempt_from_weight_decay() -> None:
    decays: dict[str, float] = {}
    optimizer = optim.create("muon", gpt_oss(), weight_decay=0.3)
    for group in optimizer.param_groups:
        decays.update(dict.fromkeys(group["param_names"], group["weight_decay"]))
    assert decays["model.layers.0.mlp.experts.down_proj_bias"] == 0
    assert decays["model.layers.0.mlp.experts.down_proj"] == 0.3


def test_the_state_of_experts_is_that_of_low_rank() -> None:
    """Before, GPT-2 and Mixtral took more than dense Adam, or nearly as much."""
    for make in (gpt2, mixtral, qwen3_moe):
        model = make()
        dense, low = (optim.predicted_state_bytes(name, model, **more) for name, more in
                      (("adamw", {}), ("dct_adamw", {"rank": 1})))  # fmt: skip
        aside: list[Tensor] = [model.get_parameter(key) for key, role in roles(model).items() if role != "matrix"]
        assert low - 8 * sum(p.numel() for p in aside) < 0.35 * (dense - 8 * sum(p.numel() for p in aside))


@pytest.mark.filterwarnings("ignore::optim.arguments.caller.CoverageWarning")
@pytest.mark.parametrize("name", ["adamw", "dct_adamw", "muon"])
def test_moments_that_stay_in_full_precision_are_shown(name: str) -> None:
    """The filters have four dimensions; the biases of each layer are short."""
    model = nn.ModuleDict({"large": nn.Linear(256, 256), "filters": nn.Conv2d(64, 64, 3)})
    shown = repr(optim.create(name, model, lr=1e-3, state_dtype="8bit"))
    lines = [line for line in shown.splitlines() if "keep their moments in full precision" in line]
    assert len(lines) == 1
    assert "3 of them, 37,184 numbers, keep" in lines[0]
    assert "full precision" not in repr(optim.create(name, model, lr=1e-3))
