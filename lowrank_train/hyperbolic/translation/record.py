"""What a translation run was and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_train.hyperbolic.record import NetworkRecord

__all__ = ["TranslationRecord"]


@dataclass(kw_only=True)
class TranslationRecord(NetworkRecord):
    """One run. BLEU from 0 to 100, losses in nats per token."""

    bleu: dict[str, float]
    """BLEU of validation and test, by greedy decoding; empty for a run that was interrupted."""
    bleu_signature: str
    """The signature of sacrebleu, which says exactly what was computed."""
    validation_loss: float | None
    """Without label smoothing, of the last network."""
    steps: int
    epochs: float
    """Passes over the training part, the last one in part."""
    trainable_in_layers: int
    """Trainable parameters of encoder and decoder layers; the others are words, places and the decision."""
    manifold_error: dict[str, float]
    """Largest |<x, x> / k + 1|: of each parameter that holds points, of the encoder's and of the decoder's outputs."""
    time_error: dict[str, float]
    """The largest error of x_0, relative to what it should be."""
