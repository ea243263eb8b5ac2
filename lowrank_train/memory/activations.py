"""What the forward pass leaves for backward, and what the loss needs.

A family of models says what its dense layers keep (``models/families/``); here is what other layers add to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowrank_train.config.schema import Config
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.layers.spectral_product import factored_is_cheaper
from lowrank_train.models.families import Family, Sizes, family_of
from lowrank_train.models.packing import attention_windows

__all__ = ["Activations", "activations", "loss_bytes", "sizes"]


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
    architecture, length = model.config, config.seq_len
    compute = {"float32": 4, "bfloat16": 2, "float64": 8}[config.precision]
    heads, tokens = architecture.num_attention_heads, config.micro_batch * length
    windows = attention_windows(architecture, length)
    masked = config.data.separates or any(windows.values())
    # one for all sequences where only windows make it; beside it the positions of documents
    masks = len(windows) * (tokens if config.data.separates else length) * length * compute * masked
    return Sizes(
        tokens=tokens,
        length=length,
        hidden=architecture.hidden_size,
        feed_forward=getattr(architecture, _family(model).feed_forward),
        heads=heads,
        key_value_heads=getattr(architecture, "num_key_value_heads", None) or heads,
        head=getattr(architecture, "head_dim", None) or architecture.hidden_size // heads,
        chunk=min(config.loss_chunk, tokens),
        compute=compute,
        exact=max(4, compute),
        mask=masks + 8 * tokens * config.data.separates,
    )


def activations(model: PreTrainedModel, size: Sizes) -> Activations:
    """Return the activations of a model as it is trained, its linear layers dense, spectral, low-rank or adapted.

    The model's family must have ``activations``.
    """
    formula = _family(model).activations
    assert formula is not None
    of = formula(model.config, size)
    decoder = model.get_decoder().layers
    stream = size.tokens * size.hidden * size.compute
    extra = [sum(_kept(module, size) for module in block.modules()) for block in decoder]
    wide = size.tokens * size.feed_forward * size.compute
    adapters = any(_is_adapter(module) for module in decoder.modules())  # what they add to an output, beside it
    return Activations(
        layers=[of.layer + more for more in extra],
        recomputed=[of.layer + of.copied + more for more in extra],
        inputs=[stream] * len(decoder),
        selective=[stream + of.products + sum(_factors_kept(m, size) for m in block.modules()) for block in decoder],
        around=of.around + size.mask,
        feed_forward=of.feed_forward,
        stream=stream,
        norm_backward=of.norm_backward,
        forward=of.forward + wide * adapters,
        products=[max((_product(module, size) for module in block.modules()), default=0) for block in decoder],
    )


def _family(model: PreTrainedModel) -> Family:
    return family_of(model.config.model_type, "the model of a run")


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
