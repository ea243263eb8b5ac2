"""LLaMA (Touvron et al., arXiv 2302.13971): root-mean-square norms, rotary positions, a gated feed-forward layer."""

from __future__ import annotations

from typing import Any

from lowrank_train.models.families.family import Family, LayerBytes, Sizes

__all__ = ["LLAMA", "rms_norm"]


def rms_norm(tokens: int, width: int, size: Sizes) -> int:
    """Return the bytes that a root-mean-square norm of (tokens, width) numbers keeps for backward."""
    kept = size.exact * tokens * width  # x in float32: a copy in bfloat16, else the input or the sum of the residual
    kept += size.exact * tokens  # 1 / rms of each token
    return kept + size.compute * tokens * width  # x / rms, for the gradient of the weight


def activations(config: Any, size: Sizes) -> LayerBytes:
    """Return what a LLaMA keeps for backward, tensor by tensor.

    Attention is torch's ``scaled_dot_product_attention``, which keeps no T x T matrix. Beside a mask, transformers
    repeats keys and values to one per head.

    Args:
        config: of the model, of which nothing beyond ``size`` is needed.
        size: of the forward pass.
    """
    tokens, c, exact = size.tokens, size.compute, size.exact
    stream, wide = tokens * size.hidden, c * tokens * size.feed_forward
    norm = rms_norm(tokens, size.hidden, size) + c * stream  # and its output, for the linear layers that read it
    attention = c * tokens * size.queries  # queries, turned by rotary embeddings
    attention += c * tokens * size.read  # keys, turned by rotary embeddings
    attention += c * tokens * size.read  # values
    attention += c * tokens * size.queries  # attention's output, for itself and for the output projection
    attention += 4 * tokens * size.heads  # its logsumexp, float32
    around = norm - c * stream  # the final norm; its output, the loss's hidden states, is counted there
    around += 2 * c * size.length * size.head  # cosines and sines, shared by all layers
    around += 8 * tokens * 2  # token ids and labels
    products = c * tokens * (2 * size.queries + 2 * size.key_values)  # queries, attention, keys, values
    products += 2 * c * stream + 4 * tokens * size.heads + 2 * wide  # two projections, logsumexp, gate, up
    return LayerBytes(
        layer=2 * norm + attention + 4 * wide,  # gate, silu(gate), up, and their product
        copied=c * stream * (c < exact),
        around=around,
        products=products,
        forward=3 * wide + 2 * c * stream,  # silu, up, product, sum, norm
        feed_forward=2 * wide,  # of the product and its factors, less the product itself
        norm_backward=3 * exact * stream,
    )


def _size(hidden: int, feed_forward: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


LLAMA = Family(
    model_type="llama",
    matrices=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    defaults={"vocab_size": 32000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    sizes={  # of ReLoRA and GaLore (arXiv 2307.05695, 2403.03507)
        "llama_9m": _size(128, 352, 4, 4),
        "llama_20m": _size(256, 688, 4, 4),
        "llama_35m": _size(384, 1024, 6, 8),
        "llama_60m": _size(512, 1376, 8, 8),
        "llama_130m": _size(768, 2048, 12, 12),
        "llama_350m": _size(1024, 2736, 24, 16),
        "llama_1b": _size(2048, 5461, 24, 32),
        "llama_3b": _size(2560, 6848, 32, 32),
        "llama_7b": _size(4096, 11008, 32, 32),
    },
    for_tests=("llama_9m", "llama_20m", "llama_35m"),
    activations=activations,
)
