"""What a configuration stands for: shapes on meta, parameter groups, the optimizer, micro-batches, and all checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.schema import AdapterConfig, Config
from lowrank_train.layers.choice import freeze_vocabulary
from lowrank_train.layers.low_rank import train_low_rank_only
from lowrank_train.layers.parametrization import Dense, Parametrization
from lowrank_train.models import build as models
from lowrank_train.models.size import check_host_memory
from lowrank_train.peft.names import adapter_config

__all__ = ["build_optimizer", "check_settings", "micro_batches", "predicted_state_bytes", "unsharded"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of the weights by ``precision``, where ``weights`` does not say otherwise."""

_TRAINED: dict[str, Callable[[PreTrainedModel], object]] = {
    "all": lambda model: None,
    "matrices": freeze_vocabulary,
    "low_rank": train_low_rank_only,
}
"""Value of ``train`` -> what takes the gradient from the other parameters."""

_OTHER_ROLES = (*methods.OTHER_ROLES, "points")
"""Of parameters that are neither matrices nor what matrices are made of."""


def check_settings(config: Config, world_size: int, *, here: bool = True) -> None:
    """Raise UserError for what can be known wrong before any text is read: names, shapes, ranks, batch.

    ``here`` says whether the run is to start on this machine, and must fit its memory.
    """
    micro_batches(config, world_size)
    if config.adapter.name is not None:
        _check_adapter(config)
    if here:
        check_host_memory(config, world_size)
    try:
        model = unsharded(replace(config, adapter=AdapterConfig()))
        predicted_state_bytes(config, model)
        if config.fused_backward and config.adapter.name is None:
            _attached(config, model, build_optimizer(config, model), world_size).detach()
    except UserError:  # says itself which key it is about
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer: {error}") from None


def _check_adapter(config: Config) -> None:
    """What can be known before there is a model."""
    name, optimizer = config.adapter.name, config.optimizer["name"]
    adapter_config(config.adapter)
    if config.model.name in models.SIZES:
        raise UserError(
            f"adapter.name={name} with model.name={config.model.name}, a size to pretrain; an adapter needs a trained "
            "model: python launch/finetune.py model=FOLDER"
        )
    if methods.find(optimizer).layers is not Dense:
        raise UserError(
            f"adapter.name={name} with optimizer.name={optimizer}, which replaces the same layers itself; use another "
            "optimizer, such as adamw or dct_adamw"
        )
    if config.train != "all":
        raise UserError(
            f"adapter.name={name} with train={config.train}: the adapter says what is trained; leave it out"
        )
    if config.weights == "int8":
        raise UserError(
            f"weights=int8 is for matrices that are trained as they are; with adapter.name={name} use bfloat16"
        )
    if config.fused_backward and name == "adalora":
        raise UserError(
            f"fused_backward=true with adapter.name={name}, which adds to the loss of a whole step or reads its "
            "gradients; set it to false"
        )


def unsharded(config: Config) -> PreTrainedModel:
    """The shapes of what is trained, on meta, with the vocabulary of the original; no text is needed for it.

    Raises ValueError for settings of the layers that do not fit, UserError for an adapter: peft's shapes may depend on
    weights and data, and are known only when it is built (``Run.blueprint``).
    """
    if config.adapter.name is not None:
        raise UserError(
            f"the memory of a run with adapter.name={config.adapter.name} is not predicted before it is built; leave "
            "the adapter out for that of training everything"
        )
    model = models.skeleton(models.architecture(config.model, seq_len=config.seq_len), _weight_dtype(config))
    _shape(model, config, _layers(config))
    return model


def build_optimizer(config: Config, model: nn.Module) -> optim.MatrixOptimizer:
    """As configured, for a model as it is trained. Raises ValueError for settings that do not fit it."""
    name = methods.find(config.optimizer["name"]).optimizer
    return optim.create(name, _parameter_groups(config, model), **_optimizer_arguments(config))


def _attached(
    config: Config, model: nn.Module, optimizer: optim.MatrixOptimizer, world_size: int
) -> optim.BackwardUpdates:
    accumulation_steps = micro_batches(config, world_size)
    try:
        return optim.attach_to_backward(
            model, optimizer, accumulation_steps=accumulation_steps, max_norm=config.clip, clip=config.clip_by
        )
    except ValueError as error:
        raise UserError(f"fused_backward=true: {error}; or set clip_by=parameter or clip=null") from None


def micro_batches(config: Config, world_size: int) -> int:
    """Forward passes per rank and step. Raises UserError for numbers that do not divide."""
    if config.tokens_per_step % config.seq_len:
        raise UserError(
            f"tokens_per_step={config.tokens_per_step} is not a multiple of seq_len={config.seq_len}; use "
            f"{max(1, round(config.tokens_per_step / config.seq_len)) * config.seq_len}"
        )
    sequences = config.tokens_per_step // config.seq_len
    if sequences % world_size:
        per_rank = max(1, round(sequences / world_size))
        raise UserError(
            f"a step of {sequences} sequences (tokens_per_step / seq_len) does not divide by {world_size} ranks; use "
            f"tokens_per_step={per_rank * world_size * config.seq_len}"
        )
    per_rank = sequences // world_size
    micro_batch = min(config.micro_batch, per_rank)
    if per_rank % micro_batch:
        divisor = max(d for d in range(1, micro_batch + 1) if per_rank % d == 0)
        raise UserError(
            f"micro_batch={config.micro_batch} does not divide the {per_rank} sequences of a rank's step; use "
            f"micro_batch={divisor}"
        )
    return per_rank // micro_batch


def predicted_state_bytes(
    config: Config, model: nn.Module, *, matrices_only: bool = False, world_size: int = 1, shard: int = 0
) -> int:
    """Bytes of optimizer state that one rank holds.

    Args:
        config: of the run.
        model: never sharded; on meta is enough.
        matrices_only: leave out embeddings, head, norms and biases.
        world_size: ranks a parameter is sharded over.
        shard: which of them.
    """
    groups = [g for g in _parameter_groups(config, model) if not (matrices_only and g["role"] in _OTHER_ROLES)]
    name = methods.find(config.optimizer["name"]).optimizer
    return optim.predicted_state_bytes(name, groups, world_size=world_size, shard=shard, **_optimizer_arguments(config))


def _parameter_groups(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by role; all but the matrices and their factors with what ``optimizer.other_...`` says."""
    groups = optim.param_groups(model)
    if config.weights != "full":
        for group in groups:
            group["stochastic_rounding"] = True
    for key in ("lr", "state_dtype"):
        other = config.optimizer.get(f"other_{key}")
        for group in groups:
            if other is not None and group["role"] in _OTHER_ROLES:
                group[key] = other
    return groups


def _shape(model: PreTrainedModel, config: Config, layers: Parametrization) -> None:
    """What is trained of a plain model on meta, and its layers."""
    try:
        _TRAINED[config.train](model)
    except ValueError as error:
        raise UserError(str(error)) from None
    layers.convert(model)
    if config.weights == "int8":
        _keep_matrices_in_int8(model, config)


def _keep_matrices_in_int8(model: PreTrainedModel, config: Config) -> None:
    names = [name for g in optim.param_groups(model) if g["role"] == "matrix" for name, _ in g["params"]]
    if not names or methods.find(config.optimizer["name"]).layers is not Dense:
        raise UserError(
            f"weights=int8 is for matrices that are trained as they are, which optimizer.name="
            f"{config.optimizer['name']} with train={config.train} does not: use weights=bfloat16 (optimizer sst has "
            "frozen_dtype=8bit)"
        )
    optim.keep_in_int8(model, names)


def _weight_dtype(config: Config) -> torch.dtype:
    return _DTYPES[config.precision] if config.weights == "full" else torch.bfloat16


def _layers(config: Config) -> Parametrization:
    return methods.find(config.optimizer["name"]).parametrization(config.optimizer)


def _optimizer_arguments(config: Config) -> dict[str, Any]:
    """What the optimizer's constructor is given."""
    return methods.find(config.optimizer["name"]).optimizer_arguments(config.optimizer)
