"""FSDP2 around a model: which modules form a group, and along which dimension a parameter is sharded."""

from __future__ import annotations

import warnings
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from lowrank_train import optim
from lowrank_train.models.loss import token_loss
from lowrank_train.optim.storage.int8_weight import Int8Weight

__all__ = ["fill", "gathered", "reduce_dtype", "shard_dims", "shard_model"]


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    optimizer: type[optim.MatrixOptimizer],
    precision: str,
    *,
    one_group: bool = False,
) -> None:
    """Shard a model by FSDP2, in place: a group per decoder layer and one for the rest. Matrices are sharded as the
    optimizer prefers.

    Args:
        model: on meta or with its weights; ``token_loss`` becomes a forward method of it, as is
            ``adapter_penalty`` if it has that.
        mesh: 1-D (shard) or 2-D (replicate, shard).
        optimizer: class that will train it.
        precision: bfloat16 computes in it, whatever the weights are kept in, and reduces in float32; others compute as
            the weights.
        one_group: one group in all: layers that use a parameter of each other cannot be gathered one by one.
    """
    dims = shard_dims(model, optimizer, mesh.size(mesh.ndim - 1))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype(model, mesh))

    def placement(param: nn.Parameter) -> Shard:
        return Shard(dims.get(param, 0))

    # a layer may end in a view (OPT's); transformers never writes into it in place, which is what the warning is about
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .FSDP\w+DecoderLayer. returned a view tensor")
    for layer in [] if one_group else _decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    model.token_loss = MethodType(token_loss, model)
    register_fsdp_forward_method(model, "token_loss")  # gathers the parameters as forward does
    if hasattr(model, "adapter_penalty"):
        register_fsdp_forward_method(model, "adapter_penalty")


def reduce_dtype(model: nn.Module, mesh: DeviceMesh) -> torch.dtype:
    """Return the dtype in which gradients are summed: float32 for sums of bfloat16 over ranks or for float32 weights,
    else their own.
    """
    return torch.promote_types(next(model.parameters()).dtype, torch.float32 if mesh.size() > 1 else torch.bfloat16)


def shard_dims(model: nn.Module, optimizer: type[optim.MatrixOptimizer], shards: int) -> dict[Tensor, int]:
    """Return the dimension along which each parameter that the optimizer knows is sharded; the others are along the
    first.
    """
    return {
        param: 0 if isinstance(param, Int8Weight) else optimizer.shard_dim(group["role"], param.shape, shards)
        for group in optim.param_groups(model)
        for _, param in group["params"]
    }


@torch.no_grad()
def fill(destination: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every rank holds, into a parameter or buffer: each rank its shard."""
    if isinstance(destination, DTensor):
        shards = distribute_tensor(whole, destination.device_mesh, destination.placements, src_data_rank=None)
        destination.to_local().copy_(shards.to_local())
    else:
        destination.copy_(whole)


def gathered(tensor: Tensor) -> Tensor:
    """Gather the whole of a (sharded) tensor; all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers
