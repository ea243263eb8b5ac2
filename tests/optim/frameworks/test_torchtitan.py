"""torchtitan's own optimizer and schedule containers, around our optimizers.

Its trainer is not run: it wants a GPU. What the trainer does with the containers is: build them for the sharded parts
of a model, step, schedule, save a flat state dict and load it.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_train import optim
from tests.optim.frameworks.harness import (
    LR,
    MAX_NORM,
    RANK,
    STEPS,
    WEIGHT_DECAY,
    create,
    difference,
    load_model,
    mean_over_ranks,
    named_states,
    named_weights,
    plain_losses,
    run_ranks,
    sharded_share,
)
from tests.optim.models import assert_equal

pytestmark = pytest.mark.slow

try:
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
except ImportError as error:
    reason = (
        f"torchtitan cannot be imported ({error}); it asks for datasets<4.8: pip install --no-deps torchtitan==0.3.0"
    )
    pytest.skip(reason, allow_module_level=True)

NO_DECAY = r"norm|bias"


def recipe() -> Any:
    """As in torchtitan, with the weight decay of ours; AdamW until it is swapped."""
    settings = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    exempt = ParamGroupConfig(
        pattern=NO_DECAY, optimizer_name="AdamW", optimizer_kwargs={**settings, "weight_decay": 0.0}
    )
    rest = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=settings)
    return OptimizersContainer.Config(param_groups=[exempt, rest], implementation="foreach")


def swapped(**changes: Any) -> Any:
    return optim.titan_config(recipe(), "dct_adamw", **{"rank": RANK, "refresh_interval": 2, **changes})


def sharded_model() -> nn.Module:
    model = load_model()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(config: Any, interrupt: bool = False) -> dict[str, Any]:
    def build() -> tuple[nn.Module, Any, Any]:
        model = sharded_model()
        optimizers = config.build(model_parts=[model])
        rates = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=1.0)
        return model, optimizers, rates.build(optimizers=optimizers, training_steps=STEPS)

    model, optimizers, schedule = build()
    losses, rates = [], []
    for step, tokens in enumerate(torch.load("my_tokens.pt")):
        if interrupt and step == 3:
            state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
            dcp.save(state, checkpoint_id="titan_checkpoint")
            position = schedule.state_dict()
            model, optimizers, schedule = build()
            state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
            dcp.load(state, checkpoint_id="titan_checkpoint")
            model.load_state_dict(state["model"])
            optimizers.load_state_dict(state["optimizer"])
            schedule.load_state_dict(position)
        optimizers.zero_grad()
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        rates.append(optimizers.optimizers[0].param_groups[0]["lr"])
        optimizers.step()
        schedule.step()
        losses.append(loss.item())
    (optimizer,) = optimizers
    return {
        "losses": mean_over_ranks(losses),
        "rates": rates,
        "share": sharded_share(optimizer),
        "values": {**named_weights(model), **named_states(optimizer)},
    }


@cache
def at_these_rates(folder: Path, rates: tuple[float, ...]) -> list[float]:
    """The plain loop, scheduled as torchtitan does."""

    def losses() -> list[float]:
        table = iter(rates)

        def scheduled(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = create(model)

            def set_rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                rate = next(table)
                for group in optimizer.param_groups:
                    group["lr"] = rate

            optimizer.register_step_pre_hook(set_rate)
            return optimizer

        return plain_losses(scheduled)[0]

    return run_ranks(losses, 1, folder)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_the_plain_loop(ranks: int, material: Path) -> None:
    for result in run_ranks(lambda: train(swapped()), ranks, material):
        assert len(set(result["rates"])) > 3, "the schedule is followed"
        assert difference(result["losses"], at_these_rates(material, tuple(result["rates"]))) < 1e-5
        assert (0.45 < result["share"] < 0.55) if ranks > 1 else result["share"] == 1


def test_flat_checkpoints_resume_exactly(material: Path) -> None:
    def both() -> list[dict[str, Any]]:
        return [train(swapped(), interrupt) for interrupt in (False, True)]

    for at_once, in_two in run_ranks(both, 2, material):
        assert in_two["losses"] == at_once["losses"]
        assert_equal(in_two["values"], at_once["values"])


def test_state_dict_has_flat_names_of_the_bare_model(material: Path) -> None:
    def keys() -> list[str]:
        model = load_model()
        container = swapped().build(model_parts=[torch.compile(model)])
        for optimizer in container:
            optimizer.defer_state()  # so that torchtitan makes its step with zero gradients
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        state = container.state_dict()
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
        return list(state)

    ((*found,),) = run_ranks(keys, 1, material)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert {f"state.{layer}.exp_avg", f"state.{layer}.basis_index", f"param_groups.{layer}.rank"} <= set(found)


def test_patterns_keep_their_settings(material: Path) -> None:
    def settings() -> tuple[dict[str, float], list[str], str]:
        container = swapped().build(model_parts=[load_model()])
        (optimizer,) = container
        decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
        return decay, sorted({group["role"] for group in optimizer.param_groups}), type(container).__name__

    ((decay, roles, name),) = run_ranks(settings, 1, material)
    assert {key: value for key, value in decay.items() if "norm" in key} == dict.fromkeys(
        (key for key in decay if "norm" in key), 0.0
    )
    assert decay["model.embed_tokens.weight"] == decay["lm_head.weight"] == WEIGHT_DECAY
    assert roles == ["embedding", "head", "matrix", "vector"]
    assert name == "DCTAdamWContainer"


def test_roles_of_torchtitans_own_layers() -> None:
    pytest.importorskip("triton", reason="torchtitan's models need triton")
    from torchtitan.models.common.embedding import Embedding
    from torchtitan.models.common.linear import Linear

    model = nn.Sequential(
        Embedding(Embedding.Config(num_embeddings=12, embedding_dim=8)),
        Linear(Linear.Config(in_features=8, out_features=8)),
        Linear(Linear.Config(in_features=8, out_features=12)),
    )
    roles = {name: group["role"] for group in optim.param_groups(model) for name, _ in group["params"]}
    assert roles == {"0.weight": "embedding", "1.weight": "matrix", "2.weight": "head"}


def test_mistakes_name_the_line() -> None:
    with pytest.raises(ValueError, match="got a dict; expected the Config of torchtitan's OptimizersContainer"):
        optim.titan_config({}, "dct_adamw")
    with pytest.raises(ValueError, match="takes no argument 'rang'"):
        optim.titan_config(recipe(), "dct_adamw", rang=8)
    narrow = dataclasses.replace(recipe(), param_groups=recipe().param_groups[:1])
    with pytest.raises(ValueError, match=r"no pattern of param_groups matches '0.weight'.*pattern='\.\*'"):
        optim.titan_config(narrow, "dct_adamw", rank=2).build(
            model_parts=[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.LayerNorm(4)]
        )
