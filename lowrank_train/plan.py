"""What a configuration stands for, resolved once: method, layers, shapes on meta, micro-batches, mesh, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.config import methods
from lowrank_train.config.schema import Config
from lowrank_train.layers.choice import freeze_vocabulary
from lowrank_train.layers.low_rank import train_low_rank_only
from lowrank_train.layers.parametrization import Dense, Parametrization
from lowrank_train.models import build as models
from lowrank_train.peft.names import adapter_config

__all__ = ["MeshShape", "Plan"]

_TRAINED: dict[str, Callable[[PreTrainedModel], object]] = {
    "all": lambda model: None,
    "matrices": freeze_vocabulary,
    "low_rank": train_low_rank_only,
}
"""Value of ``train`` -> what takes the gradient from the other parameters."""

_OTHER_ROLES = (*methods.OTHER_ROLES, "points")
"""The roles of parameters that are neither matrices nor parts of matrices."""


class MeshShape(NamedTuple):
    """How the ranks of a run share its model."""

    shards: int
    """Ranks that share one copy."""
    replicas: int
    """Sharded copies (HSDP); with one shard each they are what DistributedDataParallel would be."""


@dataclass(frozen=True)
class Plan:
    """All that follows from a configuration and a number of ranks; made by ``Plan.of``, which checks it."""

    config: Config
    method: methods.Method
    layers: Parametrization
    """What the matrices are made of."""
    model: PreTrainedModel
    """What is trained, on meta, never sharded. Its vocabulary is the original's until ``with_model`` is given that of
    the tokenizer; an adapter's shapes depend on weights and data, and are missing until peft has built them."""
    passes: int
    """Micro-batches, which are forward passes per rank and step."""
    mesh: MeshShape

    @classmethod
    def of(cls, config: Config, *, world_size: int = 1) -> Plan:
        """Resolve a configuration.

        Args:
            config: of the run.
            world_size: ranks in all.

        Raises:
            UserError: whatever can be known wrong before any text is read: names, shapes, ranks, batch.
        """
        passes = _passes(config, world_size)
        method = methods.find(config.optimizer["name"])  # which the configuration has checked
        if config.adapter.name is not None:
            _check_adapter(config, method)
        replicas = config.parallel.replicas
        mesh = MeshShape(max(1, world_size // replicas), replicas)
        try:
            layers = method.parametrization(config.optimizer)
            model = _shaped(config, layers, models.architecture(config.model, seq_len=config.seq_len))
            plan = cls(config, method, layers, model, passes, mesh)
            plan.state_bytes()
            if config.fused_backward and config.adapter.name is None:
                plan.update_in_backward(model, plan.optimizer(model)).detach()
        except UserError:  # says itself which key it is about
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"in optimizer: {error}") from None
        return plan

    def changed(self, **settings: Any) -> Plan:
        """Return the plan with other values of keys that change neither model nor optimizer, such as micro_batch."""
        config = replace(self.config, **settings)
        return replace(self, config=config, passes=_passes(config, self.world_size))

    def with_model(self, model: PreTrainedModel) -> Plan:
        """Return the plan of the same run for a model (on meta) whose vocabulary or adapter is known by now."""
        return replace(self, model=model)

    def shapes(self, architecture: PretrainedConfig) -> PreTrainedModel:
        """Return what is trained of an architecture, on meta."""
        return _shaped(self.config, self.layers, architecture)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.mesh.shards * self.mesh.replicas

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type in which weights are kept."""
        return _weight_dtype(self.config)

    @property
    def drawn_dtype(self) -> torch.dtype:
        """The type in which initial weights are drawn or read, before they are rounded to ``weight_dtype``."""
        return _drawn_dtype(self.config)

    @property
    def optimizer_class(self) -> type[optim.MatrixOptimizer]:
        """The class of the optimizer."""
        return optim.find(self.method.optimizer)

    def optimizer(self, model: nn.Module) -> optim.MatrixOptimizer:
        """Return the optimizer as configured, for a model as it is trained. Raises ValueError for an unfit model."""
        return optim.create(self.method.optimizer, self._groups(model), **self._arguments)

    def update_in_backward(self, model: nn.Module, optimizer: optim.MatrixOptimizer) -> optim.BackwardUpdates:
        """Attach an optimizer to the backward pass of its model. Raises UserError if that cannot be."""
        config = self.config
        try:
            return optim.attach_to_backward(
                model, optimizer, accumulation_steps=self.passes, max_norm=config.clip, clip=config.clip_by
            )
        except ValueError as error:
            raise UserError(f"fused_backward=true: {error}; or set clip_by=parameter or clip=null") from None

    def state_bytes(self, *, shard: int = 0, matrices_only: bool = False) -> int:
        """Return the bytes of optimizer state that one rank holds.

        Args:
            shard: which of the ranks that share a copy.
            matrices_only: leave out embeddings, head, norms and biases.
        """
        groups = [g for g in self._groups(self.model) if not (matrices_only and g["role"] in _OTHER_ROLES)]
        return optim.predicted_state_bytes(
            self.method.optimizer, groups, world_size=self.mesh.shards, shard=shard, **self._arguments
        )

    @property
    def _arguments(self) -> dict[str, Any]:
        return self.method.optimizer_arguments(self.config.optimizer)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters by role; all but the matrices and their factors with what ``optimizer.other_...`` says."""
        groups = optim.param_groups(model)
        if self.config.weights != "full":
            for group in groups:
                group["stochastic_rounding"] = True
        for key in ("lr", "state_dtype"):
            other = self.config.optimizer.get(f"other_{key}")
            for group in groups:
                if other is not None and group["role"] in _OTHER_ROLES:
                    group[key] = other
        return groups


def _check_adapter(config: Config, method: methods.Method) -> None:
    """Refuse what can be known wrong of an adapter before there is a model."""
    name, optimizer = config.adapter.name, config.optimizer["name"]
    adapter_config(config.adapter)
    if config.model.name in models.SIZES:
        raise UserError(
            f"adapter.name={name} with model.name={config.model.name}, a size to pretrain; an adapter needs a trained "
            "model: python launch/finetune.py model=FOLDER"
        )
    if method.layers is not Dense:
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


def _passes(config: Config, world_size: int) -> int:
    """Return the forward passes per rank and step. Raises UserError for numbers that do not divide."""
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


def _shaped(config: Config, layers: Parametrization, architecture: PretrainedConfig) -> PreTrainedModel:
    """Return a model on meta with what is trained of it, and its layers."""
    model = models.skeleton(architecture, _weight_dtype(config))
    try:
        _TRAINED[config.train](model)
    except ValueError as error:
        raise UserError(str(error)) from None
    layers.convert(model)
    if config.weights == "int8":
        names = [name for g in optim.param_groups(model) if g["role"] == "matrix" for name, _ in g["params"]]
        if not names or not isinstance(layers, Dense):
            raise UserError(
                f"weights=int8 is for matrices that are trained as they are, which optimizer.name="
                f"{config.optimizer['name']} with train={config.train} does not: use weights=bfloat16 (optimizer sst "
                "has frozen_dtype=8bit)"
            )
        optim.keep_in_int8(model, names)
    return model


def _drawn_dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.precision == "float64" else torch.float32


def _weight_dtype(config: Config) -> torch.dtype:
    return _drawn_dtype(config) if config.weights == "full" else torch.bfloat16
