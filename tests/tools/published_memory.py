"""Memory columns of papers, by their own conventions: what we reproduce, and what we cannot.

SCALE's table (Glentis et al., arXiv 2506.16659; README of OptimAI-Lab) counts bfloat16 weights and optimizer states,
embeddings, head and norms under Adam, in GB of 10^9 bytes; no gradients, activations or logits. All of it follows from
the shapes but GaLore's 350M cell, which would need rank 384, not the table's 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import build as models

__all__ = ["SCALE_TABLE", "Cell", "weights_and_states"]

RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512, "llama_7b": 256}
"""Of GaLore's and SCALE's tables; APOLLO at 7B."""


class Cell(NamedTuple):
    """One printed number."""

    method: str
    model: str
    gigabytes: float


def _row(method: str, *gigabytes: float) -> list[Cell]:
    return [Cell(method, model, value) for model, value in zip(RANKS, gigabytes, strict=False)]


SCALE_TABLE: list[Cell] = [
    *_row("adam", 0.35, 0.81, 2.21, 8.04),
    *_row("muon", 0.23, 0.54, 1.47, 5.36),
    *_row("galore", 0.28, 0.61, 1.59, 4.76),
    *_row("apollo_mini", 0.25, 0.46, 1.00, 3.20, 14.53),
    *_row("scale", 0.15, 0.32, 0.80, 2.81, 13.74),
    Cell("apollo", "llama_7b", 16.14),
]


def weights_and_states(method: str, model: str, *, rank: int | None = None) -> int:
    """Bytes by the table's convention.

    Args:
        method: of ``SCALE_TABLE``.
        model: a LLaMA of the table.
        rank: other than the table's.
    """
    architecture = models.architecture(ModelConfig(name=model))
    skeleton = models.skeleton(architecture, torch.bfloat16)
    weights = 2 * models.parameter_count(skeleton)
    return weights + _states(method, skeleton, RANKS[model] if rank is None else rank)


def _states(method: str, model: nn.Module, rank: int) -> int:
    if method == "muon":  # one average for everything, the embeddings too
        return 2 * models.parameter_count(model)
    name = {"adam": "adamw", "galore": "galore_adamw"}.get(method, method)
    arguments = {"rank": rank} if name in ("galore_adamw", "apollo") else {}
    return optim.predicted_state_bytes(name, model, **arguments)
