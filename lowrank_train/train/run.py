"""A run: everything it consists of, built from the configuration, saved and restored as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import Config
from lowrank_train.data.tokens import Data, prepare_data
from lowrank_train.memory.phases import StepMemory
from lowrank_train.memory.step import not_predicted, predict
from lowrank_train.models import build as models
from lowrank_train.models import fsdp
from lowrank_train.models.embeddings import rows_needed
from lowrank_train.models.recompute import checkpoint_layers
from lowrank_train.peft.data import needs_data
from lowrank_train.peft.model import AdaptedModel, adapt
from lowrank_train.peft.names import adapter_config
from lowrank_train.plan import Plan
from lowrank_train.train.checkpoint import Checkpoints
from lowrank_train.train.notes import data_notes, model_notes
from lowrank_train.train.training import Training

__all__ = ["Progress", "Run"]

_NOT_ARCHITECTURE = {"dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"}
"""Keys of a Hugging Face configuration that do not change what a model computes."""


@dataclass
class Progress:
    """The position of a run, which every checkpoint holds."""

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
class Run(Training):
    """Everything a run consists of, built once."""

    exported = "huggingface"
    to_train_on = ", or raise steps to train on"
    to_need_less = "lower checkpoint.keep"

    plan: Plan
    """What the configuration stands for; its model has the shapes of ``model``, on meta, never sharded."""
    ranks: Ranks
    folder: Path
    data: Data
    model: PreTrainedModel
    optimizer: optim.MatrixOptimizer
    in_backward: optim.BackwardUpdates | None
    """What makes the updates, if they are fused into backward."""
    settings: list[dict[str, Any]]
    """Hyperparameters of each parameter group as configured."""
    checkpoints: Checkpoints
    progress: Progress
    adapted: AdaptedModel | None = None
    """The adapter, if there is one."""

    @classmethod
    def build(cls, plan: Plan, ranks: Ranks) -> Run:
        """Make tokens, model, shards, weights and optimizer. Raises UserError for whatever of them cannot be had."""
        config, folder = plan.config, Path(str(plan.config.run_dir))
        data = prepare_data(config, ranks, Path(config.data.folder or folder / "data"))
        ids = {key: getattr(data.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        rows, original = rows_needed(data.tokenizer)
        architecture = models.architecture(
            config.model, vocab_size=rows, original_vocab_size=original, seq_len=config.seq_len, **ids
        )

        # shapes, then shards, then weights
        if config.adapter.name is not None:
            return _build_adapted(plan, ranks, folder, data, architecture)
        plain = models.skeleton(architecture, plan.drawn_dtype)
        plan, model = plan.with_model(plan.shapes(architecture)), plan.shapes(architecture)
        fsdp.shard_model(model, ranks.mesh, plan.optimizer_class, config.precision)
        if config.model.name in models.SIZES:
            models.initialize(model, plain, plan.layers, ranks, config.seed)
        else:
            models.load_weights(model, plain, config.model.name, plan.layers, ranks)
        return _complete(plan, ranks, folder, data, model)

    @property
    def config(self) -> Config:
        """The configuration, as given."""
        return self.plan.config

    @property
    def steps(self) -> int:
        """The number of steps, as configured."""
        return self.config.steps

    @property
    def done(self) -> int:
        """The number of steps that are done, with those that changed nothing."""
        return self.progress.step

    def progress_state(self) -> dict[str, Any]:
        """Return progress, the position in the data, and AdaLoRA's budget."""
        state = {"progress": asdict(self.progress), "data": self.data.train.state_dict()}
        budget = None if self.adapted is None else self.adapted.budget
        return state if budget is None else {**state, "budget": budget.state_dict()}

    def load_progress(self, saved: dict[str, Any]) -> None:
        """Continue from what ``progress_state`` returned."""
        self.progress = Progress(**saved["progress"])
        self.data.train.load_state_dict(saved["data"])
        if self.adapted is not None and self.adapted.budget is not None:
            self.adapted.budget.load_state_dict(saved.get("budget", {}))

    @cached_property
    def predicted(self) -> StepMemory | None:
        """What a step needs on this rank; None where activations are not known."""
        return None if not_predicted(self.plan) else predict(self.plan, shard=self.shard)

    @property
    def predicted_bytes(self) -> int | None:
        """The peak of ``predicted``."""
        return None if self.predicted is None else self.predicted.peak

    @property
    def shard(self) -> int:
        """Which of the ranks that share a copy of the model this is."""
        return self.ranks.rank % self.plan.mesh.shards

    @property
    def trained_parameters(self) -> int:
        """The number of parameters that are not frozen."""
        return sum(param.numel() for param in self.model.parameters() if param.requires_grad)

    def greeting(self) -> str:
        """Return which model is trained."""
        return f"{self.config.model.name}: {models.parameter_count(self.model):,} parameters"

    def notes(self) -> list[str]:
        """Return what is trained, what a step needs, and notes on the data and the model."""
        known = self.predicted
        about = [f"a step will need {known.in_words()} on rank 0" if known else str(not_predicted(self.plan))]
        if self.adapted is not None:
            trained, whole = self.trained_parameters, models.parameter_count(self.model)
            share = f"{trained:,} of {whole:,} parameters are trained ({100 * trained / whole:.3g} %)"
            about.insert(0, f"adapter {self.config.adapter.name}: {share}")
        of_data = [*self.data.notes, *data_notes(self.config, self.data.description)]
        return [*about, *of_data, *model_notes(self.config, self.model)]

    def check_finite(self) -> None:
        """Raise Diverged on all ranks if a weight is not finite on one of them, and name its parameter."""
        self.checkpoints.check_finite(self.progress.step, {"model": self.model.state_dict()})

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        architecture = self.model.config
        model = {key: value for key, value in architecture.to_dict().items() if key not in _NOT_ARCHITECTURE}
        model = {"model_type": architecture.model_type, **model}  # first, because the first difference is shown
        trained = {} if self.config.train == "all" else {"train": self.config.train}
        kept = {} if self.config.weights == "full" else {"weights": self.config.weights}
        adapter = {} if self.config.adapter.name is None else {"adapter": asdict(self.config.adapter)}
        named = self.plan.method.about(self.config.optimizer)
        return {**named, **adapter, **trained, **kept, "model": model, **self.data.identity}

    def set_learning_rate(self, factor: float) -> None:
        """Give every group its configured hyperparameters, the learning rate times ``factor``."""
        for group, configured in zip(self.optimizer.param_groups, self.settings, strict=True):
            group.update(configured, lr=configured["lr"] * factor)


def _build_adapted(plan: Plan, ranks: Ranks, folder: Path, data: Data, architecture: PretrainedConfig) -> Run:
    """Weights, adapter, shards: peft needs the weights before it can build anything."""
    config = plan.config
    plain, model = (models.skeleton(architecture, plan.drawn_dtype) for _ in range(2))
    models.load_weights(model, plain, config.model.name, plan.layers, ranks)
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
        dtype=plan.weight_dtype,
        compute_dtype=getattr(torch, config.precision),
        initial=folder / "adapter_initial",
    )
    fsdp.shard_model(model, ranks.mesh, plan.optimizer_class, config.precision, one_group=adapted.one_group)
    try:
        run = _complete(plan.with_model(adapted.blueprint.get_base_model()), ranks, folder, data, model)
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer, with adapter.name={config.adapter.name}: {error}") from None
    run.adapted = adapted
    return run


def _complete(plan: Plan, ranks: Ranks, folder: Path, data: Data, model: PreTrainedModel) -> Run:
    """Return what a run has beside a sharded model with its weights."""
    config = plan.config
    checkpoint_layers(model, config.model)
    model.train()
    optimizer = plan.optimizer(model)
    in_backward = plan.update_in_backward(model, optimizer) if config.fused_backward else None
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    kept = config.checkpoint
    checkpoints = Checkpoints(
        folder / "checkpoints", ranks, every=kept.every, keep=kept.keep, asynchronous=kept.asynchronous
    )
    torch.manual_seed(config.seed + ranks.rank)
    return Run(plan, ranks, folder, data, model, optimizer, in_backward, settings, checkpoints, Progress())
