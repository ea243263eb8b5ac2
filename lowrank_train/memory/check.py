"""Before a run starts: will a step fit the device, and if not, what would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import check_memory
from lowrank_train.common.ranks import Ranks
from lowrank_train.common.units import show_bytes
from lowrank_train.config.schema import Config
from lowrank_train.memory.step import StepMemory, predict
from lowrank_train.plan import micro_batches, unsharded

__all__ = ["check_fits", "check_host", "device_bytes", "in_words", "setting_that_fits"]


def device_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device; None on a CPU, whose memory others share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_fits(config: Config, limit: int | None, *, world_size: int, replicas: int = 1) -> None:
    """Raise UserError, with a setting that fits, if the predicted peak exceeds ``limit`` bytes; None: no limit.

    The vocabulary is that of the original model, unless ``data.vocab_size`` says less.
    """
    if limit is None or config.adapter.name is not None:  # whose memory is not predicted
        return
    memory = predict(config, world_size=world_size, replicas=replicas)
    if memory.peak <= limit:
        return
    other = setting_that_fits(config, limit, world_size=world_size, replicas=replicas)
    remedy = f"it would fit with {other}" if other else "no micro-batch fits: take a smaller model, or more ranks"
    raise UserError(
        f"a step of this run needs {in_words(memory)} on every device, which has {show_bytes(limit)}; {remedy}"
    )


def check_host(config: Config, ranks: Ranks) -> None:
    """Refuse, before anything is built, what the memory of this machine cannot hold.

    That is what the ranks of the machine need on the CPU, if they train there, and the copies of weights and state that
    are written in the background.

    Raises:
        UserError: on all ranks, if it does not fit on one of their machines.
    """
    if config.adapter.name is not None:  # whose memory is not predicted
        return
    shards = ranks.mesh.size(ranks.mesh.ndim - 1)
    memory = predict(config, world_size=shards, replicas=ranks.world_size // shards)
    copied = memory.step.weights + memory.step.optimizer_state if config.checkpoint.asynchronous else 0
    trained = memory.peak if ranks.device.type == "cpu" else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parts = [f"{in_words(memory)} for a step"] if trained else []
    parts += [f"{show_bytes(copied)} for checkpoints in the background"] if copied else []
    alone = " and ".join(parts)
    remedy = "take a smaller model or micro_batch, or more ranks on other machines"
    smaller = "set checkpoint.asynchronous=false, " if copied else ""
    what = f"this run, with {here} rank(s) on this machine of {alone} each,"
    ranks.each(lambda: check_memory(here * (trained + copied), what, smaller + remedy))


def setting_that_fits(config: Config, limit: int, *, world_size: int, replicas: int = 1) -> str | None:
    """The mildest change of micro-batch and checkpointing, as it is typed, that keeps the peak within ``limit``."""
    model = unsharded(config)
    for candidate, change in _milder(config, world_size * replicas):
        if predict(candidate, world_size=world_size, replicas=replicas, model=model).peak <= limit:
            return change
    return None


def in_words(memory: StepMemory) -> str:
    """The peak, and its terms from the largest."""
    terms = sorted(memory.terms.items(), key=lambda term: -term[1])
    parts = ", ".join(f"{name.replace('_', ' ')} {show_bytes(size)}" for name, size in terms if size)
    return f"{show_bytes(memory.peak)} ({parts})"


def _milder(config: Config, ranks: int) -> Iterator[tuple[Config, str]]:
    """Smaller micro-batches first, then the same with checkpointing, which costs time."""
    sequences = config.tokens_per_step // config.seq_len // ranks
    present = sequences // micro_batches(config, ranks)
    sizes = [size for size in range(present, 0, -1) if sequences % size == 0]
    for size in sizes[1:]:
        yield replace(config, micro_batch=size), f"micro_batch={size}"
    if config.model.checkpointing != "full" or config.model.checkpointed_layers is not None:
        checkpointed = replace(config, model=replace(config.model, checkpointing="full", checkpointed_layers=None))
        for size in sizes:
            smaller = "" if size == present else f" micro_batch={size}"
            yield replace(checkpointed, micro_batch=size), f"model.checkpointing=full{smaller}"
