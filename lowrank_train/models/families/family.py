"""What is known of a family of models: its sizes, the names of its matrices, and what its layers keep for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Family", "LayerBytes", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one forward pass, and of its numbers."""

    tokens: int
    """N, in a micro-batch."""
    length: int
    """T, tokens of a sequence."""
    hidden: int
    """h."""
    feed_forward: int
    """f."""
    heads: int
    """a, of the queries."""
    key_value_heads: int
    """Heads of the keys and of the values."""
    head: int
    """Numbers of a token in one head."""
    chunk: int
    """Tokens whose logits exist at one time."""
    compute: int
    """c, bytes of a number in the arithmetic."""
    exact: int
    """Bytes of a number in the loss and in root-mean-square norms: float32 or wider."""
    mask: int = 0
    """Bytes of the masks of attention, which all layers share; 0 where attention is given none."""

    @property
    def queries(self) -> int:
        """Numbers of the queries of a token, and of attention's output."""
        return self.heads * self.head

    @property
    def key_values(self) -> int:
        """Numbers of the keys, or the values, of a token."""
        return self.key_value_heads * self.head

    @property
    def read(self) -> int:
        """Numbers of the keys, or the values, of a token as attention reads them: beside a mask one head per query."""
        return self.queries if self.mask else self.key_values


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of tensors that wait for backward, or exist beside them, in a model of dense layers.

    A tensor is counted once, by whom it is made for. What only the forward pass needs is gone by the end of its layer.
    """

    layer: int
    """What a decoder layer keeps when it is run to be differentiated."""
    copied: int
    """More of them when the layer is recomputed: the first norm's copy of its input."""
    around: int
    """Outside of the layers: embeddings, positions, the final norm; neither masks nor the last hidden states."""
    products: int
    """What selective checkpointing keeps of a layer beside its input: outputs of matrix products and of attention."""
    forward: int
    """More of them in the middle of a layer's forward, where nothing is kept of it."""
    feed_forward: int
    """More of them in the middle of a layer's backward: gradients of the widest tensors."""
    norm_backward: int
    """More of them when a layer's backward ends, in its first norm."""


@dataclass(frozen=True)
class Family:
    """One kind of model of Hugging Face's transformers, which is one value of ``model_type`` in a config.json."""

    model_type: str
    """The name that transformers gives the family."""
    matrices: tuple[str, ...]
    """Last parts of the names of a layer's linear modules, which methods train, replace or compress."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the configuration that all sizes share, where transformers has other values."""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name, ``model_type`` and ``_`` first -> keys of the configuration, smallest first."""
    for_tests: tuple[str, ...] = ()
    """Sizes that are too small to be of use, which a table of what fits leaves out."""
    learned_positions: bool = False
    """Whether a sequence can be no longer than the table of positions that the model has learned."""
    feed_forward: str = "intermediate_size"
    """Key of the configuration that holds the width of the feed-forward layer."""
    activations: Callable[[Any, Sizes], LayerBytes] | None = None
    """Configuration and sizes -> what a layer keeps for backward. None: the memory of a step is not predicted."""
