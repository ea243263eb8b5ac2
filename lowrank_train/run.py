"""A run: everything it consists of, built from the configuration, saved and restored as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import optim
from lowrank_train import methods, models, parallel
from lowrank_train.checkpoint import Checkpoints
from lowrank_train.config import Config
from lowrank_train.data import Data, prepare_data
from lowrank_train.errors import UserError
from lowrank_train.layer_choice import freeze_vocabulary
from lowrank_train.low_rank_linear import train_low_rank_only
from lowrank_train.parallel import Ranks
from lowrank_train.parametrization import Parametrization

__all__ = ["Progress", "Run", "build_run", "check_settings", "micro_batches", "predicted_state_bytes", "unsharded"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of the weights; bfloat16 is the dtype of the arithmetic only."""


_TRAINED: dict[str, Callable[[PreTrainedModel], object]] = {
    "all": lambda model: None,
    "matrices": freeze_vocabulary,
    "low_rank": train_low_rank_only,
}
"""Value of ``train`` -> what takes the gradient from the other parameters."""

_OTHER_ROLES = ("embedding", "head", "vector", "points")
"""Of parameters that are neither matrices nor what matrices are made of."""

_NOT_ARCHITECTURE = {"dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"}
"""Keys of a Hugging Face configuration that do not change what a model computes."""


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    train_loss: float | None = None
    initial_validation_loss: float | None = None
    validation_loss: float | None = None
    validation_step: int | None = None
    peak_memory_gib: float = 0.0


@dataclass
class Run:
    """Everything a run consists of, built once."""

    config: Config
    ranks: Ranks
    folder: Path
    data: Data
    model: PreTrainedModel
    blueprint: PreTrainedModel
    """The model's shapes, on meta, never sharded."""
    layers: Parametrization
    """What its matrices are made of."""
    optimizer: optim.MatrixOptimizer
    settings: list[dict[str, Any]]
    """Hyperparameters of each parameter group as configured."""
    checkpoints: Checkpoints
    progress: Progress

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        extra = {
            "progress": asdict(self.progress),
            "data": self.data.train.state_dict(),
            "random": _random_state(self.ranks),
        }
        self.checkpoints.save(self.progress.step, self.model, self.optimizer, extra, self.about)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now."""
        extra = self.checkpoints.load(checkpoint, self.model, self.optimizer, self.about)
        self.progress = Progress(**extra["progress"])
        self.data.train.load_state_dict(extra["data"])
        _set_random_state(extra["random"], self.ranks)
        self.set_learning_rate(1.0)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        architecture = self.model.config
        model = {key: value for key, value in architecture.to_dict().items() if key not in _NOT_ARCHITECTURE}
        model = {"model_type": architecture.model_type, **model}  # first, because the first difference is shown
        name = self.config.optimizer["name"]
        layers = {f"optimizer.{key}": value for key, value in methods.find(name).layer_settings(self.config.optimizer)}
        trained = {} if self.config.train == "all" else {"train": self.config.train}
        return {"optimizer.name": name, **layers, **trained, "model": model, **self.data.description}

    def set_learning_rate(self, factor: float) -> None:
        """Give every group its configured hyperparameters, the learning rate times ``factor``."""
        for group, configured in zip(self.optimizer.param_groups, self.settings, strict=True):
            group.update(configured, lr=configured["lr"] * factor)


def check_settings(config: Config, world_size: int) -> None:
    """Raise UserError for what can be known wrong before any text is read: names, shapes, ranks, batch."""
    micro_batches(config, world_size)
    try:
        predicted_state_bytes(config, unsharded(config))
    except UserError:  # says itself which key it is about
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer: {error}") from None


def unsharded(config: Config) -> PreTrainedModel:
    """The shapes of what is trained, on meta, with the vocabulary of the original; no text is needed for it.

    Raises ValueError for settings of the layers that do not fit.
    """
    model = models.skeleton(models.architecture(config.model, seq_len=config.seq_len), _DTYPES[config.precision])
    _shape(model, config, _layers(config))
    return model


def build_run(config: Config, ranks: Ranks) -> Run:
    """Tokens, model, shards, weights, optimizer. Raises UserError for whatever of them cannot be had."""
    folder = Path(str(config.run_dir))
    data = prepare_data(config, ranks, Path(config.data.folder or folder / "data"))
    ids = {key: getattr(data.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    architecture = models.architecture(config.model, vocab_size=len(data.tokenizer), seq_len=config.seq_len, **ids)

    # shapes, then shards, then weights
    name, layers = methods.find(config.optimizer["name"]).optimizer, _layers(config)
    plain, blueprint, model = (models.skeleton(architecture, _DTYPES[config.precision]) for _ in range(3))
    for shapes in (blueprint, model):
        _shape(shapes, config, layers)
    parallel.shard_model(model, ranks.mesh, optim.find(name), config.precision)
    if config.model.name in models.SIZES:
        models.initialize(model, plain, layers, ranks, config.seed)
    else:
        models.load_weights(model, plain, config.model.name, layers, ranks)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    optimizer = optim.create(name, _parameter_groups(config, model), **_optimizer_arguments(config))
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    checkpoints = Checkpoints(
        folder / "checkpoints", ranks, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
    )
    torch.manual_seed(config.seed + ranks.rank)
    return Run(config, ranks, folder, data, model, blueprint, layers, optimizer, settings, checkpoints, Progress())


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
    """Parameters by role; all but the matrices and their factors at ``optimizer.other_lr``, if it is given."""
    groups = optim.param_groups(model)
    other_lr = config.optimizer.get("other_lr")
    if other_lr is not None:
        for group in groups:
            if group["role"] in _OTHER_ROLES:
                group["lr"] = other_lr
    return groups


def _shape(model: PreTrainedModel, config: Config, layers: Parametrization) -> None:
    """What is trained of a plain model on meta, and its layers."""
    try:
        _TRAINED[config.train](model)
    except ValueError as error:
        raise UserError(str(error)) from None
    layers.convert(model)


def _layers(config: Config) -> Parametrization:
    return methods.find(config.optimizer["name"]).parametrization(config.optimizer)


def _optimizer_arguments(config: Config) -> dict[str, Any]:
    """What the optimizer's constructor is given."""
    return methods.find(config.optimizer["name"]).optimizer_arguments(config.optimizer)


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {f"cpu_{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"cuda_{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(saved: dict[str, Tensor], ranks: Ranks) -> None:
    """Continue this rank's random numbers; a rank the checkpoint did not have keeps its fresh seed."""
    if f"cpu_{ranks.rank}" in saved:
        torch.set_rng_state(saved[f"cpu_{ranks.rank}"])
    if ranks.device.type == "cuda" and f"cuda_{ranks.rank}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_{ranks.rank}"], ranks.device)
