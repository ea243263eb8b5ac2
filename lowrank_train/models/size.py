"""The size of a model before it is built: parameters counted from two of its layers, against this host's memory."""

from __future__ import annotations

import copy
import os

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import check_memory
from lowrank_train.config.schema import Config
from lowrank_train.layers.choice import linear_layers
from lowrank_train.models import build as models

__all__ = ["check_host_memory", "count_parameters"]

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


def check_host_memory(config: Config, world_size: int) -> None:
    """Refuse a run on CPUs whose weights, gradients, adapter or batch alone exceed this host's memory.

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
