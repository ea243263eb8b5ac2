"""Small models and deterministic gradients for the optimizer tests."""

from __future__ import annotations

import inspect
import pickle
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import optim
from tests.distributed import dumps

MATRIX_SHAPES = [(1, 8), (3, 12), (5, 4), (5, 1), (17, 6), (6, 17), (12, 24), (24, 12), (8, 8)]
LR = 1e-2
REFRESH_INTERVAL = 3
TOLERANCES = {
    # Directions from an iteration: as exact as its products are well conditioned.
    "galore_adamw": 1e-10,
    "ldadam": 1e-10,
    # A row nearly orthogonal to its directions, |g| << |A|, is scaled by |u| / |g|.
    "apollo": 1e-10,
    "fira": 1e-9,
}


class MixedModel(nn.Module):
    """Every role and awkward shapes. It is never run: gradients are set by hand."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, dtype=dtype)
        for rows, columns in MATRIX_SHAPES:
            linear = nn.Linear(columns, rows, bias=rows == 5, dtype=dtype)
            self.add_module(f"matrix_{rows}x{columns}", linear)
        self.norm = nn.LayerNorm(3, dtype=dtype)
        self.head = nn.Linear(4, 11, bias=False, dtype=dtype)


def tiny_llama(*, tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tiny_opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=29,
        hidden_size=8,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return OPTForCausalLM(config)


def build(name: str, model: nn.Module | list[dict[str, Any]], **arguments: Any) -> optim.MatrixOptimizer:
    """An optimizer with settings under which 8 steps exercise everything; a refresh falls on steps 0, 3 and 6."""
    arguments = {"lr": LR, "weight_decay": 0.1, **arguments}
    if "refresh_interval" in inspect.signature(optim.find(name)).parameters:
        arguments.setdefault("refresh_interval", REFRESH_INTERVAL)
    return optim.create(name, model, **arguments)


def tolerance(name: str) -> float:
    """Of weights and state of size 1 in float64, after steps whose sums over shards were ordered differently."""
    return TOLERANCES.get(name, 1e-12)


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """The float64 gradient of a parameter at a step: a function of its arguments, equal in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def set_gradients(model: nn.Module, step: int) -> None:
    for name, param in model.named_parameters():
        param.grad = laid_out_as(param, gradient(name, param.shape, step).to(param.dtype))


def laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, sharded as a parameter is; without communication."""
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first .. last - 1."""
    for step in range(first, last):
        set_gradients(model, step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A detached copy of a tensor, gathered if it is sharded (then a collective)."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def all_whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``whole`` for many tensors in one collective, which takes a hundredth of the time."""
    copies = {name: tensor.detach() for name, tensor in tensors.items()}
    shards = {name: tensor for name, tensor in copies.items() if isinstance(tensor, DTensor)}
    copies.update({name: tensor.to_local() for name, tensor in shards.items()})
    if not shards or dist.get_world_size() == 1:
        return {name: tensor.clone() for name, tensor in copies.items()}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, dumps({name: copies[name] for name in shards}))
    by_rank = [pickle.loads(shards_of_one) for shards_of_one in by_rank]
    peers: dict[tuple[int, int], list[int]] = {}
    for name, tensor in shards.items():
        mesh = tensor.device_mesh
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                if (id(mesh), axis) not in peers:  # the ranks that differ from this one in that coordinate alone
                    place = [slice(None) if i == axis else mesh.get_local_rank(i) for i in range(mesh.ndim)]
                    peers[id(mesh), axis] = mesh.mesh[tuple(place)].tolist()
                parts = [by_rank[rank][name] for rank in peers[id(mesh), axis]]
                copies[name] = torch.cat(parts, placement.dim)
        assert copies[name].shape == tensor.shape
    return {name: tensor.clone() for name, tensor in copies.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole, by name."""
    return all_whole(dict(model.named_parameters()))


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all state tensors, whole, by ``parameter.key``."""
    return all_whole(
        {
            f"{name}.{key}": value
            for name, param in model.named_parameters()
            for key, value in optimizer.state[param].items()
        }
    )


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Same names, dtypes and values; integers always exactly, the rest to an absolute tolerance."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        if tolerance == 0 or not value.is_floating_point():
            assert torch.equal(value, expected[name]), f"{name} differs"
        elif value.numel():
            difference = (value.double() - expected[name].double()).abs().max().item()
            assert difference <= tolerance, f"{name} differs by {difference:.2e}"  # false for nan too
