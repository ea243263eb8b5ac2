"""Lightning: one process, and its FSDP2 strategy on two; resume."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lowrank_train import optim
from tests.optim.frameworks.harness import (
    LR,
    MAX_NORM,
    STEPS,
    create,
    difference,
    is_sharded,
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

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
strategies = pytest.importorskip("lightning.pytorch.strategies")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")


class Lit(lightning.LightningModule):
    """Sharded where the strategy has a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = load_model().train()
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create(self)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, tokens: Tensor) -> Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)


def train(
    accumulate: int = 1, checkpoint: str | None = None, save: bool = False, module: type[Lit] = Lit
) -> dict[str, Any]:
    ranks = dist.get_world_size()
    batches = [tokens.chunk(ranks)[dist.get_rank()] for tokens in torch.load("my_tokens.pt")]
    batches = [part for batch in batches for part in batch.chunk(accumulate)]
    if checkpoint is not None:  # Lightning counts batches, but leaves their order to the loader
        batches = batches[3:] + batches[:3]
    sharding = strategies.ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    saving = callbacks.ModelCheckpoint(f"lit-{ranks}", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    lit = module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=sharding if ranks > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        logger=False,
        callbacks=[saving] if save else [],
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(lit, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
    optimizer = trainer.optimizers[0]
    return {
        "losses": mean_over_ranks(lit.losses),
        "rates": lit.rates,
        "decays": {group["role"]: group["weight_decay"] for group in optimizer.param_groups},
        "sharded": is_sharded(lit),
        "share": sharded_share(optimizer),
        "values": {**named_weights(lit), **named_states(optimizer)},
    }


@cache
def plain(folder: Path) -> list[float]:
    return run_ranks(lambda: plain_losses(create)[0], 1, folder)[0]


def check(result: dict[str, Any], ranks: int, expected: list[float], accumulate: int = 1) -> None:
    losses = torch.tensor(result["losses"]).view(STEPS, accumulate).mean(1).tolist()
    assert difference(losses, expected) < 1e-5
    assert result["sharded"] == (ranks > 1)
    assert (0.45 < result["share"] < 0.55) if ranks > 1 else result["share"] == 1
    assert result["rates"] == pytest.approx([LR * (1 - step / STEPS) for step in range(STEPS)])
    assert result["decays"] == {"matrix": 0.1, "embedding": 0.1, "head": 0.1, "vector": 0.0}


def test_accumulated_losses_are_those_of_the_plain_loop(material: Path) -> None:
    for result in run_ranks(lambda: train(2), 2, material):
        check(result, 2, plain(material), accumulate=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_the_plain_loop_and_resume_is_exact(ranks: int, material: Path) -> None:
    def both() -> list[dict[str, Any]]:
        return [train(save=True), train(checkpoint=f"lit-{ranks}/step=3.ckpt")]

    for at_once, in_two in run_ranks(both, ranks, material):
        check(at_once, ranks, plain(material))
        assert in_two["losses"] == at_once["losses"][3:]
        assert_equal(in_two["values"], at_once["values"])


class Fused(Lit):
    """Updates in backward, attached when training begins; the optimizer arrives in Lightning's wrapper."""

    def on_train_start(self) -> None:
        optim.attach_to_backward(self, self.optimizers(), max_norm=MAX_NORM)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        assert all(slot.param.grad is None for slot in optimizer.slots() if slot.group["role"] == "matrix")


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_in_backward(ranks: int, material: Path) -> None:
    for result in run_ranks(lambda: train(module=Fused), ranks, material):
        check(result, ranks, plain(material))
