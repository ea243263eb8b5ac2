"""The ranks of a run: the process group, its mesh, and what all ranks do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowrank_train.common.errors import UserError
from lowrank_train.common.rendezvous import end_with_launcher, join, say_lost_ranks

__all__ = ["Ranks", "start"]

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

    @property
    def replicas(self) -> int:
        """Sharded copies of the model, of which each keeps the same."""
        return self.mesh.size(0) if self.mesh.ndim > 1 else 1

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
        """Do the same as ``first`` for a result that cannot leave the first rank: the others get None."""
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
        """Run ``work(i)`` for i = 0 .. count - 1, each on one rank, side by side; all ranks get (i, result), in order.

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
        """Return whether the flag is set on any rank, so that all act together.

        No device sync: the answer travels by CPU.
        """
        answer = torch.tensor(int(flag))
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        dist.all_reduce(values)
        return values


@contextmanager
def start(device: str, shards: int | None = None, replicas: int = 1) -> Iterator[Ranks]:
    """Join the ranks torchrun started (or be the only one) and lay out the mesh; leaves the group on exit.

    Raises:
        UserError: no CUDA where it was asked for, more ranks than GPUs, replicas x shards is not the world size; or,
            later, another rank died.
    """
    launched = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device)
    shards = max(1, world_size // replicas) if shards is None else shards
    if replicas * shards != world_size:
        raise UserError(
            f"parallel.replicas={replicas} x parallel.shards={shards} is not the world size {world_size}; start "
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
            mesh = _mesh(place.type, shards, replicas)
            patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            assert patient is not None
            yield Ranks(dist.get_rank(), world_size, place, mesh, patient)
        finally:
            if joined:
                dist.destroy_process_group()


def _mesh(device: str, shards: int, replicas: int) -> DeviceMesh:
    if replicas > 1:
        return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))


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
