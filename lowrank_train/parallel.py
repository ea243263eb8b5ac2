"""Ranks, meshes and sharding: the process group of a run and FSDP2 on top of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

import optim
from lowrank_train.config import ParallelConfig
from lowrank_train.errors import UserError
from lowrank_train.loss import token_loss
from lowrank_train.rendezvous import end_with_launcher, join, say_lost_ranks
from optim.int8_weight import Int8Weight

__all__ = ["Ranks", "fake_ranks", "fill", "gathered", "reduce_dtype", "shard_dims", "shard_model", "start"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    patient: dist.ProcessGroup
    """All ranks, for waits as long as the first rank's work: tokenizing may take hours."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the first rank only and give its (picklable) result, or its UserError, to all ranks."""
        box: list[T | UserError | None] = [None]
        if self.is_first:
            try:
                box[0] = work()
            except UserError as error:
                box[0] = error
            except Exception as error:  # a defect: its trace is the first rank's, but the others must not wait
                box[0] = UserError(f"the first rank failed: {error!r}")
                dist.broadcast_object_list(box, src=0, group=self.patient)
                raise
        dist.broadcast_object_list(box, src=0, group=self.patient)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T | None:
        """As ``first``, for what cannot leave the first rank: the others get None."""
        kept: list[T] = []
        self.first(lambda: kept.append(work()))
        return kept[0] if kept else None

    def each(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it raises UserError on any of them, all raise it and none waits for ever."""
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = caught
        if self.any(error is not None):
            errors: list[UserError | None] = [None] * self.world_size
            dist.all_gather_object(errors, error)
            raise next(e for e in errors if e is not None)
        return result  # type: ignore[return-value]

    def deal(
        self,
        count: int,
        work: Callable[[int], Mapping[str, Tensor]],
        like: Sequence[Mapping[str, Tensor]],  # global shape and dtype of what work(i) gives
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """``work(i)`` for i = 0 .. count - 1, each on one rank, side by side; all ranks get (i, result), in order.

        Raises UserError on all ranks if ``work`` does on one.
        """
        for start in range(0, count, self.world_size):
            own = start + self.rank
            mine = self.each(lambda own=own: work(own) if own < count else {})  # type: ignore[misc]
            for i in range(start, min(start + self.world_size, count)):
                result = {}
                for key, spec in like[i].items():
                    value = mine[key].to(spec.dtype).contiguous() if i == own else None
                    if value is None:
                        value = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                    if self.world_size > 1:
                        dist.broadcast(value, src=i - start)
                    result[key] = value
                yield i, result

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor, of equal shape on all ranks, with the first rank's."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.detach().copy_(value)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, so that all act together. No device sync: the answer travels by CPU."""
        answer = torch.tensor(int(flag))
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        dist.all_reduce(values)
        return values


@contextmanager
def start(config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """Join the ranks torchrun started (or be the only one) and lay out the mesh; leaves the group on exit.

    Raises:
        UserError: no CUDA where it was asked for, more ranks than GPUs, replicas x shards is not the world size; or,
            later, another rank died.
    """
    launched = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device)
    shards = config.shards if config.shards is not None else max(1, world_size // config.replicas)
    if config.replicas * shards != world_size:
        raise UserError(
            f"parallel.replicas={config.replicas} x parallel.shards={shards} is not the world size {world_size}; start "
            "as many ranks (torchrun --nproc-per-node), or change the two numbers to have it as their product"
        )
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    joined = not dist.is_initialized()
    with end_with_launcher(), say_lost_ranks():
        if joined and launched:
            join(backend)
        elif joined:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            mesh = _mesh(place.type, shards, config.replicas)
            patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            assert patient is not None
            yield Ranks(dist.get_rank(), world_size, place, mesh, patient)
        finally:
            if joined:
                dist.destroy_process_group()


@contextmanager
def fake_ranks(shards: int, replicas: int = 1) -> Iterator[DeviceMesh]:
    """The mesh of a group whose collectives move nothing, for counting memory: this process is its first rank.

    Raises UserError where torch has no such group, or this process is in a real one.
    """
    if dist.is_initialized():
        raise UserError("this process is in a process group already; count memory in a process of its own")
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # private: absent in some builds
    except ImportError as error:
        raise UserError(f"this torch has no process group of fake ranks ({error}); memory cannot be tracked") from None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards * replicas)  # type: ignore[no-untyped-call]
    try:
        yield _mesh("cpu", shards, replicas)
    finally:
        dist.destroy_process_group()


def _mesh(device: str, shards: int, replicas: int) -> DeviceMesh:
    if replicas > 1:
        return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    optimizer: type[optim.MatrixOptimizer],
    precision: str,
    *,
    one_group: bool = False,
) -> None:
    """FSDP2 in place: one group per decoder layer, one for the rest; matrices along the dimension the optimizer likes.

    Args:
        model: a LLaMA or OPT, on meta or with its weights; ``token_loss`` becomes a forward method of it, as is
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

    # OPT's layers end in a view; transformers never writes into it in place, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .FSDPOPTDecoderLayer. returned a view tensor")
    for layer in [] if one_group else _decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    model.token_loss = MethodType(token_loss, model)
    register_fsdp_forward_method(model, "token_loss")  # gathers the parameters as forward does
    if hasattr(model, "adapter_penalty"):
        register_fsdp_forward_method(model, "adapter_penalty")


def reduce_dtype(model: nn.Module, mesh: DeviceMesh) -> torch.dtype:
    """Of bfloat16 gradients: float32 for sums over ranks, or for float32 weights; their own where nothing is added."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32 if mesh.size() > 1 else torch.bfloat16)


def shard_dims(model: nn.Module, optimizer: type[optim.MatrixOptimizer], shards: int) -> dict[Tensor, int]:
    """Along which dimension each parameter that the optimizer knows is sharded; the others along the first."""
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
    """The whole of a (sharded) tensor; all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=cpu, or install a CUDA build of torch")
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > torch.cuda.device_count():  # asked of all ranks of a machine alike, so that none waits for another
        raise UserError(
            f"{local_ranks} ranks on a machine where torch sees {torch.cuda.device_count()} GPU(s); start fewer with "
            "torchrun --nproc-per-node, or use device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
