"""The question of the memory tool: its keys, how they are typed, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lowrank_train.common.errors import UserError
from lowrank_train.common.units import parse_bytes
from lowrank_train.config import methods
from lowrank_train.config.loading import flags_to_keys, load_schema
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config, ParallelConfig
from lowrank_train.config.settings import key_help, setting
from lowrank_train.models import build as models
from lowrank_train.models.families import FAMILIES
from lowrank_train.optim.arguments.suggestion import suggestion

__all__ = ["BudgetConfig", "budget_bytes", "circumstances", "help_text", "load_budget", "model_names", "recipe_of"]


@dataclass
class BudgetConfig:
    """What is asked."""

    budget: str = setting("24GiB", "memory of one device, with its unit: 24GiB or 24G (2^30 bytes each), 80GB (10^9)")
    models: list[str] = setting(  # noqa: RUF009
        ["llama"], f"families ({', '.join(f.model_type for f in FAMILIES)}), or sizes: --models llama opt"
    )
    model: str | None = setting(None, "one model to explain, or to solve for; null: the table", path=True)
    optimizers: list[str] = setting([], "of the table; empty: ten, four of them in 8 bits too")  # noqa: RUF009
    optimizer: str = setting("adamw", "the optimizer of --model")
    rank: int | None = setting(
        None, "of low-rank methods; null: their own, a quarter of a matrix's smaller side", at_least=1, at_most=10**6
    )
    recipe: str | None = setting(
        None,
        "a YAML of launch/pretrain.py to explain, in place of --model: configs/budget/llama_7b_16gib.yaml",
        path=True,
    )
    state_dtype: str | None = setting(
        None, "of the moments of --model: null (as the weights), float32, bfloat16, 8bit or 4bit"
    )
    other_state_dtype: str | None = setting(None, "the same, of embeddings, head and norms only")
    offload_state: bool = setting(False, "keep optimizer state in host memory, which is not counted then")
    weights: Literal["full", "bfloat16", "int8"] = setting(
        "full", "in which they are kept: full (float32); bfloat16 or int8, rounded stochastically"
    )
    fused_backward: bool = setting(False, "update parameters in backward, without clipping; no model of gradients")
    seq_len: int = setting(1024, "tokens per sequence", at_least=1, at_most=10**9)
    micro_batch: int | None = setting(
        None, "sequences per rank in one forward pass; null: 1, or what is solved for", at_least=1, at_most=10**6
    )
    accumulate: int = setting(
        2, "micro-batches in a step; from 2 on gradients are there in forward too", at_least=1, at_most=10**6
    )
    world_size: int = setting(1, "ranks the model is sharded over", at_least=1, at_most=10**5)
    replicas: int = setting(1, "sharded copies of it (HSDP)", at_least=1, at_most=10**5)
    precision: Literal["float32", "bfloat16"] = setting("bfloat16", "of the arithmetic")
    checkpointing: Literal["none", "selective", "full"] = setting(
        "full", "activations that backward computes again: none, all but outputs of products and attention, all"
    )
    loss_chunk: int = setting(1024, "tokens whose logits exist at one time", at_least=1, at_most=10**9)
    largest: Literal["model", "batch", "rank"] | None = setting(
        None, "solve for it: batch or rank of --model, or its family's largest model; null: explain --model"
    )
    device: Literal["cuda", "cpu"] = setting("cuda", "whose blocks an update works in")
    records: str = setting("runs", "folder of runs whose record.json tell how long a step took", path=True)
    measure: bool = setting(False, "also make two real steps of --model, on --device, and compare phase by phase")
    out: str = setting("runs/memory_budget", "folder of the CSV, the JSON and the plot", path=True)


def help_text() -> str:
    """Return how to call the command, and every key with its default and meaning."""
    usage = [
        "usage: launch/memory_budget.py --budget 24GiB --models llama opt --seq-len 1024 --world-size 1",
        "       launch/memory_budget.py --budget 80GiB --model llama_7b --optimizer dct_adamw --rank 512",
        "       launch/memory_budget.py --model llama_1b --optimizer scale --largest batch",
        "       launch/memory_budget.py --budget 12GiB --models llama --weights int8 --fused-backward",
        "       launch/memory_budget.py --recipe configs/budget/llama_7b_16gib.yaml",
        "",
    ]
    return "\n".join([*usage, *key_help(BudgetConfig)])


def load_budget(arguments: Sequence[str]) -> BudgetConfig:
    """Return the question. Raises UserError for unknown keys, models, optimizers or units, and values out of range."""
    config = load_schema(BudgetConfig, flags_to_keys(_joined(arguments), BudgetConfig))
    budget_bytes(config.budget)
    for name in [*config.optimizers, config.optimizer]:
        try:
            methods.find(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    if config.recipe is not None and (config.model is not None or config.largest is not None):
        raise UserError(f"recipe={config.recipe} says which model; leave out --model and --largest")
    if config.recipe is not None:
        recipe_of(config)
    elif config.model is not None:
        model_names([config.model])
    elif config.measure:
        raise UserError("measure=true of what? give --model: steps of it are made")
    elif config.largest is not None:
        raise UserError(f"largest={config.largest} of what? give --model, or leave it out for the table")
    if config.largest == "batch" and config.micro_batch is not None:
        raise UserError(f"micro_batch={config.micro_batch} with largest=batch, which solves for it; leave one out")
    if config.largest == "rank" and config.rank is not None:
        raise UserError(f"rank={config.rank} with largest=rank, which solves for it; leave one out")
    model_names(config.models)
    return config


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--models llama opt`` as ``--models=[llama,opt]``: all words up to the next flag or key."""
    joined: list[str] = []
    for word in arguments:
        opened = bool(joined) and joined[-1].startswith(("--models=[", "--optimizers=["))
        if word in ("--models", "--optimizers"):
            joined.append(f"{word}=[]")
        elif opened and not word.startswith("--") and "=" not in word:
            start, listed = joined[-1][:-1].split("[")
            joined[-1] = f"{start}[{listed + ',' if listed else ''}{word}]"
        elif word.startswith(("--models=", "--optimizers=")) and "[" not in word:
            flag, value = word.split("=", 1)
            joined.append(f"{flag}=[{value}]")
        else:
            joined.append(word)
    return joined


def recipe_of(config: BudgetConfig) -> Config:
    """Return the run of ``recipe`` on the ranks and the device that are asked about."""
    run = load_config([str(config.recipe)])
    return replace(run, device=config.device, parallel=ParallelConfig(replicas=config.replicas))


def model_names(names: Sequence[str]) -> list[str]:
    """Return models of families, or by name, smallest first, without those for tests."""
    found = []
    families = {family.model_type: family for family in FAMILIES if family.sizes}
    for name in names:
        if name in families:
            found += [size for size in families[name].sizes if size not in families[name].for_tests]
        elif name in models.SIZES or Path(name, "config.json").is_file():
            found.append(name)
        else:
            known = suggestion(name, [*sorted(families), *models.SIZES], ", or a model's folder")
            raise UserError(f"unknown model {name!r}; {known}")
    return found


def budget_bytes(text: str) -> int:
    """Return the bytes of a size as it is typed. Raises UserError for what is none."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(f"budget: {error}") from None


def circumstances(config: BudgetConfig) -> str:
    """Return the settings that all answers share, in words."""
    ranks = f"{config.world_size} rank(s)" + (f" x {config.replicas} replicas" if config.replicas > 1 else "")
    weights = {"full": "float32"}.get(config.weights, config.weights)
    parts = [f"seq_len {config.seq_len}", ranks, f"{config.precision} arithmetic, {weights} weights"]
    parts.append(f"{config.accumulate} micro-batches a step")
    parts.append(f"checkpointing {config.checkpointing}")
    parts += ["updates in backward"] * config.fused_backward + ["state in host memory"] * config.offload_state
    return ", ".join(parts)
