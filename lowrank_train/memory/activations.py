"""What the forward pass of a LLaMA or an OPT leaves for backward, tensor by tensor, and what the loss needs.

N tokens in a micro-batch of sequences of T, h hidden, f feed-forward width, a heads, c bytes of the arithmetic. A
tensor is counted once, by whom it is made for; what only the forward pass needs is gone by the end of its layer.
Attention is torch's scaled_dot_product_attention, which keeps no T x T matrix. Where documents are kept apart, all
layers share one mask of T x T numbers per sequence, and keys and values are repeated to one per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_train.config.schema import Config
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.layers.spectral_product import factored_is_cheaper

__all__ = ["Activations", "Sizes", "activations", "loss_bytes", "sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one forward pass, and of its numbers."""

    tokens: int
    length: int
    hidden: int
    feed_forward: int
    heads: int
    key_values: int
    """Numbers of the keys, or the values, of a token."""
    chunk: int
    compute: int
    """Bytes of a number in the arithmetic."""
    exact: int
    """Bytes of a number in the loss and in LLaMA's norms: float32 or wider."""
    masked: bool = False
    """Whether attention is given a mask, which keeps documents apart."""

    @property
    def mask(self) -> int:
        """Bytes of the mask of attention and of the positions that it is made of."""
        return self.tokens * (self.length * self.compute + 8) * self.masked


@dataclass(frozen=True)
class Activations:
    """Bytes that wait for backward."""

    layers: list[int]
    """Activations of each decoder layer, when it is run to be differentiated."""
    recomputed: list[int]
    """The same, with what checkpointing kept of the layer: more, if the first norm copies its input to float32."""
    inputs: list[int]
    """What full checkpointing keeps of each layer."""
    selective: list[int]
    """What selective checkpointing keeps of each layer: that, and outputs of products and of attention."""
    around: int
    """Outside of the layers: embeddings, positions, the final norm; not the last hidden states."""
    feed_forward: int
    """More of them in the middle of a layer's backward: gradients of the widest tensors."""
    stream: int
    """One tensor of hidden states, N h."""
    norm_backward: int
    """More of them when a layer's backward ends, in its first norm."""
    forward: int
    """More of them in the middle of a layer's forward, where nothing is kept of it."""
    products: list[int]
    """What the widest linear layer of factors of each layer makes and frees again."""


def sizes(config: Config, model: PreTrainedModel) -> Sizes:
    """Return the sizes of a run's micro-batch."""
    architecture = model.config
    compute = {"float32": 4, "bfloat16": 2, "float64": 8}[config.precision]
    head = architecture.hidden_size // architecture.num_attention_heads
    return Sizes(
        tokens=config.micro_batch * config.seq_len,
        length=config.seq_len,
        hidden=architecture.hidden_size,
        feed_forward=getattr(architecture, "intermediate_size", None) or architecture.ffn_dim,
        heads=architecture.num_attention_heads,
        key_values=head * (getattr(architecture, "num_key_value_heads", None) or architecture.num_attention_heads),
        chunk=min(config.loss_chunk, config.micro_batch * config.seq_len),
        compute=compute,
        exact=max(4, compute),
        masked=config.data.separates,
    )


def activations(model: PreTrainedModel, size: Sizes) -> Activations:
    """Return the activations of a model as it is trained, its linear layers dense, spectral, low-rank or with adapters."""
    make = _opt if model.config.model_type == "opt" else _llama
    layer, around, norm_backward, products = make(model.config, size)
    is_opt = make is _opt
    copied = not is_opt and size.compute < size.exact
    decoder = model.get_decoder().layers
    stream = size.tokens * size.hidden * size.compute
    extra = [sum(_kept(module, size) for module in block.modules()) for block in decoder]
    wide = size.tokens * size.feed_forward * size.compute
    adapters = any(_is_adapter(module) for module in decoder.modules())  # what they add to an output, beside it
    return Activations(
        layers=[layer + more for more in extra],
        recomputed=[layer + more + stream * copied for more in extra],
        inputs=[stream] * len(decoder),
        selective=[stream + products + sum(_factors_kept(m, size) for m in block.modules()) for block in decoder],
        around=around + size.mask,
        feed_forward=2 * wide,  # LLaMA: of the product and its factors, less the product itself; OPT: both of relu's
        stream=stream,
        norm_backward=norm_backward,
        # OPT: relu's input and output, sum, norm, projection; LLaMA: silu, up, product, sum, norm
        forward=(2 * wide + 3 * stream if is_opt else 3 * wide + 2 * stream) + wide * adapters,
        products=[max((_product(module, size) for module in block.modules()), default=0) for block in decoder],
    )


def _llama(architecture: PretrainedConfig, size: Sizes) -> tuple[int, int, int, int]:
    tokens, c, exact = size.tokens, size.compute, size.exact
    stream = tokens * size.hidden
    # x in float32: in bfloat16 a copy, else the layer's input or the sum of the residual, of which it takes the place
    norm = exact * stream
    norm += exact * tokens  # 1 / rms of each token
    norm += c * stream  # x / rms, for the gradient of the weight
    norm += c * stream  # the norm's output, for the linear layers that read it
    attention = c * stream  # queries, turned by rotary embeddings
    read = size.hidden if size.masked else size.key_values
    attention += c * tokens * read  # keys, turned by rotary embeddings
    attention += c * tokens * read  # values
    attention += c * stream  # attention's output, for itself and for the output projection
    attention += 4 * tokens * size.heads  # its logsumexp, float32
    feed_forward = c * tokens * size.feed_forward * 4  # gate, silu(gate), up, and their product
    around = norm - c * stream  # the final norm; its output, the loss's hidden states, is counted there
    around += 2 * c * size.length * (size.hidden // size.heads)  # cosines and sines, shared by all layers
    around += 8 * tokens * 2  # token ids and labels
    products = c * (4 * stream + 2 * tokens * size.key_values)  # queries, keys, values, attention, two projections
    products += 4 * tokens * size.heads + 2 * c * tokens * size.feed_forward
    return 2 * norm + attention + feed_forward, around, 3 * exact * stream, products


def _opt(architecture: PretrainedConfig, size: Sizes) -> tuple[int, int, int, int]:
    tokens, c = size.tokens, size.compute
    stream = tokens * size.hidden
    norm = c * stream  # its input: the layer's, or a sum with the residual
    norm += 2 * 4 * tokens  # mean and 1 / deviation
    norm += c * stream  # its output, for what reads it
    attention = 4 * c * stream  # scaled queries, keys, values, output
    attention += 4 * tokens * size.heads  # logsumexp
    feed_forward = c * tokens * size.feed_forward  # relu's output; its input is not needed
    layer = 2 * norm + attention + feed_forward
    if architecture.dropout > 0:
        layer += 2 * tokens * size.hidden  # two masks, a byte each
    # input of the final norm; what the last one puts out, the loss's hidden states, is counted there
    around = norm - c * stream if architecture.do_layer_norm_before else 0
    if architecture.word_embed_proj_dim != size.hidden:
        around += c * tokens * architecture.word_embed_proj_dim + c * stream  # inputs of the two projections
    around += 8 * tokens * 4  # token ids, labels, positions
    products = 6 * c * stream + 4 * tokens * size.heads + c * tokens * size.feed_forward
    return layer, around, c * stream, products


def _kept(module: nn.Module, size: Sizes) -> int:
    """More than a dense linear layer keeps."""
    if isinstance(module, SpectralLinear):
        out, width = module.out_features, module.in_features
        if factored_is_cheaper(size.tokens, out, width, module.rank):
            return size.compute * size.tokens * min(out, width)  # Z = X V^T
        return 0
    if isinstance(module, LowRankLinear) or _is_adapter(module):
        return size.compute * size.tokens * _rank(module)  # A x
    return 0


def _factors_kept(module: nn.Module, size: Sizes) -> int:
    """Of a layer of factors or with adapters, what selective checkpointing keeps beside one output: A x, and B A x."""
    if isinstance(module, LowRankLinear):
        return size.compute * size.tokens * _rank(module)
    if _is_adapter(module):
        wrapped: Any = module
        return int(size.compute * size.tokens * (_rank(module) + wrapped.base_layer.out_features))
    return 0


def _product(module: nn.Module, size: Sizes) -> int:
    """What a spectral layer makes of its factors, at most, in backward: U, V, W and dL/dW, and one product of both."""
    if not isinstance(module, SpectralLinear):
        return 0
    out, width, tokens = module.out_features, module.in_features, size.tokens
    k = min(out, width)
    factors = k * (out + width)
    if factored_is_cheaper(tokens, out, width, module.rank):
        return size.compute * (factors + k * max(out, width) + tokens * k)  # and sigma V or sigma U, dZ
    return size.compute * (factors + 2 * out * width)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _rank(module: Any) -> int:
    if _is_adapter(module):
        return sum(int(factor.weight.shape[0]) for factor in module.lora_A.values())
    return int(module.rank)


def loss_bytes(size: Sizes, vocabulary: int, width: int, *, trains_head: bool) -> tuple[int, int, int]:
    """Return the bytes of the chunked loss: at its peak, as logits of that peak, and what it keeps for backward.

    Args:
        size: of the forward pass.
        vocabulary: V.
        width: of the head's input.
        trains_head: whether the head's weight takes a gradient.
    """
    c, e, chunk = size.compute, size.exact, size.chunk * vocabulary
    head = vocabulary * width if trains_head else 0
    hidden = size.tokens * width * c  # gradient of the hidden states
    total = e * head  # gradient of the head, summed over the chunks
    masked = (3 * e if c == e else 3 * e + c) * chunk  # logits, softmax, softmax without ignored labels (rounded)
    product = (e + c) * chunk  # logits and their gradient, beside one chunk's gradient of the head
    logits, beside = max((masked, total), (product, total + c * head), key=sum)
    kept = hidden + c * head
    rounding = 0 if c == e else c * head  # the sum and its rounded copy, when the last chunk is done: logits remain
    return hidden + max(logits + beside, product + total + rounding), logits, kept
