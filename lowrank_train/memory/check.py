"""Before a run starts: does it fit this machine and its devices, and if not, what would?"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import check_memory
from lowrank_train.common.ranks import Ranks
from lowrank_train.common.units import show_bytes
from lowrank_train.config.schema import Config
from lowrank_train.layers.choice import linear_layers
from lowrank_train.memory.phases import StepMemory
from lowrank_train.memory.step import not_predicted, predict
from lowrank_train.models import build as models
from lowrank_train.plan import Plan

__all__ = ["check_fits", "check_size", "check_step", "count_parameters", "setting_that_fits"]

_NUMBERS = {"full": {"float32": 4, "bfloat16": 4, "float64": 8}, "bfloat16": {"bfloat16": 2}, "int8": {"bfloat16": 1}}
"""Bytes of a weight by ``weights`` and ``precision``."""

_TOKEN = 8
"""Bytes of a token in a batch."""


def count_parameters(config: PretrainedConfig, rank: int = 0) -> int:
    """Count the elements of a model's parameters, tied ones once, whatever the number of its layers.

    Args:
        config: of the model.
        rank: of low-rank factors beside every matrix of its layers, whose elements are counted instead; 0: none.

    Raises:
        UserError: no model can be made of the configuration.
    """
    one, two = (_count(config, layers, rank) for layers in (1, 2))
    return one + (int(config.num_hidden_layers) - 1) * (two - one)


def check_size(config: Config, world_size: int) -> None:
    """Refuse, before a model is made, a run on CPUs whose weights, gradients, adapter or batch alone are too large.

    They are compared with the memory of this machine.

    Args:
        config: of the run.
        world_size: ranks, over all machines.

    Raises:
        UserError: it does not fit; says what it needs and what is available.
    """
    here = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) / world_size
    check_memory(
        int(config.tokens_per_step * _TOKEN * here),
        f"tokens_per_step={config.tokens_per_step}, which is read at once,",
        "lower it",
    )
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return  # whose memory the prediction of a step is compared with
    architecture = models.architecture(config.model, seq_len=config.seq_len)
    parameters, number = count_parameters(architecture), _NUMBERS[config.weights][config.precision]
    has_gradients = config.train == "all" and config.adapter.name is None and not config.fused_backward
    copies = config.parallel.replicas * here * (2 if has_gradients and config.optimizer.get("rank") is None else 1)
    check_memory(
        int(parameters * number * copies),
        f"model.name={config.model.name}, with {parameters:,} parameters,",
        "take a smaller model, or change model.overrides",
    )
    if config.adapter.rank is not None:
        factors = count_parameters(architecture, config.adapter.rank)
        check_memory(
            int(factors * number * here),
            f"adapter.rank={config.adapter.rank}, which makes up to {factors:,} parameters,",
            "lower it",
        )


def check_step(plan: Plan, ranks: Ranks) -> None:
    """Refuse, before anything is built, a run whose step does not fit the devices or the memory of this machine.

    Raises:
        UserError: on all ranks, if it does not fit on one of their machines; with a setting that fits the devices.
    """
    if not_predicted(plan) is not None:
        return
    memory = predict(plan)
    if ranks.device.type == "cuda":
        check_fits(plan, memory, torch.cuda.get_device_properties(ranks.device).total_memory)
    copied = memory.step.weights + memory.step.optimizer_state if plan.config.checkpoint.asynchronous else 0
    trained = memory.peak if ranks.device.type == "cpu" else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parts = [f"{memory.in_words()} for a step"] if trained else []
    parts += [f"{show_bytes(copied)} for checkpoints in the background"] if copied else []
    alone = " and ".join(parts)
    remedy = "take a smaller model or micro_batch, or more ranks on other machines"
    smaller = "set checkpoint.asynchronous=false, " if copied else ""
    what = f"this run, with {here} rank(s) on this machine of {alone} each,"
    ranks.each(lambda: check_memory(here * (trained + copied), what, smaller + remedy))


def check_fits(plan: Plan, memory: StepMemory, limit: int) -> None:
    """Raise UserError, with a setting that fits, if the predicted peak of a step exceeds ``limit`` bytes.

    The vocabulary is that of the original model, unless ``data.vocab_size`` says less.
    """
    if memory.peak <= limit:
        return
    other = setting_that_fits(plan, limit)
    remedy = f"it would fit with {other}" if other else "no micro-batch fits: take a smaller model, or more ranks"
    raise UserError(
        f"a step of this run needs {memory.in_words()} on every device, which has {show_bytes(limit)}; {remedy}"
    )


def setting_that_fits(plan: Plan, limit: int) -> str | None:
    """Return the mildest change of micro-batch and checkpointing, as it is typed, with a peak of at most ``limit``."""
    return next((change for candidate, change in _milder(plan) if predict(candidate).peak <= limit), None)


def _milder(plan: Plan) -> Iterator[tuple[Plan, str]]:
    """Smaller micro-batches first, then the same with checkpointing, which costs time."""
    config = plan.config
    sequences = config.tokens_per_step // config.seq_len // plan.world_size
    present = sequences // plan.passes
    sizes = [size for size in range(present, 0, -1) if sequences % size == 0]
    for size in sizes[1:]:
        yield plan.changed(micro_batch=size), f"micro_batch={size}"
    if config.model.checkpointing != "full" or config.model.checkpointed_layers is not None:
        checkpointed = plan.changed(model=replace(config.model, checkpointing="full", checkpointed_layers=None))
        for size in sizes:
            smaller = "" if size == present else f" micro_batch={size}"
            yield checkpointed.changed(micro_batch=size), f"model.checkpointing=full{smaller}"


def _count(config: PretrainedConfig, layers: int, rank: int) -> int:
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small)
    except Exception as error:  # transformers checks values by raising many kinds
        raise UserError(f"model.overrides make no model: {type(error).__name__}: {error}") from None
    if rank:
        return sum(rank * sum(linear.weight.shape) for linear in linear_layers(model).values())
    return sum(param.numel() for param in model.parameters())
