"""Qwen3 (arXiv 2505.09388), dense: a LLaMA with heads of 128 numbers, and norms of each head's queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank_train.models.families import llama
from lowrank_train.models.families.family import LayerBytes, Sizes
from lowrank_train.models.families.llama import LLAMA, rms_norm

__all__ = ["QWEN3"]


def activations(config: Any, size: Sizes) -> LayerBytes:
    """Return what a Qwen3 keeps for backward: what a LLaMA keeps, and inputs of two norms more.

    The norms' outputs are turned by rotary embeddings, whose backward does not need them.
    """
    base = llama.activations(config, size)
    norms = rms_norm(size.tokens * size.heads, size.head, size)  # of the queries
    norms += rms_norm(size.tokens * size.key_value_heads, size.head, size)  # of the keys
    return replace(base, layer=base.layer + norms)


def _size(hidden: int, feed_forward: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    defaults={
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    sizes={
        "qwen3_0.6b": _size(1024, 3072, 28, 16, tied=True),
        "qwen3_1.7b": _size(2048, 6144, 28, 16, tied=True),
        "qwen3_4b": _size(2560, 9728, 36, 32, tied=True),
        "qwen3_8b": _size(4096, 12288, 36, 32, tied=False),
        "qwen3_14b": _size(5120, 17408, 40, 40, tied=False),
        "qwen3_32b": _size(5120, 25600, 64, 64, tied=False),
    },
    for_tests=(),
    activations=activations,
)
