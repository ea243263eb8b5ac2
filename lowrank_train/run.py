"""A run: everything it consists of, built from the configuration, saved and restored as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import optim
from lowrank_train import methods, models, parallel
from lowrank_train.adapted_model import AdaptedModel, adapt
from lowrank_train.adapter_data import needs_data
from lowrank_train.adapter_names import adapter_config
from lowrank_train.checkpoint import Checkpoints
from lowrank_train.config import AdapterConfig, Config
from lowrank_train.data import Data, prepare_data
from lowrank_train.embeddings import rows_needed
from lowrank_train.errors import UserError
from lowrank_train.layer_choice import freeze_vocabulary
from lowrank_train.low_rank_linear import train_low_rank_only
from lowrank_train.model_size import check_host_memory
from lowrank_train.parallel import Ranks
from lowrank_train.parametrization import Dense, Parametrization
from lowrank_train.recompute import checkpoint_layers

__all__ = [
    "Progress",
    "Run",
    "build_optimizer",
    "build_run",
    "check_settings",
    "micro_batches",
    "predicted_state_bytes",
    "unsharded",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of the weights by ``precision``, where ``weights`` does not say otherwise."""


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
    in_backward: optim.BackwardUpdates | None
    """What makes the updates, if they are fused into backward."""
    settings: list[dict[str, Any]]
    """Hyperparameters of each parameter group as configured."""
    checkpoints: Checkpoints
    progress: Progress
    adapted: AdaptedModel | None = None
    """The adapter, if there is one."""

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        extra = {
            "progress": asdict(self.progress),
            "data": self.data.train.state_dict(),
            "random": _random_state(self.ranks),
        }
        if self.adapted is not None and self.adapted.budget is not None:
            extra["budget"] = self.adapted.budget.state_dict()
        self.checkpoints.save(self.progress.step, self.model, self.optimizer, extra, self.about)

    def check_finite(self) -> None:
        """Raise Diverged on all ranks if a weight is not finite on one of them, and name its parameter."""
        self.checkpoints.check_finite(self.progress.step, {"model": self.model.state_dict()})

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now."""
        extra = self.checkpoints.load(checkpoint, self.model, self.optimizer, self.about)
        self.progress = Progress(**extra["progress"])
        self.data.train.load_state_dict(extra["data"])
        _set_random_state(extra["random"], self.ranks)
        if self.adapted is not None and self.adapted.budget is not None:
            self.adapted.budget.load_state_dict(extra.get("budget", {}))
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
        kept = {} if self.config.weights == "full" else {"weights": self.config.weights}
        adapter = {} if self.config.adapter.name is None else {"adapter": asdict(self.config.adapter)}
        return {"optimizer.name": name, **layers, **adapter, **trained, **kept, "model": model, **self.data.identity}

    def set_learning_rate(self, factor: float) -> None:
        """Give every group its configured hyperparameters, the learning rate times ``factor``."""
        for group, configured in zip(self.optimizer.param_groups, self.settings, strict=True):
            group.update(configured, lr=configured["lr"] * factor)


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


def build_run(config: Config, ranks: Ranks) -> Run:
    """Tokens, model, shards, weights, optimizer. Raises UserError for whatever of them cannot be had."""
    folder = Path(str(config.run_dir))
    data = prepare_data(config, ranks, Path(config.data.folder or folder / "data"))
    ids = {key: getattr(data.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rows, original = rows_needed(data.tokenizer)
    architecture = models.architecture(
        config.model, vocab_size=rows, original_vocab_size=original, seq_len=config.seq_len, **ids
    )

    # shapes, then shards, then weights
    if config.adapter.name is not None:
        return _build_adapted(config, ranks, folder, data, architecture)
    name, layers = methods.find(config.optimizer["name"]).optimizer, _layers(config)
    plain = models.skeleton(architecture, _DTYPES[config.precision])  # drawn or read in full, and then rounded
    blueprint, model = (models.skeleton(architecture, _weight_dtype(config)) for _ in range(2))
    for shapes in (blueprint, model):
        _shape(shapes, config, layers)
    parallel.shard_model(model, ranks.mesh, optim.find(name), config.precision)
    if config.model.name in models.SIZES:
        models.initialize(model, plain, layers, ranks, config.seed)
    else:
        models.load_weights(model, plain, config.model.name, layers, ranks)
    return _complete(config, ranks, folder, data, model, blueprint, layers)


def _build_adapted(config: Config, ranks: Ranks, folder: Path, data: Data, architecture: PretrainedConfig) -> Run:
    """Weights, adapter, shards: peft needs the weights before it can build anything."""
    plain, model = (models.skeleton(architecture, _DTYPES[config.precision]) for _ in range(2))
    models.load_weights(model, plain, config.model.name, Dense(), ranks)
    model.config._name_or_path = config.model.name  # for those the adapter is given to
    position = data.train.state_dict()
    batches: list[Tensor] = []
    if needs_data(adapter_config(config.adapter)):
        blocks = data.train.take(config.adapter.sequences, 0, 1)  # the same on every rank
        data.train.load_state_dict(position)
        batches = list(blocks.split(min(config.micro_batch, len(blocks))))
    adapted = adapt(
        model,
        config.adapter,
        batches=batches,
        ranks=ranks,
        seed=config.seed,
        steps=config.steps,
        dtype=_weight_dtype(config),
        compute_dtype=getattr(torch, config.precision),
        initial=folder / "adapter_initial",
    )
    optimizer = methods.find(config.optimizer["name"]).optimizer
    parallel.shard_model(model, ranks.mesh, optim.find(optimizer), config.precision, one_group=adapted.one_group)
    try:
        run = _complete(config, ranks, folder, data, model, adapted.blueprint.get_base_model(), Dense())
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer, with adapter.name={config.adapter.name}: {error}") from None
    run.adapted = adapted
    return run


def _complete(
    config: Config,
    ranks: Ranks,
    folder: Path,
    data: Data,
    model: PreTrainedModel,
    blueprint: PreTrainedModel,
    layers: Parametrization,
) -> Run:
    """What a run has beside a sharded model with its weights."""
    checkpoint_layers(model, config.model)
    model.train()
    optimizer = build_optimizer(config, model)
    in_backward = _attached(config, model, optimizer, ranks.world_size) if config.fused_backward else None
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    checkpoints = Checkpoints(
        folder / "checkpoints", ranks, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
    )
    torch.manual_seed(config.seed + ranks.rank)
    return Run(
        config, ranks, folder, data, model, blueprint, layers, optimizer, in_backward, settings, checkpoints, Progress()
    )


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
