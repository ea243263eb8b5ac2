"""Loss on held-out text: every token weighs the same, on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.common.progress import show_progress
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import Config
from lowrank_train.optim.shards.placements import reshard
from lowrank_train.text.labels import IGNORED, positions, split

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: Tensor, config: Config, ranks: Ranks) -> float:
    """Return the mean loss in nats per token.

    Args:
        model: sharded, with its ``token_loss``.
        blocks: (n, length + 1) as stored, ``IGNORED`` where there is no token; the same on every rank.
        config: of the run.
        ranks: all of them must call.
    """
    model.eval()
    share = -(-blocks.shape[0] // ranks.world_size)
    padding = blocks.new_full((share * ranks.world_size - blocks.shape[0], blocks.shape[1]), IGNORED)
    mine = torch.cat([blocks, padding])[ranks.rank :: ranks.world_size]  # equal counts: each forward is a collective
    total = torch.zeros(2, dtype=torch.float64)
    for batch in show_progress(mine.split(config.micro_batch), "evaluating", "batches", active=ranks.is_first):
        inputs, labels = (part.to(ranks.device) for part in split(batch))
        apart = positions(batch).to(ranks.device) if config.data.separates else None
        loss = model.token_loss(inputs, labels, config.loss_chunk, apart)
        total += torch.tensor([loss.item(), int((labels != IGNORED).sum())], dtype=torch.float64)
    reshard(model)  # the root group stays gathered after a forward without backward
    model.train()
    loss_sum, tokens = ranks.sum(total).tolist()
    return loss_sum / tokens
