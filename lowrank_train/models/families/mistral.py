"""Mistral (Jiang et al., arXiv 2310.06825): a LLaMA whose tokens see a window of those before them.

It keeps for backward what a LLaMA keeps: keys and values of fewer heads, and the mask of a window, are in the sizes.
"""

from __future__ import annotations

from dataclasses import replace

from lowrank_train.models.families.llama import LLAMA

__all__ = ["MISTRAL"]

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    defaults={"vocab_size": 32000, "rms_norm_eps": 1e-5, "sliding_window": 4096, "tie_word_embeddings": False},
    sizes={
        "mistral_7b": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    },
    for_tests=(),
)
