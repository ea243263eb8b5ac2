"""Everything a translation run consists of, built from its configuration, saved and restored as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_train.common.ranks import Ranks
from lowrank_train.config.methods import OTHER_ROLES
from lowrank_train.hyperbolic.recipes import build_method
from lowrank_train.hyperbolic.run import DTYPES, NetworkRun, Progress, load_saved, saved_model
from lowrank_train.hyperbolic.translation.config import TranslationConfig, TranslationModelConfig
from lowrank_train.hyperbolic.translation.data import Batch, TranslationData, batches, load_translation_data, padded
from lowrank_train.hyperbolic.translation.network import LINEAR_MAPS, Translator
from lowrank_train.train.checkpoint import Checkpoints
from lowrank_train.train.schedule import learning_rate_factor

__all__ = ["TranslationRun", "build_translation_run", "load_translator"]


@dataclass
class TranslationProgress(Progress):
    """Of steps."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    validation_loss: float | None = None
    """The last one computed, nats per token."""


@dataclass
class TranslationRun(NetworkRun):
    """Built once."""

    to_train_on = ", or raise steps to train on"

    config: TranslationConfig
    model: Translator
    progress: TranslationProgress
    data: TranslationData
    rates: list[float]
    """The rate of each parameter group as configured."""

    @property
    def steps(self) -> int:
        """The number of steps, as configured."""
        return self.config.steps

    def training_batches(self) -> Iterator[Batch]:
        """Yield batches from where the run stands, without an end; ``progress`` says what has been taken."""
        pairs, tokens = self.data.parts["train"], self.config.data.batch_tokens
        while True:
            order = batches(pairs, tokens=tokens, seed=self.config.seed, epoch=self.progress.epoch)
            while self.progress.batch < len(order):
                self.progress.batch += 1
                yield padded(pairs, order[self.progress.batch - 1], self.data.end)
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def epochs(self) -> float:
        """Return the passes over the training part."""
        pairs, tokens = self.data.parts["train"], self.config.data.batch_tokens
        count = len(batches(pairs, tokens=tokens, seed=self.config.seed, epoch=self.progress.epoch))
        return self.progress.epoch + self.progress.batch / count

    def set_learning_rate(self) -> float:
        """Set the rate of every group for the step that comes; returns that of the linear maps."""
        factor = learning_rate_factor(self.config.schedule, self.config.steps)(self.progress.done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return float(self.optimizer.defaults["lr"]) * factor

    def arguments(self) -> dict[str, Any]:
        """Return what ``load_translator`` builds the network from, beside its weights."""
        return {**asdict(self.config.model), "words": len(self.data.tokenizer)}

    def greeting(self) -> str:
        """Return what is trained."""
        data, pairs = self.config.data, len(self.data.parts["train"].source)
        of_data = f"{data.source} to {data.target}: {pairs:,} pairs, {len(self.data.tokenizer):,} tokens"
        return f"{of_data}; {self.config.model.geometry}"


def build_translation_run(config: TranslationConfig, ranks: Ranks) -> TranslationRun:
    """Build pairs, tokenizer, network, layers and optimizer.

    Raises:
        UserError: whatever of them cannot be had.
    """
    data, model, folder = config.data, config.model, Path(str(config.run_dir))
    torch.manual_seed(config.seed)
    pairs = load_translation_data(
        data.folder,
        data.source,
        data.target,
        vocab_size=data.vocab_size,
        places=model.places,
        tokenizer_folder=Path(data.tokenizer_folder or folder / "tokenizer"),
    )
    network = Translator(model, len(pairs.tokenizer)).to(DTYPES[config.precision])
    arguments = {key: value for key, value in config.optimizer.items() if key not in ("other_lr", "points_lr")}
    rates = {}
    if config.optimizer.get("other_lr") is not None:
        rates = dict.fromkeys(OTHER_ROLES, config.optimizer["other_lr"])
    if config.optimizer.get("points_lr") is not None:
        rates["points"] = config.optimizer["points_lr"]
    layers, optimizer = build_method(network, arguments, LINEAR_MAPS, rates)
    checkpoints = Checkpoints(folder / "checkpoints", ranks, every=config.checkpoint_every, keep=2, asynchronous=False)
    torch.manual_seed(config.seed)  # dropout is the same for all methods
    configured = [float(group["lr"]) for group in optimizer.param_groups]
    return TranslationRun(
        config=config,
        folder=folder,
        ranks=ranks,
        model=network,
        layers=layers,
        optimizer=optimizer,
        checkpoints=checkpoints,
        progress=TranslationProgress(),
        sha1=pairs.sha1,
        data=pairs,
        rates=configured,
    )


def load_translator(folder: Path) -> Translator:
    """Load the trained, plain network (``nn.Linear`` throughout) that a finished run left in its folder, for
    evaluation.

    Raises UserError if there is none, or it is of another version.
    """

    def build(about: dict[str, Any]) -> Translator:
        words = about.pop("words")
        return Translator(saved_model(TranslationModelConfig, about), words)

    return load_saved(folder, build)
