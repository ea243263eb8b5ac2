"""What fits a memory budget: the largest model, micro-batch or rank for each optimizer, by formulas alone.

A setting fits if its predicted peak (``lowrank_train.memory.step``) is at most the budget. What CUDA, its libraries
and the allocator take for themselves is not predicted: leave some headroom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError
from lowrank_train.common.units import show_bytes
from lowrank_train.config import methods
from lowrank_train.config.run_config import complete
from lowrank_train.config.schema import Config, ModelConfig, ParallelConfig
from lowrank_train.memory.measured import measure
from lowrank_train.memory.phases import StepMemory
from lowrank_train.memory.question import BudgetConfig, budget_bytes, circumstances, model_names, recipe_of
from lowrank_train.memory.records import StepTime, step_time
from lowrank_train.memory.step import Fixed, fixed, predict
from lowrank_train.models import build as models
from lowrank_train.models.families import family_of
from lowrank_train.optim.costs.table import aligned
from lowrank_train.plan import Plan

__all__ = ["Fit", "Outcome", "explain", "measured_against", "solve"]

OPTIMIZERS = [
    *("adamw", "galore_adamw", "dct_adamw", "low_rank_adamw", "apollo", "apollo_mini", "scale", "trion", "sst", "lora")
]
"""Those of the table."""

_8BIT = ("adamw", "galore_adamw", "dct_adamw", "apollo")
"""Those of them that are shown with moments in 8 bits too."""

_MOST_SEQUENCES = 4096
_ASSUMED_RANK = 128
"""Where a method needs a rank and none is given; the answer says so."""

_OWN_RANK = ("apollo_mini",)
"""Optimizers whose rank is what they are about: the one that is asked for holds for the others."""


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
    """The time of its step, where a run like it has been recorded."""
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
    """The outcome of one question."""

    question: str
    fits: list[Fit]
    missing: list[str]
    """Optimizers for which nothing fits, with what the smallest model needs."""


def solve(config: BudgetConfig) -> Outcome:
    """Return the table, or the answer for one model.

    Raises:
        UserError: nothing fits (says what the smallest model needs), rank too large for the model.
    """
    budget = budget_bytes(config.budget)
    if config.recipe is not None:
        return _of_recipe(config, budget)
    if config.model is not None:
        answer = _solve_one(config, budget)
        return replace(answer, fits=[_timed(config, fit) for fit in answer.fits])
    fits, missing = [], []
    for name, state_dtype in _rows(config):
        for family in config.models:
            names = model_names([family])
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
    question = f"largest model of {', '.join(config.models)} in {show_bytes(budget)} per rank, {circumstances(config)}"
    return Outcome(question, fits, missing)


def _why_none(config: BudgetConfig, budget: int, name: str, state_dtype: str | None, smallest: str) -> str:
    try:
        fit = _fit(config, budget, name, state_dtype, smallest, config.micro_batch or 1)
    except UserError as error:  # positions that are too few, a rank too large
        return f"{name}: {error}"
    return f"{fit.label}: {fit.model} alone needs {show_bytes(fit.memory.peak)}"


def measured_against(config: BudgetConfig, fit: Fit) -> str:
    """Return a row per phase: predicted, measured, and the difference of the prediction.

    Raises UserError as ``measure``.
    """
    if config.recipe is not None:
        run = recipe_of(config)
    else:
        run = _run(replace(config, rank=fit.rank), fit.optimizer, fit.state_dtype, fit.model, fit.micro_batch)
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
    """Return what ``--model`` needs. Raises UserError for settings that do not fit the model."""
    assert config.model is not None
    return _fit(
        config, budget_bytes(config.budget), config.optimizer, config.state_dtype, config.model, config.micro_batch or 1
    )


def _solve_one(config: BudgetConfig, budget: int) -> Outcome:
    name, state_dtype, model = config.optimizer, config.state_dtype, config.model
    assert model is not None
    where = f"{show_bytes(budget)} per rank, {circumstances(config)}"
    if config.largest is None:
        return Outcome(f"{model} against {where}", [explain(config)], [])
    if config.largest == "model":
        names = model_names([models.architecture(ModelConfig(name=model)).model_type])
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
        architecture = models.architecture(ModelConfig(name=model))
        has_learned = family_of(architecture.model_type, model).learned_positions
        if has_learned and config.seq_len > architecture.max_position_embeddings:
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
    run = _run(config, name, state_dtype, model, micro_batch)
    key = repr((replace(run, micro_batch=1, tokens_per_step=1), config.world_size))
    if key not in _known:
        plan = Plan.of(complete(run), world_size=config.world_size * config.replicas)
        _known[key] = plan, fixed(plan)
    plan, known = _known[key]
    memory = predict(plan.changed(micro_batch=micro_batch, tokens_per_step=run.tokens_per_step), known=known)
    rank, assumed = run.optimizer.get("rank"), config.rank is None and plan.method.needs_rank
    return Fit(name, state_dtype, rank, model, micro_batch, budget, memory, rank_is_assumed=assumed)


_known: dict[str, tuple[Plan, Fixed]] = {}
"""By what they depend on: bisection over micro-batches asks for the same again and again."""


def _timed(config: BudgetConfig, fit: Fit) -> Fit:
    run = _run(replace(config, rank=fit.rank), fit.optimizer, fit.state_dtype, fit.model, fit.micro_batch)
    return replace(fit, time=step_time(run, config.world_size * config.replicas, Path(config.records)))


def _of_recipe(config: BudgetConfig, budget: int) -> Outcome:
    """Answer what a whole configuration of a run needs."""
    run = recipe_of(config)
    world_size = config.world_size * config.replicas
    memory = predict(Plan.of(run, world_size=world_size))
    settings = run.optimizer
    time = step_time(run, world_size, Path(config.records))
    name, state_dtype = str(settings["name"]), settings.get("state_dtype")
    fit = Fit(name, state_dtype, settings.get("rank"), run.model.name, run.micro_batch, budget, memory, time)
    return Outcome(f"{config.recipe} against {show_bytes(budget)} per rank", [fit], [])


def _run(config: BudgetConfig, name: str, state_dtype: str | None, model: str, micro_batch: int) -> Config:
    """Return the run that a setting stands for."""
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
    return Config(
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
        parallel=ParallelConfig(replicas=config.replicas),
    )


def _rows(config: BudgetConfig) -> list[tuple[str, str | None]]:
    if config.optimizers:
        return [(name, config.state_dtype) for name in config.optimizers]
    return [(name, kind) for name in OPTIMIZERS for kind in ((None, "8bit") if name in _8BIT else (None,))]


def _largest_rank(model: str, config: BudgetConfig) -> int:
    architecture = models.architecture(ModelConfig(name=model), seq_len=config.seq_len)
    return int(architecture.hidden_size)


def _too_small(config: BudgetConfig, fit: Fit) -> UserError:
    at = f" at rank {fit.rank}" if fit.rank is not None else ""
    terms = fit.memory.terms
    return UserError(
        f"budget={config.budget} is too small: {fit.model} with {fit.label}{at} and micro_batch={fit.micro_batch} "
        f"needs {show_bytes(fit.memory.peak)}, most of it {max(terms, key=lambda term: terms[term])}"
    )
