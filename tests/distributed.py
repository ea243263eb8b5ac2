"""Runs a function on several ranks of one machine: forked processes, gloo, a file store.

Fork, because a spawned process would import torch again (seconds per rank): import what the function needs before the
call, and let the parent hold no process group. A file store, because ports collide.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import io
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DistributedFailure", "dumps", "run_distributed"]

_TIMEOUT_SECONDS = 60


class DistributedFailure(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(*args)`` on every rank of a new default process group; its return values, by rank.

    The function asks ``torch.distributed`` for its rank. It may be a closure; what it returns must be picklable
    (tensors are copied). The first rank to fail fails the call with its traceback, and the others are terminated.
    """
    importlib.import_module("torch._dynamo")  # half a second that sharding would take in every rank
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        workers, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(fn, args, rank, world_size, Path(folder), sender), name=f"rank {rank}", daemon=True
            )
            worker.start()
            sender.close()  # or the parent would not see the end of the pipe when the worker dies
            workers.append(worker)
            pipes.append(receiver)
        try:
            return _collect(pipes, Path(folder))
        finally:
            for worker in workers:
                worker.join(timeout=1)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + _TIMEOUT_SECONDS + 10  # the workers' own alarm comes first, and says where
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DistributedFailure(f"ranks {sorted(waiting.values())} of {len(pipes)} did not answer")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                stacks = _stacks(folder, rank)
                text = stacks.read_text() if stacks.exists() else ""
                raise DistributedFailure(f"rank {rank} of {len(pipes)} died without an answer\n{text}") from None
            if not succeeded:
                raise DistributedFailure(f"rank {rank} of {len(pipes)} raised\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _work(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, folder: Path, sender: Connection
) -> None:
    gc.freeze()  # collections, and searches for living objects, would copy every page of what was inherited
    with open(_stacks(folder, rank), "w") as stacks:
        faulthandler.dump_traceback_later(_TIMEOUT_SECONDS, exit=True, file=stacks)
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_TIMEOUT_SECONDS - 5),
            )
            value = fn(*args)
            dist.barrier()  # a rank that leaves early would break a collective the others are still in
            # Not torch's own pipes: they would share memory with a process that is about to end.
            answer = dumps((True, value))
        except BaseException:
            answer = dumps((False, traceback.format_exc()))
        # Sent before this process ends, so that its error arrives before the "connection closed" of its peers.
        sender.send_bytes(answer)
        sender.close()
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()


def dumps(value: Any) -> bytes:
    """Pickled, tensors as their bytes: torch's own way, a zip archive each, takes most of a millisecond."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided:
            return NotImplemented
        value = value.detach()
        numbers = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return _tensor, (numbers, value.dtype, tuple(value.shape))


def _tensor(numbers: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(numbers), dtype=dtype).view(shape) if numbers else torch.empty(shape, dtype=dtype)


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks-of-rank-{rank}"
