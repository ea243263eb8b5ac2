"""The configuration of a run: one dataclass a section; how it is read and checked stands in ``run_config``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lowrank_train.config.data import DataConfig
from lowrank_train.config.settings import setting

__all__ = ["AdapterConfig", "Config", "DataConfig", "ModelConfig", "ParallelConfig"]


@dataclass
class ModelConfig:
    """Which network is trained."""

    name: str = setting(
        "llama_60m", "a size such as llama_60m or opt_125m, or a local Hugging Face folder to continue from", path=True
    )
    overrides: dict[str, Any] = setting(
        {}, "Hugging Face config keys to change, e.g. model.overrides.num_hidden_layers=2"
    )
    checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "what of a layer's activations backward computes again: nothing; selective: all but outputs of matrix products "
        "and attention; full: everything, for about 1.3x the time",
    )
    checkpointed_layers: int | None = setting(
        None, "of so many decoder layers, from the first on; null: of all", at_least=0
    )


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor of optimizer.lr."""

    name: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", "cosine, constant, or wsd (warm-up, stable, linear decay)"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up", at_least=0)
    min_ratio: float = setting(0.1, "factor at the end of the run (cosine, wsd)", at_least=0, at_most=1)
    decay_fraction: float = setting(0.2, "last share of the run in which wsd decays", at_least=0, at_most=1)


@dataclass
class ParallelConfig:
    """How ranks share the model: replicas x shards = world size (HSDP when both are above 1)."""

    replicas: int = setting(1, "copies of the sharded model", at_least=1, at_most=10**6)
    shards: int | None = setting(
        None, "ranks that share one copy; null: world size / replicas", at_least=1, at_most=10**6
    )


@dataclass
class EvalConfig:
    """Perplexity on held-out text."""

    every: int = setting(200, "steps between two evaluations; 0: only at start and end", at_least=0)
    tokens: int = setting(262144, "held-out tokens, always the same ones", at_least=1)


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    every: int = setting(500, "steps between two checkpoints; 0: only at the end", at_least=0)
    keep: int = setting(2, "newest checkpoints kept", at_least=1)
    asynchronous: bool = setting(True, "write in the background while training goes on")


@dataclass
class ExportConfig:
    """The Hugging Face folder that a finished run writes."""

    dtype: Literal["source", "float64", "float32", "bfloat16", "float16"] = setting(
        "source", "of its weights; source: as in the folder given by model.name, or as they are trained from scratch"
    )


@dataclass
class AdapterConfig:
    """What peft puts into a trained model (launch/finetune.py); everything else is frozen then."""

    name: str | None = setting(
        None, "pissa, dora, boft, ...: an initialisation or tuner of peft, see the list above; null: no adapter"
    )
    rank: int | None = setting(
        None,
        "of the adapter, whose factors are not scaled then unless adapter.arguments says so; null: peft's default",
        at_least=1,
        at_most=10**6,
    )
    arguments: dict[str, Any] = setting(
        {}, "arguments of peft's configuration class, e.g. adapter.arguments.boft_block_size=4"
    )
    sequences: int = setting(
        64, "training sequences that EVA, CorDA and LoRA-GA look at before training", at_least=1, at_most=10**6
    )


@dataclass
class Config:
    """One pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: dict[str, Any] = setting(
        {"name": "adamw", "lr": 1e-3},
        "name and arguments of an optimizer: optimizer.name=dct_adamw optimizer.rank=64; and optimizer.other_lr, the "
        "rate of all but the matrices or their factors (embeddings, head, norms), where that is not optimizer.lr; "
        "optimizer.other_state_dtype too; state_dtype, offload_state and stochastic_rounding for any optimizer",
    )
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    train: Literal["all", "matrices", "low_rank"] = setting(
        "all",
        "all parameters; matrices: all but embeddings and head; low_rank: of a compressed model the factors, and the "
        "norms, as WeLore does",
    )
    steps: int = setting(1000, "optimizer steps", at_least=1)
    seq_len: int = setting(512, "tokens per sequence", at_least=1, at_most=10**9)
    tokens_per_step: int = setting(
        65536, "tokens per optimizer step, over all ranks and accumulated micro-batches", at_least=1, at_most=10**9
    )
    micro_batch: int = setting(8, "sequences per rank in one forward pass", at_least=1, at_most=10**6)
    precision: Literal["float32", "bfloat16", "float64"] = setting(
        "float32", "of the arithmetic; bfloat16 keeps float32 weights and gradients between steps, see weights"
    )
    weights: Literal["full", "bfloat16", "int8"] = setting(
        "full",
        "in which they are kept between steps: full, float32 (float64 with that precision); or, with "
        "precision=bfloat16 and rounded stochastically, bfloat16, or int8 for matrices and bfloat16 for the rest. "
        "Gradients are in bfloat16 then too",
    )
    fused_backward: bool = setting(
        False,
        "update each parameter as soon as its gradient is there, and free that: no model of gradients. A gradient that "
        "is not finite ends the run then, because others have been used",
    )
    clip: float | None = setting(1.0, "largest gradient norm; null: no clipping", above=0)
    clip_by: Literal["global", "parameter"] = setting(
        "global",
        "the norm that is clipped: of all gradients together, or each parameter's own; with fused_backward most "
        "optimizers cannot wait for the global one",
    )
    loss_chunk: int = setting(1024, "tokens whose logits exist at one time", at_least=1, at_most=10**9)
    seed: int = setting(0, "of initial weights and of the order of the data", at_least=0, at_most=2**32 - 1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    run_dir: str | None = setting(
        None, "folder of everything the run writes; null: runs/<model>-<optimizer>", path=True
    )
    resume: str = setting(
        "auto", "auto: continue the run in run_dir if it has a checkpoint; never; or a checkpoint's path", path=True
    )
    log_every: int = setting(1, "steps between two rows of metrics.jsonl and TensorBoard", at_least=1)
    max_bad_steps: int = setting(
        5, "steps in a row with a loss or gradient that is not finite before the run stops", at_least=1
    )
