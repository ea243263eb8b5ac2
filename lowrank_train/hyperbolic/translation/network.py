"""A Transformer that translates, in either space: encoder, decoder, scores of words, greedy decoding.

A sentence is its tokens and the end token; the decoder reads the end token first, then what it has written. Sentences
of a batch are padded on the right with anything; ``lengths`` say what is there, and nothing that is not is ever seen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic.classifiers import LorentzClassifier
from lowrank_train.hyperbolic.translation.layers import (
    EuclideanAttentionBlock,
    EuclideanDecision,
    EuclideanFeedForward,
    EuclideanWords,
    LorentzAttentionBlock,
    LorentzFeedForward,
    LorentzWords,
)

__all__ = ["LINEAR_MAPS", "SPACES", "EuclideanParts", "LorentzParts", "Parts", "Translator", "padding_mask"]

LINEAR_MAPS = r"^(encoder|decoder)\."
"""The ``nn.Linear`` that SST, LoRA and ReLoRA* replace: attention and feed-forward, as Zhao et al. do."""


class Parts(ABC):
    """Abstract: the layers of a space.

    Args:
        curvature: k; Euclidean space has no use for it, nor for the next.
        max_time: of points, see ``LorentzLinear``.

    Raises:
        UserError: one of them is not positive.
    """

    def __init__(self, curvature: float, max_time: float = 10.0) -> None:
        self.curvature = lorentz.check_curvature(curvature)
        if not 0 < max_time < math.inf:
            raise UserError(f"max_time={max_time}; expected a number > 0")
        self.max_time = max_time

    @abstractmethod
    def words(self, words: int, places: int, width: int) -> nn.Module:
        """Make a layer from tokens (b, n) to (b, n, width)."""

    @abstractmethod
    def attention(self, width: int, heads: int, dropout: float) -> nn.Module:
        """Make a layer from (b, n, width), (b, m, width) and mask to (b, n, width)."""

    @abstractmethod
    def feed_forward(self, width: int, inner_width: int, dropout: float) -> nn.Module:
        """Make a layer from (b, n, width) to (b, n, width)."""

    @abstractmethod
    def decision(self, width: int, words: int) -> nn.Module:
        """Make a layer from (..., width) to scores (..., words)."""

    @abstractmethod
    def error(self, x: Tensor) -> float:
        """Return ``lorentz.manifold_error``; 0 where everything is space."""

    @abstractmethod
    def time_error(self, x: Tensor) -> float:
        """Return ``lorentz.time_error``; 0 where everything is space."""


class LorentzParts(Parts):
    """Hyperbolic space; words and the centres that scores are distances to are points."""

    def words(self, words: int, places: int, width: int) -> nn.Module:
        """Make ``LorentzWords``."""
        return LorentzWords(words, places, width, curvature=self.curvature, max_time=self.max_time)

    def attention(self, width: int, heads: int, dropout: float) -> nn.Module:
        """Make a ``LorentzAttentionBlock``."""
        return LorentzAttentionBlock(width, heads, dropout=dropout, curvature=self.curvature, max_time=self.max_time)

    def feed_forward(self, width: int, inner_width: int, dropout: float) -> nn.Module:
        """Make a ``LorentzFeedForward``."""
        return LorentzFeedForward(width, inner_width, dropout=dropout, curvature=self.curvature, max_time=self.max_time)

    def decision(self, width: int, words: int) -> nn.Module:
        """Make a ``LorentzClassifier``: 2 k + 2 <x, c> + bias.

        Centres begin close together, so that no word is preferred.
        """
        return LorentzClassifier(width, words, curvature=self.curvature, radius=0.1)

    def error(self, x: Tensor) -> float:
        """Return the largest |<x, x> / k + 1|."""
        return lorentz.manifold_error(x, self.curvature)

    def time_error(self, x: Tensor) -> float:
        """Return the largest relative error of a time."""
        return lorentz.time_error(x, self.curvature)


class EuclideanParts(Parts):
    """Ordinary space."""

    def words(self, words: int, places: int, width: int) -> nn.Module:
        """Make ``EuclideanWords``."""
        return EuclideanWords(words, places, width)

    def attention(self, width: int, heads: int, dropout: float) -> nn.Module:
        """Make a ``EuclideanAttentionBlock``."""
        return EuclideanAttentionBlock(width, heads, dropout=dropout)

    def feed_forward(self, width: int, inner_width: int, dropout: float) -> nn.Module:
        """Make a ``EuclideanFeedForward``."""
        return EuclideanFeedForward(width, inner_width, dropout=dropout)

    def decision(self, width: int, words: int) -> nn.Module:
        """Make a ``EuclideanDecision``."""
        return EuclideanDecision(width, words)

    def error(self, x: Tensor) -> float:
        """Return 0; infinite if something is not finite."""
        return 0.0 if bool(torch.isfinite(x).all()) else float("inf")

    def time_error(self, x: Tensor) -> float:
        """Return 0, because there is no time."""
        return 0.0


SPACES: dict[str, type[Parts]] = {"lorentz": LorentzParts, "euclidean": EuclideanParts}
"""Value of ``model.geometry`` -> its layers."""


class Translator(nn.Module):
    """Encoder and decoder of equally many layers.

    Args:
        parts: the space.
        words: entries of the vocabulary that both languages share.
        places: longest sentence, end token included.
        width: coordinates, times included.
        inner_width: of the feed-forward layers.
        layers: of the encoder, and of the decoder.
        heads: of attention.
        dropout: of what enters the last linear map of each layer.

    Raises:
        UserError: sizes out of range.
    """

    def __init__(
        self,
        parts: Parts,
        words: int,
        *,
        places: int,
        width: int,
        inner_width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for key, got in (("layers", layers), ("heads", heads), ("places", places)):
            if got < 1:
                raise UserError(f"model.{key}={got}; expected at least 1")
        if width % heads or width // heads < 2:
            raise UserError(
                f"model.width={width} with model.heads={heads}; expected a multiple of the heads, of 2 or more each"
            )
        if inner_width < 2:
            raise UserError(f"model.inner_width={inner_width}; expected at least 2")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout}; expected a number from 0 to below 1")
        self.parts, self.places = parts, places
        self.source, self.target = (parts.words(words, places, width) for _ in range(2))
        self.encoder = nn.ModuleList(_EncoderLayer(parts, width, inner_width, heads, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(_DecoderLayer(parts, width, inner_width, heads, dropout) for _ in range(layers))
        self.decision = parts.decision(width, words)

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
    def __init__(self, parts: Parts, width: int, inner_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = parts.attention(width, heads, dropout)
        self.feed_forward = parts.feed_forward(width, inner_width, dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.attention(x, x, seen))
        return out


class _DecoderLayer(nn.Module):
    def __init__(self, parts: Parts, width: int, inner_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.cross_attention = (parts.attention(width, heads, dropout) for _ in range(2))
        self.feed_forward = parts.feed_forward(width, inner_width, dropout)

    def forward(self, x: Tensor, memory: Tensor, earlier: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, x, earlier)
        out: Tensor = self.feed_forward(self.cross_attention(x, memory, seen))
        return out


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """Return True where a token is, (b,) -> (b, 1, 1, width)."""
    return (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1))[:, None, None]
