"""Predicted peaks of a training step, against published numbers, the tracker and the CPU's allocator."""

from __future__ import annotations

import pytest

from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config, ModelConfig
from lowrank_train.memory import static as memory_budget
from lowrank_train.memory.measured import measure
from lowrank_train.memory.phases import StepMemory
from lowrank_train.memory.step import predict
from lowrank_train.models import build as models
from lowrank_train.plan import Plan
from tests.tools.published_memory import SCALE_TABLE, weights_and_states

SIZES = {
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_3b": 2_685_831_680,
    "llama_7b": 6_738_415_616,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
}
"""Of the published configurations, tied weights once."""


def config(*settings: str) -> Config:
    return load_config(["model.name=llama_9m", "seq_len=32", "micro_batch=2", "tokens_per_step=128", *settings])


def planned(*settings: str) -> Plan:
    return Plan.of(config(*settings))


@pytest.mark.parametrize("name", SIZES)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    assert models.parameter_count(Plan.of(Config(model=ModelConfig(name=name))).model) == SIZES[name]


@pytest.mark.parametrize("cell", SCALE_TABLE, ids=lambda cell: f"{cell.method}-{cell.model}")
def test_memory_of_scales_table_is_reproduced(cell: tuple[str, str, float]) -> None:
    method, model, printed = cell
    ours = weights_and_states(method, model) / 1e9
    if (method, model) == ("galore", "llama_350m"):  # the one cell that is not what its rank gives
        assert ours == pytest.approx(1.389, abs=0.001)
        assert weights_and_states(method, model, rank=384) / 1e9 == pytest.approx(printed, abs=0.01)
    else:
        assert ours == pytest.approx(printed, abs=0.01)


def test_static_terms_are_the_exact_ones() -> None:
    for name in ("adamw", "dct_adamw", "galore_adamw"):
        plan = Plan.of(config(f"optimizer.name={name}"), world_size=4)
        step, exact = predict(plan, shard=1).step, memory_budget.predicted(plan, shard=1)
        assert (step.weights, step.gradients, step.optimizer_state) == (
            exact.weights,
            exact.gradients,
            exact.optimizer_state,
        )


def test_the_peak_is_that_of_its_phase_and_its_terms_add_up() -> None:
    memory = predict(planned())
    assert memory.peak == max(memory.phases.values()) == memory.phases[memory.phase]
    assert sum(memory.terms.values()) == memory.peak


def peaks(*settings: str, world_size: int = 1) -> StepMemory:
    return predict(Plan.of(load_config(["model.name=llama_1b", "seq_len=1024", *settings]), world_size=world_size))


def test_more_of_anything_needs_more() -> None:
    one = peaks("micro_batch=1", "tokens_per_step=16384")
    assert peaks("micro_batch=2", "tokens_per_step=16384").peak > one.peak
    assert peaks("micro_batch=1", "tokens_per_step=8192", world_size=8).peak < one.peak / 2
    checkpointed = peaks("micro_batch=1", "tokens_per_step=16384", "model.checkpointing=full")
    assert checkpointed.forward.activations < one.forward.activations / 10
    small = peaks("micro_batch=1", "tokens_per_step=16384", "loss_chunk=128")
    assert small.forward.logits == pytest.approx(one.forward.logits / 8)
    half = peaks("micro_batch=1", "tokens_per_step=16384", "precision=bfloat16")
    assert half.step.weights == one.step.weights
    assert half.forward.activations < one.forward.activations


def test_gradients_wait_only_where_they_accumulate() -> None:
    assert predict(planned("tokens_per_step=64")).forward.gradients == 0
    assert predict(planned("tokens_per_step=128")).forward.gradients > 0


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=adamw",),
        ("optimizer.name=dct_adamw", "precision=bfloat16"),
        ("model.name=opt_125m", "model.overrides.num_hidden_layers=2", "model.checkpointing=full"),
    ],
    ids=lambda settings: settings[0].split("=")[1],
)
def test_the_allocator_agrees(settings: tuple[str, ...]) -> None:
    wanted = config(*settings, "device=cpu")
    measured, predicted = measure(wanted), predict(Plan.of(wanted))
    assert predicted.peak == pytest.approx(measured.peak, rel=0.1)
    for phase in ("forward", "backward"):
        assert predicted.phases[phase] == pytest.approx(measured.phases[phase], rel=0.1)
