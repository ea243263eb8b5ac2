"""How ranks find each other, also when torchrun starts them again, and what they do when the others are gone.

torchrun's store outlives an attempt: a rank that is started again finds the addresses of ranks that are dead. Its
restart counter cannot tell attempts apart, because the nodes of a job count differently. So the first rank gives each
attempt a name, and a rank that asks for the name proves that it is alive.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lowrank_train.common.errors import UserError, first_line

__all__ = ["attempt_store", "end_with_launcher", "join", "say_lost_ranks"]

_TIMEOUT = timedelta(minutes=30)
"""The time within which all ranks must appear; that of a collective of gloo."""

_POLL_SECONDS = 0.5
_LOST = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|NCCL|remote process|Socket", flags=re.DOTALL
)


def join(backend: str) -> None:
    """Make the default process group of the ranks that a launcher started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # srun or mpirun: nothing is started again in the same store
        dist.init_process_group(backend)
        return
    rendezvous = dist.rendezvous("env://", timeout=_TIMEOUT)  # type: ignore[attr-defined]
    store, rank, world_size = next(rendezvous)
    store.set_timeout(_TIMEOUT)
    dist.init_process_group(backend, store=attempt_store(store, rank, world_size), rank=rank, world_size=world_size)


def attempt_store(store: Any, rank: int, world_size: int) -> Any:
    """Return a part of the store that no earlier attempt has written to; all ranks must call.

    A rank writes a fresh number beside its name, and takes only an answer that repeats this number. What earlier
    attempts left is answered too, which does no harm.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        waiting, answered = set(range(1, world_size)), dict[int, str]()
        while waiting:
            for other in sorted(waiting):
                asked = f"attempt/asks/{other}"
                if store.check([asked]):
                    number = store.get(asked).decode()
                    if answered.get(other) != number:
                        store.set(f"attempt/answer/{other}/{number}", own)
                        answered[other] = number
                if store.check([f"attempt/{own}/{other}"]):
                    waiting.discard(other)
            if waiting:
                time.sleep(0.02)
        return _part(store, own)
    store.set(f"attempt/asks/{rank}", own)
    name = store.get(f"attempt/answer/{rank}/{own}").decode()  # waits
    store.set(f"attempt/{name}/{rank}", "here")
    return _part(store, name)


def _part(store: Any, attempt: str) -> Any:
    return dist.PrefixStore(f"attempt/{attempt}/group", store)  # type: ignore[attr-defined]


@contextmanager
def say_lost_ranks() -> Iterator[None]:
    """Turn the error of a collective whose peer has died, or hangs, into one message.

    Raises:
        UserError: the connection to another rank was lost.
    """
    try:
        yield
    except RuntimeError as error:
        known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
        if isinstance(error, UserError) or not (isinstance(error, known) or _LOST.search(str(error))):
            raise
        cause = re.sub(r"\[\S*/\w+\.cc:\d+\] *", "", first_line(error)).split(". ")[0]
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} lost the connection to another rank, which ended or hangs ({cause}); "
            "its own message, or that of the launcher, says why. The same command resumes from the last checkpoint"
        ) from None


@contextmanager
def end_with_launcher() -> Iterator[None]:
    """Stop this rank if torchrun dies without stopping it.

    It is sent SIGTERM then: a training finishes its step and writes a checkpoint, anything else ends at once. What
    still waits after the time that a collective may take, waits for ranks that are gone, and is ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    launcher, done = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == launcher:
            if done.wait(_POLL_SECONDS):
                return
        if os.environ.get("LOCAL_RANK") == "0":
            with suppress(OSError):
                os.write(2, b"\ntorchrun has ended without its ranks; they stop\n")
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(_TIMEOUT.total_seconds()):
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with launcher").start()
    try:
        yield
    finally:
        done.set()
