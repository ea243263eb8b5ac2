"""The configuration of a run: one dataclass schema, YAML files merged left to right, then ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from lowrank_train import methods
from lowrank_train.data_config import DataConfig, check_data
from lowrank_train.errors import UserError
from lowrank_train.settings import setting

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "changed_keys",
    "complete",
    "flags_to_keys",
    "given_value",
    "help_text",
    "key_help",
    "load_config",
    "load_schema",
    "save_config",
    "setting",
]

T = TypeVar("T")


@dataclass
class ModelConfig:
    """Which network is trained."""

    name: str = setting(
        "llama_60m", "a size such as llama_60m or opt_125m, or a local Hugging Face folder to continue from"
    )
    overrides: dict[str, Any] = setting(
        {}, "Hugging Face config keys to change, e.g. model.overrides.num_hidden_layers=2"
    )
    checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "what of a layer's activations backward computes again: nothing; selective: all but outputs of matrix products "
        "and attention; full: everything, for about 1.3x the time",
    )
    checkpointed_layers: int | None = setting(None, "of so many decoder layers, from the first on; null: of all")


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor of optimizer.lr."""

    name: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", "cosine, constant, or wsd (warm-up, stable, linear decay)"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up")
    min_ratio: float = setting(0.1, "factor at the end of the run (cosine, wsd)")
    decay_fraction: float = setting(0.2, "last share of the run in which wsd decays")


@dataclass
class ParallelConfig:
    """How ranks share the model: replicas x shards = world size (HSDP when both are above 1)."""

    replicas: int = setting(1, "copies of the sharded model")
    shards: int | None = setting(None, "ranks that share one copy; null: world size / replicas")


@dataclass
class EvalConfig:
    """Perplexity on held-out text."""

    every: int = setting(200, "steps between two evaluations; 0: only at start and end")
    tokens: int = setting(262144, "held-out tokens, always the same ones")


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    every: int = setting(500, "steps between two checkpoints; 0: only at the end")
    keep: int = setting(2, "newest checkpoints kept")
    asynchronous: bool = setting(True, "write in the background while training goes on")


@dataclass
class AdapterConfig:
    """What peft puts into a trained model (launch/finetune.py); everything else is frozen then."""

    name: str | None = setting(
        None, "pissa, dora, boft, ...: an initialisation or tuner of peft, see the list above; null: no adapter"
    )
    rank: int | None = setting(
        None, "of the adapter, whose factors are not scaled then unless adapter.arguments says so; null: peft's default"
    )
    arguments: dict[str, Any] = setting(
        {}, "arguments of peft's configuration class, e.g. adapter.arguments.boft_block_size=4"
    )
    sequences: int = setting(64, "training sequences that EVA, CorDA and LoRA-GA look at before training")


@dataclass
class Config:
    """One pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: dict[str, Any] = setting(
        {"name": "adamw", "lr": 1e-3},
        "name and arguments of an optimizer: optimizer.name=dct_adamw optimizer.rank=64; and optimizer.other_lr, the "
        "rate of all but the matrices or their factors (embeddings, head, norms), where that is not optimizer.lr; "
        "optimizer.other_state_dtype likewise; state_dtype, offload_state and stochastic_rounding for any optimizer",
    )
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: Literal["all", "matrices", "low_rank"] = setting(
        "all",
        "all parameters; matrices: all but embeddings and head; low_rank: of a compressed model the factors, and the "
        "norms, as WeLore does",
    )
    steps: int = setting(1000, "optimizer steps")
    seq_len: int = setting(512, "tokens per sequence")
    tokens_per_step: int = setting(65536, "tokens per optimizer step, over all ranks and accumulated micro-batches")
    micro_batch: int = setting(8, "sequences per rank in one forward pass")
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
    clip: float | None = setting(1.0, "largest gradient norm; null: no clipping")
    clip_by: Literal["global", "parameter"] = setting(
        "global",
        "the norm that is clipped: of all gradients together, or each parameter's own; with fused_backward most "
        "optimizers cannot wait for the global one",
    )
    loss_chunk: int = setting(1024, "tokens whose logits exist at one time")
    seed: int = setting(0, "of initial weights and of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    run_dir: str | None = setting(None, "folder of everything the run writes; null: runs/<model>-<optimizer>")
    resume: str = setting(
        "auto", "auto: continue the run in run_dir if it has a checkpoint; never; or a checkpoint's path"
    )
    log_every: int = setting(1, "steps between two rows of metrics.jsonl and TensorBoard")
    max_bad_steps: int = setting(5, "steps in a row with a loss or gradient that is not finite before the run stops")


def load_config(arguments: Sequence[str]) -> Config:
    """Build a configuration from YAML files and ``key=value`` overrides.

    Args:
        arguments: files (``*.yaml``) and overrides, in any order; files are merged left to right, then overrides.

    Raises:
        UserError: unreadable file, unknown key (with the closest match), value of the wrong type or out of range.
    """
    return complete(load_schema(Config, arguments))


def load_schema(schema: type[T], arguments: Sequence[str]) -> T:
    """As ``load_config``, for any dataclass whose fields are sections or ``setting``s; values are not checked."""
    files = [a for a in arguments if "=" not in a or (a.endswith((".yaml", ".yml")) and Path(a).is_file())]
    overrides = [a for a in arguments if a not in files]
    changes = [(_read_yaml(file), f"in {file}") for file in files]
    has_model_name = hasattr(getattr(schema(), "model", None), "name")
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "model" and has_model_name:  # model=small/ is short for model.name=small/; data=x/ is a mistake
            override = f"{key}.name{equals}{value}"
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"cannot read the override {override!r}: {error}; expected key=value") from None
        changes.append((parsed, f"in {override!r}"))
    merged = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(merged, *(change for change, _ in changes))  # at once: every call copies the schema
    except OmegaConfBaseException:
        for change, where in changes:  # one of them raises, and is named
            merged = _merge(merged, change, where)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"wrong value for {error.full_key!r}: {str(error).splitlines()[0]}") from None


def given_value(arguments: Sequence[str], key: str) -> Any:
    """What files and overrides say of one dotted key, the last word counts; None if nothing. Nothing is checked.

    Raises UserError for a file that cannot be read.
    """
    value = None
    for word in arguments:
        name, equals, text = word.partition("=")
        is_file = not equals or (word.endswith((".yaml", ".yml")) and Path(word).is_file())
        if is_file and not word.startswith("-"):
            found = OmegaConf.select(_read_yaml(word), key)
            value = value if found is None else found
        elif name == key:
            value = text
    return value


def flags_to_keys(arguments: Sequence[str], schema: type[Any]) -> list[str]:
    """``--rank-reduction 0.5``, ``--rank-reduction=0.5`` and ``--merge`` as ``key=value``; other words as they are.

    Raises UserError for a flag without a value.
    """
    switches = {name for name, value, _ in _keys(schema()) if isinstance(value, bool)}
    words: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            alone = key in switches and waiting[:1] not in (["true"], ["false"])
            value = "true" if alone else waiting.pop(0) if waiting else ""
        if not value:
            raise UserError(f"{word} has no value; expected {word} VALUE, see --help")
        words.append(f"{key}={value}")
    return words


def complete(config: Config) -> Config:
    """Fill in what follows from other values, and check all. Raises UserError for a value out of range."""
    if config.run_dir is None:
        config.run_dir = f"runs/{Path(config.model.name).name}-{config.optimizer.get('name')}"
    if config.data.tokenizer is None and Path(config.model.name, "config.json").is_file():
        config.data.tokenizer = config.model.name  # a model to continue from knows only its own tokens
    _check(config)
    return config


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration, of any schema; loading it gives an equal object."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def changed_keys(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with (before, after), of two configurations of one schema."""
    then, now = dict(_values(before)), dict(_values(after))
    names = [*now, *(name for name in then if name not in now)]
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def help_text(program: str = "launch/pretrain.py") -> str:
    """Every key with its default and meaning."""
    lines = [f"usage: {program} [FILE.yaml ...] [key=value ...]", "", "optimizers:"]
    lines += [f"  {methods.describe(name)}" for name in methods.names()]
    return "\n".join([*lines, "", *key_help(Config)])


def key_help(schema: type[Any]) -> list[str]:
    """A line for every key of a schema: default and meaning."""
    keys = [(name, "null" if value is None else value, meaning) for name, value, meaning in _keys(schema())]
    return ["keys (default): meaning", *(f"  {name} ({default}): {meaning}" for name, default, meaning in keys)]


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f.metadata["help"]


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value, _ in _keys(config):
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        else:
            yield name, value


def _read_yaml(file: str) -> Any:
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise UserError(f"there is no file {file!r}; expected FILE.yaml or key=value, see --help") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file!r} as YAML: {error}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file!r} holds a list or a single value; expected keys and values")
    return loaded


def _merge(base: Any, change: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, change)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        schema: type[Any] = OmegaConf.get_type(base)
        known = [name for name, _, _ in _keys(schema())]
        known += {name.split(".")[0] for name in known}
        leaves = {name.split(".")[-1]: name for name in known}
        close = difflib.get_close_matches(key, known, n=1)
        close = close or [leaves[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], leaves, n=1)]
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown key {key!r} {where}; {hint}--help lists all keys") from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        if not error.full_key:  # a section was given a value
            reason = "it is a section of keys, such as model.name or data.path; give those"
        raise UserError(
            f"wrong value {f'for {error.full_key!r} ' if error.full_key else ''}{where}: {reason}"
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"cannot use the configuration {where}: {str(error).splitlines()[0]}") from None


def _check(config: Config) -> None:
    at_least = {
        "steps": (config.steps, 1),
        "seq_len": (config.seq_len, 1),
        "tokens_per_step": (config.tokens_per_step, 1),
        "micro_batch": (config.micro_batch, 1),
        "loss_chunk": (config.loss_chunk, 1),
        "adapter.rank": (1 if config.adapter.rank is None else config.adapter.rank, 1),
        "adapter.sequences": (config.adapter.sequences, 1),
        "log_every": (config.log_every, 1),
        "max_bad_steps": (config.max_bad_steps, 1),
        "parallel.replicas": (config.parallel.replicas, 1),
        "parallel.shards": (1 if config.parallel.shards is None else config.parallel.shards, 1),
        "data.vocab_size": (config.data.vocab_size, 257),
        "data.streams": (config.data.streams, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "checkpoint.every": (config.checkpoint.every, 0),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.tokens": (config.evaluation.tokens, 1),
        "schedule.warmup_steps": (config.schedule.warmup_steps, 0),
    }
    for key, (got, low) in at_least.items():
        if got < low:
            raise UserError(f"{key}={got}; expected a number >= {low}")
    shares = {
        "schedule.min_ratio": config.schedule.min_ratio,
        "schedule.decay_fraction": config.schedule.decay_fraction,
        "data.validation_fraction": config.data.validation_fraction,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{key}={share}; expected a number from 0 to 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}; expected a number from 0 to {2**32 - 1}")
    if config.weights != "full" and config.precision != "bfloat16":
        raise UserError(
            f"weights={config.weights} with precision={config.precision}: nothing would be computed more exactly than "
            "it is kept; set precision=bfloat16, or weights=full"
        )
    if config.model.checkpointed_layers is not None and config.model.checkpointing == "none":
        raise UserError(
            f"model.checkpointed_layers={config.model.checkpointed_layers} with model.checkpointing=none; set that to "
            "full or selective"
        )
    if config.clip is not None and not config.clip > 0:
        raise UserError(f"clip={config.clip}; expected a number > 0, or null for no clipping")
    check_data(config.data, config.seq_len, config.evaluation.tokens)
    if config.adapter.name is None and (config.adapter.rank is not None or config.adapter.arguments):
        raise UserError("adapter.rank or adapter.arguments without adapter.name; give that, e.g. adapter.name=lora")
    other_lr = config.optimizer.get("other_lr")
    is_number = isinstance(other_lr, int | float) and not isinstance(other_lr, bool)
    if other_lr is not None and not (is_number and other_lr >= 0):
        raise UserError(f"optimizer.other_lr={other_lr!r}; expected a number >= 0")
    try:
        arguments = [key for key in config.optimizer if key not in ("name", "other_lr", "other_state_dtype")]
        methods.find(str(config.optimizer.get("name")), arguments)
    except ValueError as error:
        raise UserError(f"in optimizer: {error}") from None
