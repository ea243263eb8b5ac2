"""A Transformer that translates, in either space: encoder, decoder, scores of words, greedy decoding.

A sentence is its tokens and the end token; the decoder reads the end token first, then what it has written. Sentences
of a batch are padded on the right with anything; ``lengths`` say what is there, and nothing that is not is ever seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic.classifiers import LorentzClassifier
from lowrank_train.hyperbolic.spaces import SPACES
from lowrank_train.hyperbolic.translation.config import TranslationModelConfig
from lowrank_train.hyperbolic.translation.layers import (
    EuclideanAttentionBlock,
    EuclideanDecision,
    EuclideanFeedForward,
    EuclideanWords,
    LorentzAttentionBlock,
    LorentzFeedForward,
    LorentzWords,
)

__all__ = ["LINEAR_MAPS", "Translator", "padding_mask"]

LINEAR_MAPS = r"^(encoder|decoder)\."
"""The ``nn.Linear`` that SST, LoRA and ReLoRA* replace: attention and feed-forward, as Zhao et al. do."""


class _Layers(NamedTuple):
    """The layers of a space; those of the Lorentz model also take its curvature and the largest time."""

    words: Callable[..., nn.Module]
    """(b, n) tokens -> (b, n, width)."""
    attention: Callable[..., nn.Module]
    """(b, n, width), (b, m, width), mask -> (b, n, width)."""
    feed_forward: Callable[..., nn.Module]
    """(b, n, width) -> (b, n, width)."""
    decision: Callable[..., nn.Module]
    """(..., width) -> (..., words), scores."""


def _lorentz(model: TranslationModelConfig) -> _Layers:
    inside: dict[str, Any] = {"curvature": model.curvature, "max_time": model.max_time}
    return _Layers(
        words=partial(LorentzWords, **inside),
        attention=partial(LorentzAttentionBlock, **inside),
        feed_forward=partial(LorentzFeedForward, **inside),
        decision=partial(LorentzClassifier, curvature=model.curvature, radius=0.1),  # close: no word is preferred
    )


def _euclidean(_: TranslationModelConfig) -> _Layers:
    return _Layers(EuclideanWords, EuclideanAttentionBlock, EuclideanFeedForward, EuclideanDecision)


_LAYERS = {"lorentz": _lorentz, "euclidean": _euclidean}
"""Value of ``model.geometry`` -> its layers."""


class Translator(nn.Module):
    """Encoder and decoder of equally many layers.

    Args:
        model: the sizes.
        words: entries of the vocabulary that both languages share.

    Raises:
        UserError: the width does not divide by the heads.
    """

    def __init__(self, model: TranslationModelConfig, words: int) -> None:
        super().__init__()
        width, heads = model.width, model.heads
        if width % heads or width // heads < 2:
            raise UserError(
                f"model.width={width} with model.heads={heads}; expected a multiple of the heads, of 2 or more each"
            )
        self.parts, self.places = SPACES[model.geometry](model.curvature), model.places
        layers = _LAYERS[model.geometry](model)
        self.source, self.target = (layers.words(words, model.places, width) for _ in range(2))
        self.encoder = nn.ModuleList(_EncoderLayer(layers, model) for _ in range(model.layers))
        self.decoder = nn.ModuleList(_DecoderLayer(layers, model) for _ in range(model.layers))
        self.decision = layers.decision(width, words)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (b, m) and lengths (b,) to memory (b, m, width) and the mask of what is there, (b, 1, 1, m)."""
        seen = padding_mask(lengths, source.shape[1])
        x = self.source(source)
        for layer in self.encoder:
            x = layer(x, seen)
        return x, seen

    def decode(self, target: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Map the tokens read so far (b, n), and the result of ``encode``, to (b, n, width); a place sees none after
        it.
        """
        n = target.shape[1]
        earlier = torch.ones(n, n, dtype=torch.bool, device=target.device).tril()
        x: Tensor = self.target(target)
        for layer in self.decoder:
            x = layer(x, memory, earlier, seen)
        return x

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return scores of the word after each of ``target``: (b, m), (b,), (b, n) -> (b, n, words)."""
        memory, seen = self.encode(source, lengths)
        scores: Tensor = self.decision(self.decode(target, memory, seen))
        return scores

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: Tensor, *, end: int, longest: int) -> list[list[int]]:
        """Choose the best word each time, until the end token or ``longest`` words; the result is without the end
        token.

        Args:
            source: (b, m).
            lengths: (b,).
            end: token that begins and ends a sentence.
            longest: at most the places of the model.
        """
        memory, seen = self.encode(source, lengths)
        rows = torch.arange(len(source))  # sentences that have not ended
        read = torch.full((len(source), 1), end)
        written: list[list[int]] = [[] for _ in range(len(source))]
        for _ in range(min(longest, self.places)):
            words = self.decision(self.decode(read, memory, seen)[:, -1]).argmax(-1)
            going = words != end
            for row, word in zip(rows[going].tolist(), words[going].tolist(), strict=True):
                written[row].append(word)
            rows, memory, seen = rows[going], memory[going], seen[going]
            read = torch.cat([read[going], words[going].unsqueeze(1)], dim=1)
            if not len(rows):
                break
        return written

    def points(self) -> dict[str, Tensor]:
        """Return the parameters whose rows are points, by name; none in Euclidean space."""
        return {
            f"{prefix}.{name}": module.get_parameter(name)
            for prefix, module in self.named_modules()
            for name in getattr(module, "parameter_manifolds", {})
        }


class _EncoderLayer(nn.Module):
    def __init__(self, layers: _Layers, model: TranslationModelConfig) -> None:
        super().__init__()
        self.attention = layers.attention(model.width, model.heads, dropout=model.dropout)
        self.feed_forward = layers.feed_forward(model.width, model.inner_width, dropout=model.dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.attention(x, x, seen))
        return out


class _DecoderLayer(nn.Module):
    def __init__(self, layers: _Layers, model: TranslationModelConfig) -> None:
        super().__init__()
        self.attention, self.cross_attention = (
            layers.attention(model.width, model.heads, dropout=model.dropout) for _ in range(2)
        )
        self.feed_forward = layers.feed_forward(model.width, model.inner_width, dropout=model.dropout)

    def forward(self, x: Tensor, memory: Tensor, earlier: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, x, earlier)
        out: Tensor = self.feed_forward(self.cross_attention(x, memory, seen))
        return out


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """Return True where a token is, (b,) -> (b, 1, 1, width)."""
    return (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1))[:, None, None]
