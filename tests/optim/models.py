"""Small models and deterministic gradients for the optimizer tests.

Transformers and layers are imported where they are used: most tests of ``optim`` need neither.
"""

from __future__ import annotations

import inspect
import pickle
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowrank_train import optim
from lowrank_train.optim.manifolds.maps import Description, find_manifold
from tests.distributed import dumps

MATRIX_SHAPES = [(1, 8), (3, 12), (5, 4), (5, 1), (17, 6), (6, 17), (12, 24), (24, 12), (8, 8)]
LR = 1e-2
REFRESH_INTERVAL = 3
LAYER_RANK = 3
"""Of converted layers: of one matrix all is active, of others a little waits, and of 4 ranks one has no active row."""
SCHEDULE = {
    "refresh_interval": REFRESH_INTERVAL,
    "resample_every": REFRESH_INTERVAL,  # SST: a draw ends steps 2 and 5, the latter after a re-SVD
    "resvd_every": 2,
    "restart_every": REFRESH_INTERVAL,  # ReLoRA: likewise
    "warmup_steps": 2,
}
"""Of every optimizer that has such a setting."""


def _to_spectral(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    from lowrank_train.layers.spectral import to_spectral

    return to_spectral(model, rank, **settings)


def _add_adapters(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    from lowrank_train.layers.lora import add_adapters

    return add_adapters(model, rank, **settings)


MANIFOLDS: list[Description] = [("lorentz", 1.0), ("poincare_ball", 0.5), ("sphere",), ("lorentz", 2.5)]


def manifold_of(shape: Sequence[int]) -> Description:
    """Of the points that a matrix of this shape is made into: all kinds occur."""
    return MANIFOLDS[(shape[0] + 2 * shape[1]) % len(MANIFOLDS)]


@torch.no_grad()
def _rows_as_points(model: nn.Module, rank: int, *, layers: str) -> nn.Module:
    """The same linear layers, the rows of their weights points of some manifold, as their modules declare."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(layers, name):
            declared = manifold_of(module.weight.shape)
            manifold = find_manifold(declared)
            points = manifold.storable(manifold.completed(module.weight.double()), module.weight.dtype)
            module.weight.copy_(points)
            module.parameter_manifolds = {"weight": declared}
    return model


CONVERSIONS: dict[str, Callable[..., Any]] = {
    "spectral": _to_spectral,
    "adapter": _add_adapters,
    "points": _rows_as_points,
}
"""By ``MatrixOptimizer.layers``: model, rank, ``layers=`` (a regular expression) -> the model converted in place."""
TOLERANCES = {
    # Directions from an iteration: as exact as its products are well conditioned.
    "galore_adamw": 1e-10,
    "ldadam": 1e-10,
    # A row nearly orthogonal to its directions, |g| << |A|, is scaled by |u| / |g|.
    "apollo": 1e-10,
    "fira": 1e-9,
    "welore_adamw": 1e-9,
    # A decomposition: singular vectors are as exact as their values are apart.
    "sst": 1e-9,
}


class MixedModel(nn.Module):
    """Every role and awkward shapes. It is never run: gradients are set by hand."""

    @property
    def parameter_roles(self) -> dict[str, str]:
        """Of the matrices that are too small to be taken for such."""
        linear = [
            key for key, module in self.named_children() if key.startswith("matrix") and type(module) is nn.Linear
        ]
        return {f"{key}.weight": "matrix" for key in linear}

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, dtype=dtype)
        for rows, columns in MATRIX_SHAPES:
            linear = nn.Linear(columns, rows, bias=rows == 5, dtype=dtype)
            self.add_module(f"matrix_{rows}x{columns}", linear)
        self.norm = nn.LayerNorm(3, dtype=dtype)
        self.head = nn.Linear(4, 11, bias=False, dtype=dtype)


def tiny_llama(*, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

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
    from transformers import OPTConfig, OPTForCausalLM

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


def prepare(name: str, model: nn.Module, *, rank: int = LAYER_RANK, **settings: Any) -> nn.Module:
    """The model as an optimizer needs it: if it trains layers of its own, matrices are converted to these, in place.

    Every optimizer is handed the same model otherwise. Matrices smaller than the rank stay: ``matrix`` is then one of
    the roles that get AdamW.
    """
    kind = optim.find(name).layers
    if kind is not None:
        groups = [group for group in optim.param_groups(model) if group["role"] == "matrix"]
        matrices = [(key, p) for group in groups for key, p in group["params"] if p.ndim == 2 and min(p.shape) >= rank]
        names = "|".join(re.escape(key.removesuffix(".weight")) for key, _ in matrices)
        CONVERSIONS[kind](model, rank, layers=f"^({names})$", **settings)
    return model


def beside_layers(name: str, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups, followed by those of a small layer of the kind the optimizer cannot do without, if there is one."""
    if optim.find(name).layers is None:
        return groups
    return [*groups, *optim.param_groups(prepare(name, nn.Sequential(nn.Linear(6, 4, bias=False))))]


def trained_matrix(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer; of a converted one the first matrix that takes a gradient."""
    return next(param for param in module.parameters() if param.requires_grad and param.ndim == 2)


def build(name: str, model: nn.Module | list[dict[str, Any]], **arguments: Any) -> optim.MatrixOptimizer:
    """An optimizer with settings under which 8 steps exercise everything; a refresh falls on steps 0, 3 and 6.

    The model must be prepared for it.
    """
    own = inspect.signature(optim.find(name)).parameters
    schedule = {key: value for key, value in SCHEDULE.items() if key in own}
    return optim.create(name, model, **{"lr": LR, "weight_decay": 0.1, **schedule, **arguments})


def build_without_weights(name: str, model: nn.Module | list[dict[str, Any]], **arguments: Any) -> Any:
    """As ``build``, with settings that say all of the state before the model has its weights."""
    no_weights = {"score": "uniform"} if "score" in inspect.signature(optim.find(name)).parameters else {}
    return build(name, model, **{**no_weights, **arguments})


def tolerance(name: str) -> float:
    """Of weights and state of size 1 in float64, after steps whose sums over shards were ordered differently."""
    return TOLERANCES.get(name, 1e-12)


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """The float64 gradient of a parameter at a step: a function of its arguments, equal in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All but those with role ``frozen``."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def set_gradients(model: nn.Module, step: int) -> None:
    """Of every parameter that takes one."""
    for name, param in trainable(model).items():
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


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """As ``weights``, converted layers as the matrices they stand for: what a change of factors alone leaves."""
    from lowrank_train.layers.plain import merged_state_dict

    plain = merged_state_dict(weights(model))
    if any(".lora_A." in name for name in plain):
        from lowrank_train.layers.lora import LowRankAdapters

        rank = next(value.shape[0] for name, value in plain.items() if ".lora_A." in name)
        plain = LowRankAdapters(rank).plain_state_dict(plain)
    return plain


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all state tensors, whole, by ``parameter.key``; frozen parameters have none."""
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
