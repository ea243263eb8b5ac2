"""OPT (Zhang et al., arXiv 2205.01068): layer norms with biases, learned positions, relu."""

from __future__ import annotations

from typing import Any

from lowrank_train.models.families.family import Family, LayerBytes, Sizes

__all__ = ["OPT"]


def activations(config: Any, size: Sizes) -> LayerBytes:
    """Return what an OPT keeps for backward, tensor by tensor.

    Args:
        config: of the model.
        size: of the forward pass.
    """
    tokens, c = size.tokens, size.compute
    stream, wide = tokens * size.hidden, c * tokens * size.feed_forward
    norm = c * stream  # its input: the layer's, or a sum with the residual
    norm += 2 * 4 * tokens  # mean and 1 / deviation
    norm += c * stream  # its output, for what reads it
    attention = 4 * c * stream  # scaled queries, keys, values, output
    attention += 4 * tokens * size.heads  # logsumexp
    layer = 2 * norm + attention + wide  # relu's output; its input is not needed
    if config.dropout > 0:
        layer += 2 * tokens * size.hidden  # two masks, a byte each
    # input of the final norm; what the last one puts out, the loss's hidden states, is counted there
    around = norm - c * stream if config.do_layer_norm_before else 0
    if config.word_embed_proj_dim != size.hidden:
        around += c * tokens * config.word_embed_proj_dim + c * stream  # inputs of the two projections
    around += 8 * tokens * 4  # token ids, labels, positions
    return LayerBytes(
        layer=layer,
        copied=0,
        around=around,
        products=6 * c * stream + 4 * tokens * size.heads + wide,
        forward=2 * wide + 3 * c * stream,  # relu's input and output, sum, norm, projection
        feed_forward=2 * wide,  # of relu's input and output
        norm_backward=c * stream,
    )


def _size(hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, **others}


OPT = Family(
    model_type="opt",
    matrices=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    # pretraining sees each token about once; model.overrides.dropout=0.1 is the original recipe
    defaults={"vocab_size": 50272, "dropout": 0.0},
    sizes={  # table 1; 350M is the one with post-norm and narrower embeddings
        "opt_125m": _size(768, 12, 12),
        "opt_350m": _size(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        "opt_1.3b": _size(2048, 24, 32),
        "opt_2.7b": _size(2560, 32, 32),
        "opt_6.7b": _size(4096, 32, 32),
    },
    learned_positions=True,
    feed_forward="ffn_dim",
    activations=activations,
)
