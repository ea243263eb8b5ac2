"""The configuration of a translation run: YAML files merged left to right, then ``key=value`` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lowrank_train.config.schema import ScheduleConfig
from lowrank_train.config.settings import setting
from lowrank_train.hyperbolic.recipes import RecipeConfig, SpaceConfig

__all__ = ["TranslationConfig", "TranslationDataConfig", "TranslationModelConfig"]


@dataclass
class TranslationDataConfig:
    """Pairs of sentences, and how they become batches."""

    task: Literal["translation"] = setting("translation", "what is learned; other tasks have other keys")
    folder: str = setting("data/multi30k", "folder of train.parquet, validation.parquet and test.parquet", path=True)
    source: str = setting("de", "column that is translated from")
    target: str = setting("en", "column that is translated into")
    vocab_size: int = setting(
        4000, "entries of the byte-level BPE that is trained on both", at_least=257, at_most=10**7
    )
    tokenizer_folder: str | None = setting(
        None, "where that BPE is, or is put, for several runs to share; null: run_dir/tokenizer", path=True
    )
    batch_tokens: int = setting(4096, "of a batch, sources and targets with their padding", at_least=1, at_most=10**9)


@dataclass
class TranslationModelConfig(SpaceConfig):
    """The network."""

    max_time: float = setting(
        10.0, "times of points are up to this + 1.1 sqrt(k) at first: how far out they may be", above=0
    )
    width: int = setting(
        64, "coordinates, of which one in each head is a time in the Lorentz model", at_least=2, at_most=10**6
    )
    inner_width: int = setting(256, "of the feed-forward layers", at_least=2, at_most=10**6)
    layers: int = setting(2, "of the encoder, and of the decoder", at_least=1, at_most=1000)
    heads: int = setting(4, "of attention", at_least=1, at_most=1000)
    places: int = setting(128, "the longest sentence that fits, in tokens", at_least=1, at_most=10**6)
    dropout: float = setting(0.0, "of what enters the last linear map of a layer", at_least=0, below=1)


@dataclass
class TranslationConfig(RecipeConfig):
    """One translation run."""

    data: TranslationDataConfig = field(default_factory=TranslationDataConfig)
    model: TranslationModelConfig = field(default_factory=TranslationModelConfig)
    optimizer: dict[str, Any] = setting(
        {"name": "adamw", "lr": 0.003, "weight_decay": 0.0},
        "name and arguments of a method: optimizer.name=sst optimizer.rank=4; lr is the rate of the linear maps, "
        "optimizer.other_lr that of embeddings, head, biases and norms, optimizer.points_lr that of points, a distance "
        "(both as lr unless given)",
    )
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    label_smoothing: float = setting(0.1, "share of the target that is spread over all words", at_least=0, below=1)
    steps: int = setting(3000, "batches", at_least=1)
    evaluate_every: int = setting(200, "steps between two losses on validation; 0: only at the end", at_least=0)
    longest: int = setting(60, "tokens of a translation, at most", at_least=1, at_most=10**6)

    rates = ("other_lr", "points_lr")

    @property
    def name(self) -> str:
        """Space and optimizer."""
        return f"translation-{self.model.geometry}-{self.optimizer.get('name')}"
