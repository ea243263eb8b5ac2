"""Spectral layers under FSDP2 on 2 and 3 ranks (CPU, gloo): the numbers of one process, and clear errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.plain import merge, merged_state_dict
from lowrank_train.layers.spectral import to_spectral
from lowrank_train.models import build as models
from tests.distributed import run_distributed
from tests.tiers import only_first_quick

VOCABULARY = 61
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # k_proj and v_proj have 8 triplets: 3 active and 5 frozen over 2 or 3 ranks
}
RANK = 3


def plain(dtype: torch.dtype) -> PreTrainedModel:
    """The same on every rank."""
    config = models.architecture(ModelConfig(name="llama_9m", overrides=SIZE), vocab_size=VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def spectral(dtype: torch.dtype = torch.float64, **settings: Any) -> PreTrainedModel:
    return to_spectral(plain(dtype), RANK, **settings)


def shard(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    return model


def batch(rank: int) -> Tensor:
    """Of one rank."""
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, rank: int) -> Tensor:
    ids = batch(rank)
    return model(input_ids=ids, labels=ids).loss


def average(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def alone(model: PreTrainedModel, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and float32 (or wider) gradients of all batches in one process, averaged as FSDP does."""
    losses, total = [], {}
    for rank in range(world_size):
        model.zero_grad()
        loss = loss_of(model, rank)
        loss.backward()
        losses.append(loss.detach())
        for name, param in model.named_parameters():
            if param.grad is not None:
                value = param.grad.to(torch.promote_types(param.grad.dtype, torch.float32)) / world_size
                total[name] = total[name] + value if name in total else value
    return torch.stack(losses).mean(), total


def gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: param.grad.full_tensor() for name, param in model.named_parameters() if param.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        scale = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=f"{name}, largest {scale}")


@pytest.mark.parametrize(
    ("world_size", "frozen_dtype", "path"),
    only_first_quick(
        [
            (2, None, "factored"),
            (3, None, "materialised"),
            (2, "float32", "materialised"),
            (3, "float32", "factored"),
            (2, "8bit", "materialised"),
            (3, "8bit", "factored"),
        ],
        2,
    ),
)
def test_sharded_gradients_are_those_of_one_process(world_size: int, frozen_dtype: str | None, path: Any) -> None:
    def work() -> None:
        model = spectral(frozen_dtype=frozen_dtype, path=path)
        expected_loss, expected = alone(copy.deepcopy(model), world_size)
        shard(model)
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor), name
            assert param.placements == (Shard(0),), name
            assert param.requires_grad == ("u_frozen" not in name and "v_frozen" not in name), name
        for _ in range(2):  # again, after the parameters were gathered and given up once
            model.zero_grad()
            loss = loss_of(model, dist.get_rank())
            loss.backward()
            torch.testing.assert_close(average(loss), expected_loss, rtol=1e-12, atol=0)
            assert_close(gathered(model), expected, 1e-10)
            for name, param in model.named_parameters():
                assert (param.grad is None) == (not param.requires_grad), name

    run_distributed(work, world_size)


@pytest.mark.parametrize(
    ("world_size", "frozen_dtype", "path", "reshard"),
    only_first_quick(
        [
            (2, "float32", "factored", True),
            (3, "float32", "materialised", False),
            (2, "8bit", "factored", False),
            (2, "8bit", "materialised", True),
            (3, "8bit", "materialised", False),
        ]
    ),
)
def test_mixed_precision_computes_in_bfloat16_and_reduces_in_float32(
    world_size: int, frozen_dtype: str, path: Any, reshard: bool
) -> None:
    """8-bit codes must reach the layer as codes, and must not be scaled in place where gathered weights stay."""

    def work() -> None:
        model = spectral(torch.float32, frozen_dtype=frozen_dtype, path=path)
        reference = copy.deepcopy(model)
        exact_loss, exact = alone(copy.deepcopy(model), world_size)
        for param in reference.parameters():
            if param.dtype.is_floating_point:
                param.data = param.data.bfloat16()
        expected_loss, expected = alone(reference, world_size)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, mp_policy=policy, reshard_after_forward=reshard)
        before = {name: param.full_tensor().clone() for name, param in model.named_parameters()}
        loss = loss_of(model, dist.get_rank())
        loss.backward()
        torch.testing.assert_close(average(loss).float(), expected_loss.float(), rtol=1e-6, atol=0)
        found = gathered(model)
        assert all(value.dtype == torch.float32 for value in found.values())
        assert_close(found, expected, 1e-5)
        torch.testing.assert_close(average(loss).float(), exact_loss, rtol=1e-2, atol=0)
        assert_close(found, exact, 0.1)
        for name, param in model.named_parameters():
            assert torch.equal(param.full_tensor(), before[name]), name
            assert (param.grad is None) == (not param.requires_grad), name
        with torch.no_grad():
            assert torch.equal(loss_of(model, dist.get_rank()), loss)

    run_distributed(work, world_size)


@pytest.mark.parametrize("world_size", [2])
def test_gradients_accumulate_over_micro_batches(world_size: int) -> None:
    def work() -> None:
        model = spectral(frozen_dtype="8bit")
        _, expected = alone(copy.deepcopy(model), 2 * world_size)
        shard(model)
        for step in range(2):
            model.set_requires_gradient_sync(step == 1)
            (loss_of(model, step * world_size + dist.get_rank()) / 2).backward()
        assert_close(gathered(model), expected, 1e-10)

    run_distributed(work, world_size)


def test_a_meta_model_is_converted_and_sharded_before_it_has_values() -> None:
    def work() -> None:
        config = models.architecture(ModelConfig(name="llama_9m", overrides=SIZE), vocab_size=VOCABULARY)
        model = shard(to_spectral(models.skeleton(config, torch.float64), RANK, frozen_dtype="8bit"))
        model.to_empty(device="cpu")
        whole = dict(spectral(frozen_dtype="8bit").named_parameters())
        assert [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()] == [
            (name, p.shape, p.dtype, p.requires_grad) for name, p in whole.items()
        ]

    run_distributed(work, 2)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("change", ["convert", "merge"])
def test_a_sharded_model_is_neither_converted_nor_merged(change: str, per_layer: bool, used: bool) -> None:
    """Not even while its parameters are gathered, as the root's are after a forward pass."""

    def work() -> None:
        model = plain(torch.float64) if change == "convert" else spectral()
        model = shard(model) if per_layer else fully_shard(model)
        if used:
            with torch.no_grad():
                loss_of(model, dist.get_rank())
        before = dict(model.named_modules())
        if change == "convert":
            with pytest.raises(ValueError, match=r"sharded already; convert the model before fully_shard"):
                to_spectral(model, RANK)
        else:
            with pytest.raises(ValueError, match=r"sharded; gather its state first .*merged_state_dict"):
                merge(model)
        assert dict(model.named_modules()) == before

    run_distributed(work, 2)


@pytest.mark.parametrize(("world_size", "frozen_dtype"), [(2, "8bit"), (3, None)])
def test_the_gathered_state_of_a_sharded_model_merges_as_the_error_advises(
    world_size: int, frozen_dtype: str | None
) -> None:
    def work() -> None:
        model = spectral(frozen_dtype=frozen_dtype)
        expected = merge(copy.deepcopy(model)).state_dict()
        shard(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        target = plain(torch.float64)
        target.load_state_dict(merged_state_dict(state))
        for name, value in target.state_dict().items():
            assert torch.equal(value, expected[name]), name

    run_distributed(work, world_size)


def test_a_sharded_state_dict_is_not_merged_silently_wrong() -> None:
    """Its rows are spread over the ranks: whole again, or refused."""

    def work() -> None:
        model = spectral()
        expected = merge(copy.deepcopy(model)).state_dict()
        try:
            merged = merged_state_dict(shard(model).state_dict())
        except ValueError as error:
            assert "full_state_dict" in str(error)  # noqa: PT017
            return
        for name, value in merged.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            torch.testing.assert_close(whole, expected[name], rtol=1e-12, atol=1e-13)

    run_distributed(work, 2)
