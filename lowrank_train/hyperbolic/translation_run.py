"""Everything a translation run consists of, built from its configuration, saved and restored as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import optim
from lowrank_train import methods
from lowrank_train.checkpoint import Checkpoints
from lowrank_train.errors import UserError
from lowrank_train.hyperbolic.recipes import build_method
from lowrank_train.hyperbolic.translation_config import TranslationConfig
from lowrank_train.hyperbolic.translation_data import (
    Batch,
    TranslationData,
    batches,
    load_translation_data,
    padded,
)
from lowrank_train.hyperbolic.translator import LINEAR_MAPS, SPACES, Translator
from lowrank_train.parallel import Ranks
from lowrank_train.parametrization import Parametrization
from lowrank_train.schedule import learning_rate_factor

__all__ = ["TranslationProgress", "TranslationRun", "build_translation_run", "load_translator"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

_OTHER_ROLES = ("embedding", "head", "vector")


@dataclass
class TranslationProgress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    seconds: float = 0.0
    validation_loss: float | None = None
    """The last one computed, nats per token."""


@dataclass
class TranslationRun:
    """Built once."""

    config: TranslationConfig
    folder: Path
    data: TranslationData
    network: Translator
    layers: Parametrization
    """What its linear maps are made of."""
    optimizer: optim.MatrixOptimizer
    checkpoints: Checkpoints
    rates: list[float]
    """Of each parameter group as configured."""
    progress: TranslationProgress = field(default_factory=TranslationProgress)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.config.steps

    def training_batches(self) -> Iterator[Batch]:
        """From where the run stands, without an end; ``progress`` says what has been taken."""
        pairs, tokens = self.data.parts["train"], self.config.data.batch_tokens
        while True:
            order = batches(pairs, tokens=tokens, seed=self.config.seed, epoch=self.progress.epoch)
            while self.progress.batch < len(order):
                self.progress.batch += 1
                yield padded(pairs, order[self.progress.batch - 1], self.data.end)
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def epochs(self) -> float:
        """Passes over the training part."""
        pairs, tokens = self.data.parts["train"], self.config.data.batch_tokens
        count = len(batches(pairs, tokens=tokens, seed=self.config.seed, epoch=self.progress.epoch))
        return self.progress.epoch + self.progress.batch / count

    def set_learning_rate(self) -> float:
        """Of every group, for the step that comes; returns that of the linear maps."""
        factor = learning_rate_factor(self.config.schedule, self.config.steps)(self.progress.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return float(self.optimizer.defaults["lr"]) * factor

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        extra = {"progress": asdict(self.progress), "random": {"cpu": torch.get_rng_state()}}
        self.checkpoints.save(self.progress.step, self.network, self.optimizer, extra, self.about)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now."""
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        extra = self.checkpoints.load(checkpoint, self.network, self.optimizer, self.about)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        self.progress = TranslationProgress(**extra["progress"])
        torch.set_rng_state(extra["random"]["cpu"])

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        name = self.config.optimizer["name"]
        layers = {f"optimizer.{key}": value for key, value in methods.find(name).layer_settings(self.config.optimizer)}
        data = {
            f"data.{key}": value
            for key, value in asdict(self.config.data).items()
            if key not in ("folder", "tokenizer_folder")
        }
        return {"optimizer.name": name, **layers, "model": asdict(self.config.model), **data, "sha1": self.data.sha1}


def build_translation_run(config: TranslationConfig, ranks: Ranks) -> TranslationRun:
    """Pairs, tokenizer, network, layers, optimizer.

    Raises:
        UserError: whatever of them cannot be had.
    """
    data, model, folder = config.data, config.model, Path(str(config.run_dir))
    torch.manual_seed(config.seed)
    SPACES[model.geometry](model.curvature, model.max_time)  # raises now rather than after the tokenizer is trained
    pairs = load_translation_data(
        data.folder,
        data.source,
        data.target,
        vocab_size=data.vocab_size,
        places=model.places,
        tokenizer_folder=Path(data.tokenizer_folder or folder / "tokenizer"),
    )
    network = _network({**asdict(model), "words": len(pairs.tokenizer)}).to(_DTYPES[config.precision])
    arguments = {key: value for key, value in config.optimizer.items() if key not in ("other_lr", "points_lr")}
    rates = {}
    if config.optimizer.get("other_lr") is not None:
        rates = dict.fromkeys(_OTHER_ROLES, config.optimizer["other_lr"])
    if config.optimizer.get("points_lr") is not None:
        rates["points"] = config.optimizer["points_lr"]
    layers, optimizer = build_method(network, arguments, LINEAR_MAPS, rates)
    checkpoints = Checkpoints(folder / "checkpoints", ranks, keep=2, asynchronous=False)
    torch.manual_seed(config.seed)  # dropout is the same for all methods
    configured = [float(group["lr"]) for group in optimizer.param_groups]
    return TranslationRun(config, folder, pairs, network, layers, optimizer, checkpoints, configured)


def network_arguments(run: TranslationRun) -> dict[str, Any]:
    """What ``load_translator`` builds it from, beside the weights."""
    return {**asdict(run.config.model), "words": len(run.data.tokenizer)}


def load_translator(folder: Path) -> Translator:
    """The trained, plain network (``nn.Linear`` throughout) that a finished run left in its folder, for evaluation.

    Raises UserError if there is none.
    """
    try:
        saved = torch.load(folder / "network.pt", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {folder / 'network.pt'}: {error}; expected the run_dir of a finished run"
        ) from None
    network = _network(saved["network"]).to(_DTYPES[saved["precision"]])
    state: dict[str, Tensor] = saved["state"]
    network.load_state_dict(state)
    return network.eval()


def _network(about: dict[str, Any]) -> Translator:
    rest = {key: value for key, value in about.items() if key not in ("geometry", "curvature", "max_time", "words")}
    return Translator(SPACES[about["geometry"]](about["curvature"], about["max_time"]), about["words"], **rest)
