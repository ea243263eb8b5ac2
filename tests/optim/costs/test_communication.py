"""Communicated bytes against numbers worked out by hand, and against the table of the LLaMA-7B on 8 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.optim.costs.sent import FORMULAS, ModelShapes, all_reduce_bytes, communicated_bytes, model_shapes
from lowrank_train.optim.costs.time import rank_argument
from tests.optim.models import MixedModel, prepare, tiny_llama

MEGA, GIGA = 1e6, 1e9


def llama_7b() -> list[dict[str, Any]]:
    """All its weights by role, (out, in), without memory."""
    hidden, intermediate, vocabulary, layers = 4096, 11008, 32000, 32
    matrices = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]

    def group(role: str, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
        params = [(f"{role} {i}", torch.empty(shape, device="meta")) for i, shape in enumerate(shapes)]
        return {"params": params, "role": role}

    return [
        group("matrix", matrices * layers),
        group("embedding", [(vocabulary, hidden)]),
        group("head", [(vocabulary, hidden)]),
        group("vector", [(hidden,)] * (2 * layers + 1)),
    ]


def llama_7b_shapes() -> ModelShapes:
    groups = llama_7b()
    numbers = sum(p.numel() for group in groups for _, p in group["params"])
    return ModelShapes(tuple(tuple(p.shape) for _, p in groups[0]["params"]), numbers)


def test_dct_adamw_sends_at_most_8_mb_per_step_of_llama_7b_on_8_ranks() -> None:
    at_every_step = communicated_bytes("dct_adamw", llama_7b(), world_size=8, rank=512, refresh_interval=1)
    assert at_every_step.mean_payload == 4 * 32 * 7 * 4096  # one float32 per direction, 7 matrices of 32 layers
    assert at_every_step.mean_sent == pytest.approx(6.4 * MEGA, rel=0.01)
    assert at_every_step.mean_sent <= 8 * MEGA
    usual = communicated_bytes("dct_adamw", llama_7b(), world_size=8, rank=512)
    assert usual.refresh_sent == at_every_step.mean_sent
    assert usual.step_sent == 0
    assert usual.interval == 100
    assert usual.mean_sent == pytest.approx(at_every_step.mean_sent / 100)


@pytest.mark.parametrize("rank", [256, 512, 1024])
def test_dct_adamw_sends_the_same_at_every_rank(rank: int) -> None:
    assert communicated_bytes("dct_adamw", llama_7b(), world_size=8, rank=rank).refresh_sent <= 8 * MEGA


@pytest.mark.parametrize(
    ("label", "rank", "sent"),
    [
        ("FSDP2 itself", 512, 35.4 * GIGA),
        ("ISTA DCT-AdamW, broadcast", 512, 11.8 * GIGA),
        ("Muon, gather", 512, 11.3 * GIGA),
        ("Muon, all-to-all", 512, 2.83 * GIGA),
        ("Dion", 256, 1.02 * GIGA),
        ("Dion", 512, 2.04 * GIGA),
        ("Dion", 1024, 4.08 * GIGA),
        ("Trion, released", 256, 0.71 * GIGA),
        ("Trion, released", 512, 1.42 * GIGA),
        ("Trion, released", 1024, 2.83 * GIGA),
        ("GaLore, gather at a refresh", 512, 11.3 * GIGA),
        ("GaLore, gather, mean", 512, 57 * MEGA),
    ],
)
def test_formulas_give_the_figures_worked_out_before(label: str, rank: int, sent: float) -> None:
    assert FORMULAS[label](llama_7b_shapes(), rank, 8) == pytest.approx(sent, rel=0.01)


def test_every_formula_says_in_one_line_where_it_comes_from() -> None:
    for formula in FORMULAS.values():
        assert formula.__doc__
        assert "\n" not in formula.__doc__
    assert all(formula(llama_7b_shapes(), 512, 1) == 0 for formula in FORMULAS.values())


@pytest.mark.parametrize("name", optim.names())
def test_every_registered_optimizer_has_a_prediction(name: str) -> None:
    arguments, model = rank_argument(name, 2), prepare(name, tiny_llama())
    sent = communicated_bytes(name, model, world_size=4, **arguments)
    assert 0 <= sent.step_sent <= sent.mean_sent <= sent.refresh_sent
    alone = communicated_bytes(name, model, world_size=1, **arguments)
    assert alone.refresh_sent == alone.mean_payload == 0
    assert alone.interval == sent.interval


def test_adamw_communicates_nothing() -> None:
    sent = communicated_bytes("adamw", tiny_llama(), world_size=8)
    assert (sent.mean_payload, sent.refresh_sent, sent.interval) == (0, 0, None)


def test_the_mean_is_over_the_interval_of_each_group() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 6, bias=False))
    groups = optim.param_groups(model, rules={"^0": {"refresh_interval": 5}, "^1": {"refresh_interval": 2}})
    sent = communicated_bytes("dct_adamw", groups, world_size=2, rank=1)
    assert sent.refresh_payload == 4 * 4 + 6 * 4
    assert sent.mean_payload == 4 * 4 / 5 + 6 * 4 / 2
    assert sent.interval == 2
    assert sent.mean_sent == sent.mean_payload, "on 2 ranks a ring sends what it is handed"


def test_ring_cost() -> None:
    assert [all_reduce_bytes(8, ranks) for ranks in (1, 2, 4, 8)] == [0, 8, 12, 14]


def test_shapes_of_a_model() -> None:
    shapes = model_shapes(tiny_llama())
    assert len(shapes.matrices) == 2 * 7
    assert shapes.parameters == sum(p.numel() for p in tiny_llama().parameters())


def test_prediction_allocates_nothing_and_leaves_groups_alone() -> None:
    groups = optim.param_groups(MixedModel())
    before = [list(group["params"]) for group in groups]
    communicated_bytes("dct_adamw", groups, world_size=2)
    assert [group["params"] for group in groups] == before


def test_errors() -> None:
    with pytest.raises(ValueError, match="world_size=0; expected a number of ranks >= 1"):
        communicated_bytes("adamw", MixedModel(), world_size=0)
    with pytest.raises(ValueError, match="takes no argument 'rnk'"):
        communicated_bytes("dct_adamw", MixedModel(), world_size=2, rnk=1)
