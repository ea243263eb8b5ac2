"""Low-rank layers: the best approximation there is, conversion in place and back, what is left in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from lowrank_train.layers.choice import linear_layers
from lowrank_train.layers.low_rank import (
    LowRankLinear,
    factors,
    low_rank_layer,
    shape_low_rank,
    to_low_rank,
    train_low_rank_only,
    truncated,
)
from lowrank_train.layers.plain import merge, merged_state_dict
from lowrank_train.models.loss import token_loss
from tests.distributed import run_distributed
from tests.spectra.test_spectrum import build

SHAPES = [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1)]


def svd_truncated(weight: Tensor, rank: int) -> Tensor:
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] @ sigma[:rank].diag() @ vh[:rank]


def moment_of(inputs: Tensor) -> Tensor:
    """C = mean of x x^T over (tokens, in)."""
    return sum(torch.outer(x, x) for x in inputs.double()) / len(inputs)  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    for rank in range(1, min(shape) + 1):
        left, right = factors(weight, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        torch.testing.assert_close(left @ right, svd_truncated(weight, rank), rtol=0, atol=1e-12)
        torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-12)  # each has half of Sigma
        assert truncated(weight, rank).dtype == weight.dtype
        torch.testing.assert_close(truncated(weight, rank).double(), left @ right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_whitened_factors_lose_the_least_of_the_outputs(shape: tuple[int, int]) -> None:
    """Against alternating least squares on the outputs themselves, which knows nothing of S."""
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64)
    inputs = torch.randn(200, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    inputs *= torch.logspace(0, -1.5, shape[1], dtype=torch.float64)
    moment = moment_of(inputs)

    def lost(product: Tensor) -> float:
        return float((inputs @ (weight - product).mT).square().sum())

    for rank in (1, 3):
        left, right = factors(weight, rank, moment)
        best = float("inf")
        for _ in range(3):
            b = torch.randn(rank, shape[1], dtype=torch.float64)
            for _ in range(300):
                a = torch.linalg.lstsq(inputs @ b.mT, inputs @ weight.mT).solution.mT
                b = torch.linalg.pinv(a) @ weight  # the inputs span everything: the least squares over B needs no X
            best = min(best, lost(a @ b))
        assert lost(left @ right) == pytest.approx(best, rel=1e-6)
        assert lost(left @ right) < 0.95 * lost(svd_truncated(weight, rank))
        # what is lost is the dropped singular values of W S
        dropped = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))[rank:]
        assert lost(left @ right) / len(inputs) == pytest.approx(float(dropped.square().sum()), rel=1e-9)


def test_white_inputs_give_the_plain_factors() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    for got, expected in zip(factors(weight, 3, 4 * torch.eye(5)), factors(weight, 3), strict=True):
        torch.testing.assert_close((got.abs() / got.abs().max()), expected.abs() / expected.abs().max())
    torch.testing.assert_close(truncated(weight, 3, 4 * torch.eye(5)), truncated(weight, 3), rtol=0, atol=1e-12)


def test_inputs_that_do_not_span_everything_are_damped() -> None:
    """Three tokens in eight dimensions: their outputs are kept, and the rest of the map does not explode."""
    weight, inputs = torch.randn(8, 8), torch.randn(3, 8, dtype=torch.float64)
    product = truncated(weight, 3, moment_of(inputs)).double()
    torch.testing.assert_close(inputs @ product.mT, inputs @ weight.double().mT, rtol=0, atol=1e-3)
    assert product.norm() < 10 * weight.norm()


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    left, right = factors(torch.zeros(4, 6), 2)
    assert not left.any()
    assert not right.any()


@pytest.mark.parametrize("moment", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), -torch.eye(4)])
def test_inputs_without_a_moment_are_refused(moment: Tensor) -> None:
    with pytest.raises(ValueError, match="no positive definite second moment; calibrate on more text"):
        factors(torch.randn(4, 4), 2, moment)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="entries that are not finite"):
        factors(torch.full((3, 3), torch.inf), 1)


# ---------------------------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_its_product_and_bias(bias: bool) -> None:
    linear = nn.Linear(10, 6, bias=bias, dtype=torch.float64)
    layer = low_rank_layer(linear, 4)
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    expected = x @ svd_truncated(linear.weight.detach(), 4).mT + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x @ layer.weight.mT + (linear.bias if bias else 0), layer(x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16 + 6 * bias
    assert "in_features=10, out_features=6, rank=4" in repr(layer)
    full = low_rank_layer(linear, 6)
    torch.testing.assert_close(full(x), linear(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 7, -1, 2.0, True])
def test_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank}; expected a whole number from 1 to 6"):
        LowRankLinear(10, 6, rank)


def test_half_precision_layers_stay_so() -> None:
    linear = nn.Linear(10, 6, dtype=torch.bfloat16)
    layer = low_rank_layer(linear, 4)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.weight.dtype == torch.bfloat16
    expected = svd_truncated(linear.weight.detach(), 4).float()
    torch.testing.assert_close(layer.weight.float(), expected, rtol=0, atol=2**-7 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------------------------- conversion


def chosen(model: nn.Module) -> dict[str, int]:
    return {name: 3 + i % 4 for i, name in enumerate(linear_layers(model)) if i % 3}


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_conversion_and_merge_have_the_outputs_of_truncated_weights(kind: str) -> None:
    model = build(kind).double().eval()
    expected, ranks = copy.deepcopy(model), chosen(model)
    for bias in (name for name, _ in model.named_parameters() if name.endswith("bias")):
        nn.init.normal_(model.get_parameter(bias))
        expected.get_parameter(bias).data.copy_(model.get_parameter(bias))
    for name, rank in ranks.items():
        weight = expected.get_submodule(name).weight
        weight.data.copy_(svd_truncated(weight.detach(), rank))
    ids = torch.arange(24).view(2, 12)
    plain = {name: type(module) for name, module in model.named_modules()}
    assert to_low_rank(model, ranks) is model
    assert {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == ranks
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-12)
        state = merged_state_dict(model.state_dict())
        assert state.keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-13)
        assert merge(model) is model
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-12)
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert not any(module.training for module in model.modules())


def test_shapes_on_meta_are_those_of_a_converted_model() -> None:
    model = build("opt")
    with torch.device("meta"):
        empty = shape_low_rank(build("opt"), chosen(model))
    made = to_low_rank(model, chosen(model))
    assert all(p.is_meta for p in empty.parameters())
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in made.named_parameters()
    ]


def test_a_head_of_low_rank_is_trained_through_its_weight() -> None:
    """The chunked loss reads the head's weight instead of calling the head."""
    model = to_low_rank(build("llama").double(), {"lm_head": 7})
    ids = torch.arange(24).view(2, 12)
    token_loss(model, ids[:, :-1], ids[:, 1:], 5).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=ids[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(got[name], param.grad, rtol=1e-9, atol=1e-12)
    assert got["lm_head.left.weight"].any()
    assert got["lm_head.right.weight"].any()


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        (
            "model.layers.9.mlp.up_proj",
            3,
            "nothing named 'model.layers.9.mlp.up_proj'; expected an nn.Linear: the ranks",
        ),
        ("model.layers.1.mlp", 3, "a LlamaMLP named"),
        ("model.layers.1.mlp.up_proj", 33, "cannot factor 'model.layers.1.mlp.up_proj': rank=33; expected .* 1 to 32"),
        ("model.layers.1.mlp.up_proj", 0, "rank=0; expected"),
        (
            "model.layers.1.mlp.down_proj",
            3,
            "'model.layers.1.mlp.down_proj': the weight has entries that are not finite",
        ),
    ],
)
def test_ranks_that_do_not_fit_leave_the_model_as_it_is(name: str, rank: int, message: str) -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = torch.nan
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        to_low_rank(model, {"model.layers.0.mlp.up_proj": 4, name: rank})
    assert dict(model.named_modules()) == before
    if "finite" not in message:
        with pytest.raises(ValueError, match=message):
            shape_low_rank(model, {name: rank})


def test_tied_and_frozen_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'lm_head' is tied to 'model.decoder.embed_tokens.weight'"):
        to_low_rank(build("opt"), {"lm_head": 4})
    model = build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' takes no gradient"):
        to_low_rank(model, {"model.layers.0.mlp.up_proj": 4})


def test_a_plain_model_is_neither_merged_nor_trained_at_low_rank() -> None:
    with pytest.raises(ValueError, match="no spectral or low-rank layer to merge; it is plain already"):
        merge(build("llama"))
    with pytest.raises(ValueError, match="train=low_rank, but the model has no low-rank layer; compress it first"):
        train_low_rank_only(build("llama"))


def test_a_sharded_model_is_refused_and_its_gathered_state_merges() -> None:
    def work() -> None:
        model = to_low_rank(build("llama"), {"model.layers.0.mlp.up_proj": 4})
        expected = merge(copy.deepcopy(model)).state_dict()
        fully_shard(model)
        with pytest.raises(ValueError, match=r"sharded; gather its state first .*merged_state_dict"):
            merge(model)
        with pytest.raises(ValueError, match="sharded already; convert the model before fully_shard"):
            to_low_rank(model, {"model.layers.1.mlp.up_proj": 4})
        merged = merged_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value)

    run_distributed(work, 2)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_only_low_rank_layers_and_norms_are_left_in_training(kind: str) -> None:
    model = build(kind)
    ranks = chosen(model)
    to_low_rank(model, ranks)
    assert train_low_rank_only(model) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if "norm" in name or any(name.startswith(f"{layer}.") for layer in ranks)
    }
    assert any("norm" in name for name in trained)
    assert any(name.endswith("left.bias") for name in trained) == (kind == "opt")
