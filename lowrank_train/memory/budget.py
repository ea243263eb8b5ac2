"""What fits a memory budget: the largest model, micro-batch or rank for each optimizer, by formulas alone.

A setting fits if its predicted peak (``lowrank_train.memory.step``) is at most the budget. What CUDA, its libraries
and the allocator take for themselves is not predicted: leave some headroom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError
from lowrank_train.common.units import parse_bytes, show_bytes
from lowrank_train.config import methods
from lowrank_train.config.loading import flags_to_keys, load_schema
from lowrank_train.config.schema import Config, ModelConfig, complete, load_config
from lowrank_train.config.settings import key_help, setting
from lowrank_train.memory.measured import measure
from lowrank_train.memory.records import StepTime, step_time
from lowrank_train.memory.step import Fixed, StepMemory, fixed, predict
from lowrank_train.models import build as models
from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.costs.table import aligned
from lowrank_train.plan import check_settings, unsharded

__all__ = ["BudgetConfig", "Fit", "Outcome", "explain", "help_text", "load_budget", "measured_against", "solve"]

OPTIMIZERS = [
    *("adamw", "galore_adamw", "dct_adamw", "low_rank_adamw", "apollo", "apollo_mini", "scale", "trion", "sst", "lora")
]
"""Those of the table."""

_8BIT = ("adamw", "galore_adamw", "dct_adamw", "apollo")
"""Of them, with moments in 8 bits too."""

_MOST_SEQUENCES = 4096
_ASSUMED_RANK = 128
"""Where a method needs a rank and none is given; the answer says so."""

_OWN_RANK = ("apollo_mini",)
"""Optimizers whose rank is what they are about: the one that is asked for holds for the others."""


@dataclass
class BudgetConfig:
    """What is asked."""

    budget: str = setting("24GiB", "memory of one device, with its unit: 24GiB or 24G (2^30 bytes each), 80GB (10^9)")
    models: list[str] = setting(["llama"], "families (llama, opt), or sizes: --models llama opt")  # noqa: RUF009
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
    other_state_dtype: str | None = setting(None, "likewise, of embeddings, head and norms only")
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


@dataclass(frozen=True)
class Fit:
    """One setting and what it needs."""

    optimizer: str
    state_dtype: str | None
    rank: int | None
    model: str
    micro_batch: int
    budget: int
    memory: StepMemory = field(repr=False)
    time: StepTime | None = None
    """Of its step, where a run like it has been recorded."""
    rank_is_assumed: bool = False
    """Whether nobody has chosen the rank, which the method cannot do without."""

    @property
    def headroom(self) -> int:
        """Bytes of the budget that are left; negative if it does not fit."""
        return self.budget - self.memory.peak

    @property
    def label(self) -> str:
        """Optimizer and type of state."""
        return f"{self.optimizer} {self.state_dtype}" if self.state_dtype else self.optimizer


@dataclass(frozen=True)
class Outcome:
    """Of one question."""

    question: str
    fits: list[Fit]
    missing: list[str]
    """Optimizers for which nothing fits, with what the smallest model needs."""


def help_text() -> str:
    """How to call it, and every key with its default and meaning."""
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
    """The question. Raises UserError for unknown keys, models, optimizers or units, and values out of range."""
    config = load_schema(BudgetConfig, flags_to_keys(_joined(arguments), BudgetConfig))
    _bytes(config.budget)
    for name in [*config.optimizers, config.optimizer]:
        try:
            methods.find(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    if config.recipe is not None and (config.model is not None or config.largest is not None):
        raise UserError(f"recipe={config.recipe} says which model; leave out --model and --largest")
    if config.recipe is not None:
        _recipe(config)
    elif config.model is not None:
        _sizes([config.model])
    elif config.measure:
        raise UserError("measure=true of what? give --model: steps of it are made")
    elif config.largest is not None:
        raise UserError(f"largest={config.largest} of what? give --model, or leave it out for the table")
    if config.largest == "batch" and config.micro_batch is not None:
        raise UserError(f"micro_batch={config.micro_batch} with largest=batch, which solves for it; leave one out")
    if config.largest == "rank" and config.rank is not None:
        raise UserError(f"rank={config.rank} with largest=rank, which solves for it; leave one out")
    _sizes(config.models)
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


def solve(config: BudgetConfig) -> Outcome:
    """The table, or the answer for one model.

    Raises:
        UserError: nothing fits (says what the smallest model needs), rank too large for the model.
    """
    budget = _bytes(config.budget)
    if config.recipe is not None:
        return _of_recipe(config, budget)
    if config.model is not None:
        answer = _solve_one(config, budget)
        return replace(answer, fits=[_timed(config, fit) for fit in answer.fits])
    fits, missing = [], []
    for name, state_dtype in _rows(config):
        for family in config.models:
            names = _sizes([family])
            try:
                found = next((fit for fit in _largest_models(config, budget, name, state_dtype, names) if fit), None)
            except UserError as error:  # a technique that this optimizer has no use for
                missing.append(f"{name}: {error}")
                continue
            if found is not None:
                fits.append(_timed(config, found))
            else:
                missing.append(_why_none(config, budget, name, state_dtype, names[0]))
    if not fits:
        raise UserError(f"nothing fits in {config.budget}; {'; '.join(missing)}")
    question = f"largest model of {', '.join(config.models)} in {show_bytes(budget)} per rank, {_circumstances(config)}"
    return Outcome(question, fits, missing)


def _why_none(config: BudgetConfig, budget: int, name: str, state_dtype: str | None, smallest: str) -> str:
    try:
        fit = _fit(config, budget, name, state_dtype, smallest, config.micro_batch or 1)
    except UserError as error:  # positions that are too few, a rank too large
        return f"{name}: {error}"
    return f"{fit.label}: {fit.model} alone needs {show_bytes(fit.memory.peak)}"


def measured_against(config: BudgetConfig, fit: Fit) -> str:
    """A row per phase: predicted, measured, and the difference of the prediction. Raises UserError as ``measure``."""
    if config.recipe is not None:
        run = _recipe(config)
    else:
        replaced = replace(config, rank=fit.rank)
        run, _ = _run(replaced, fit.optimizer, fit.state_dtype, fit.model, fit.micro_batch)
    found = measure(run)
    memory = fit.memory
    # the first refresh is in the step that is measured
    predicted = {**memory.phases, "step": max(memory.step.total, memory.refresh.total), "peak": memory.peak}
    rows = [
        [phase, show_bytes(predicted[phase]), show_bytes(size), f"{100 * (predicted[phase] / size - 1):+.2f} %"]
        for phase, size in {**found.phases, "peak": found.peak}.items()
    ]
    return aligned([["phase", "predicted", "measured", "difference"], *rows])


def explain(config: BudgetConfig) -> Fit:
    """What ``--model`` needs. Raises UserError for settings that do not fit the model."""
    assert config.model is not None
    return _fit(
        config, _bytes(config.budget), config.optimizer, config.state_dtype, config.model, config.micro_batch or 1
    )


def _solve_one(config: BudgetConfig, budget: int) -> Outcome:
    name, state_dtype, model = config.optimizer, config.state_dtype, config.model
    assert model is not None
    where = f"{show_bytes(budget)} per rank, {_circumstances(config)}"
    if config.largest is None:
        return Outcome(f"{model} against {where}", [explain(config)], [])
    if config.largest == "model":
        names = _sizes([model.split("_")[0]])
        for found in _largest_models(config, budget, name, state_dtype, names):
            if found is not None:
                return Outcome(f"largest model in {where}", [found], [])
        raise _too_small(config, _fit(config, budget, name, state_dtype, names[0], config.micro_batch or 1))
    if config.largest == "batch":
        alone = _fit(config, budget, name, state_dtype, model, 1)
        if alone.headroom < 0:
            raise _too_small(config, alone)
        return Outcome(f"largest micro-batch of {model} in {where}", [_grow(config, alone)], [])
    if "rank" not in methods.find(name).arguments():
        raise UserError(f"optimizer {name!r} has no rank; use --largest batch or model")

    def at_rank(rank: int) -> Fit:
        return _fit(replace(config, rank=rank), budget, name, state_dtype, model, config.micro_batch or 1)

    smallest = at_rank(1)
    if smallest.headroom < 0:
        raise _too_small(config, smallest)
    best = _bisect(smallest, _largest_rank(model, config), at_rank)
    return Outcome(f"largest rank of {model} in {where}", [best], [])


def _largest_models(
    config: BudgetConfig, budget: int, name: str, state_dtype: str | None, names: list[str]
) -> Iterator[Fit | None]:
    """From the largest of them down: one that fits with the micro-batch given, or 1 and then grown; None if not."""
    for model in reversed(names):
        if config.seq_len > models.architecture(ModelConfig(name=model)).max_position_embeddings and "opt" in model:
            continue
        try:
            found = _fit(config, budget, name, state_dtype, model, config.micro_batch or 1)
        except UserError:  # a rank that is too large for the smaller models of a table
            if config.model is not None or model == names[-1]:
                raise
            continue
        if found.headroom >= 0:
            yield found if config.micro_batch else _grow(config, found)
        yield None


def _grow(config: BudgetConfig, fit: Fit) -> Fit:
    def with_batch(micro_batch: int) -> Fit:
        return _fit(config, fit.budget, fit.optimizer, fit.state_dtype, fit.model, micro_batch)

    return _bisect(fit, _MOST_SEQUENCES, with_batch)


def _bisect(fits: Fit, most: int, make: Callable[[int], Fit]) -> Fit:
    """The largest number up to ``most`` whose setting fits, 1 being one of them; doubled first, then halved."""
    low, high = 1, 2
    while high <= most:
        found = make(high)
        if found.headroom < 0:
            break
        low, fits, high = high, found, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        found = make(middle)
        if found.headroom >= 0:
            low, fits = middle, found
        else:
            high = middle
    return fits


def _fit(config: BudgetConfig, budget: int, name: str, state_dtype: str | None, model: str, micro_batch: int) -> Fit:
    run, skeleton = _run(config, name, state_dtype, model, micro_batch)
    arguments = run.optimizer
    try:
        key = repr((replace(run, micro_batch=1, tokens_per_step=1, loss_chunk=1), config.world_size, config.replicas))
        ranks, copies = config.world_size, config.replicas
        if key not in _known:
            check_settings(complete(run), ranks * copies, here=False)
            _known[key] = fixed(run, skeleton, world_size=ranks, replicas=copies)
        memory = predict(run, world_size=ranks, replicas=copies, model=skeleton, known=_known[key])
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{model} with {name}: {error}") from None
    assumed = config.rank is None and methods.find(name).needs_rank
    return Fit(name, state_dtype, arguments.get("rank"), model, micro_batch, budget, memory, rank_is_assumed=assumed)


def _timed(config: BudgetConfig, fit: Fit) -> Fit:
    run, _ = _run(replace(config, rank=fit.rank), fit.optimizer, fit.state_dtype, fit.model, fit.micro_batch)
    return replace(fit, time=step_time(run, config.world_size * config.replicas, Path(config.records)))


def _of_recipe(config: BudgetConfig, budget: int) -> Outcome:
    """What a whole configuration of a run needs."""
    run = _recipe(config)
    check_settings(run, config.world_size * config.replicas, here=False)
    try:
        memory = predict(run, world_size=config.world_size, replicas=config.replicas)
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.recipe}: {error}") from None
    arguments = run.optimizer
    name, state_dtype = str(arguments["name"]), arguments.get("state_dtype")
    time = step_time(run, config.world_size * config.replicas, Path(config.records))
    fit = Fit(name, state_dtype, arguments.get("rank"), run.model.name, run.micro_batch, budget, memory, time)
    return Outcome(f"{config.recipe} against {show_bytes(budget)} per rank", [fit], [])


def _recipe(config: BudgetConfig) -> Config:
    run = load_config([str(config.recipe)])
    return replace(run, device=config.device)


def _run(
    config: BudgetConfig, name: str, state_dtype: str | None, model: str, micro_batch: int
) -> tuple[Config, PreTrainedModel]:
    """The run a setting stands for, and its model on meta."""
    arguments: dict[str, Any] = {"name": name}
    takes = methods.find(name).arguments()
    rank = _ASSUMED_RANK if config.rank is None and methods.find(name).needs_rank else config.rank
    if rank is not None and "rank" in takes and name not in _OWN_RANK:
        arguments["rank"] = rank
    if state_dtype is not None:
        if "state_dtype" not in takes:
            raise UserError(f"optimizer {name!r} takes no state_dtype; leave it out")
        arguments["state_dtype"] = state_dtype
    if config.other_state_dtype is not None:
        arguments["other_state_dtype"] = config.other_state_dtype
    if config.offload_state:
        arguments["offload_state"] = True
    run = Config(
        model=ModelConfig(name=model, checkpointing=config.checkpointing),
        optimizer=arguments,
        weights=config.weights,
        fused_backward=config.fused_backward,
        clip=None if config.fused_backward else 1.0,
        seq_len=config.seq_len,
        micro_batch=micro_batch,
        tokens_per_step=config.seq_len * micro_batch * config.accumulate * config.world_size * config.replicas,
        precision=config.precision,
        loss_chunk=config.loss_chunk,
        device=config.device,
    )
    try:
        layers = tuple(sorted((key, arguments[key]) for key in ("rank",) if key in arguments))
        layers_of = name if methods.find(name).needs_rank else "adamw"
        return run, _skeleton(model, config.seq_len, layers_of, layers, config.weights, config.precision)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{model} with {name}: {error}") from None


_known: dict[Any, Fixed] = {}
"""By what it depends on: bisection over micro-batches asks for the same again and again."""


@lru_cache(maxsize=64)
def _skeleton(
    model: str, seq_len: int, layers_of: str, arguments: tuple[tuple[str, int], ...], weights: Any, precision: Any
) -> PreTrainedModel:
    """On meta, converted; one for all optimizers that train the same layers."""
    optimizer = {"name": layers_of, **(dict(arguments) if methods.find(layers_of).needs_rank else {})}
    kept: dict[str, Any] = {"weights": weights, "precision": precision}
    return unsharded(Config(model=ModelConfig(name=model), optimizer=optimizer, seq_len=seq_len, **kept))


def _rows(config: BudgetConfig) -> list[tuple[str, str | None]]:
    if config.optimizers:
        return [(name, config.state_dtype) for name in config.optimizers]
    return [(name, kind) for name in OPTIMIZERS for kind in ((None, "8bit") if name in _8BIT else (None,))]


def _sizes(names: Sequence[str]) -> list[str]:
    """Models of families, or by name, smallest first; those below 60M are for tests."""
    found = []
    families = {name.split("_")[0] for name in models.SIZES}
    for name in names:
        if name in families:
            tests = ("llama_9m", "llama_20m", "llama_35m")
            found += [size for size in models.SIZES if size.startswith(f"{name}_") and size not in tests]
        elif name in models.SIZES or Path(name, "config.json").is_file():
            found.append(name)
        else:
            known = suggestion(name, [*sorted(families), *models.SIZES], ", or a model's folder")
            raise UserError(f"unknown model {name!r}; {known}")
    return found


def _largest_rank(model: str, config: BudgetConfig) -> int:
    architecture = models.architecture(ModelConfig(name=model), seq_len=config.seq_len)
    return int(architecture.hidden_size)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(f"budget: {error}") from None


def _too_small(config: BudgetConfig, fit: Fit) -> UserError:
    at = f" at rank {fit.rank}" if fit.rank is not None else ""
    terms = fit.memory.terms
    return UserError(
        f"budget={config.budget} is too small: {fit.model} with {fit.label}{at} and micro_batch={fit.micro_batch} "
        f"needs {show_bytes(fit.memory.peak)}, most of it {max(terms, key=lambda term: terms[term])}"
    )


def _circumstances(config: BudgetConfig) -> str:
    ranks = f"{config.world_size} rank(s)" + (f" x {config.replicas} replicas" if config.replicas > 1 else "")
    weights = {"full": "float32"}.get(config.weights, config.weights)
    parts = [f"seq_len {config.seq_len}", ranks, f"{config.precision} arithmetic, {weights} weights"]
    parts.append(f"{config.accumulate} micro-batches a step")
    parts.append(f"checkpointing {config.checkpointing}")
    parts += ["updates in backward"] * config.fused_backward + ["state in host memory"] * config.offload_state
    return ", ".join(parts)
