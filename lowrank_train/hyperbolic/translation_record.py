"""What a translation run was and what came out of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TranslationRecord"]


@dataclass
class TranslationRecord:
    """One run. BLEU from 0 to 100, losses in nats per token, times in seconds, memory in GiB (2^30 bytes) or bytes."""

    status: str
    """finished or interrupted (resumable)."""
    geometry: str
    optimizer: dict[str, Any]
    bleu: dict[str, float]
    """Of validation and test, by greedy decoding; empty for a run that was interrupted."""
    bleu_signature: str
    """Of sacrebleu: says exactly what was computed."""
    validation_loss: float | None
    """Without label smoothing, of the last network."""
    steps: int
    epochs: float
    """Passes over the training part, the last one in part."""
    seconds: float
    """Of training and losses on validation, over all sessions; decoding, loading and reports aside."""
    parameters: int
    """Of the plain network."""
    trainable_parameters: int
    """Of the network as it was trained."""
    trainable_in_layers: int
    """Of these, those of encoder and decoder layers; the rest is words, places and the decision."""
    manifold_error: dict[str, float]
    """Largest |<x, x> / k + 1|: of each parameter that holds points, of the encoder's and of the decoder's outputs."""
    time_error: dict[str, float]
    """Likewise the largest error of x_0, relative to what it should be."""
    optimizer_state_bytes: int
    peak_memory_gib: float
    """Of the process."""
    data: dict[str, Any]
    seed: int
    precision: str
    config: dict[str, Any]
    """All settings, resolved."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def stopped_at(self) -> str:
        """For the line that says how to go on."""
        return f"step {self.steps}"

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
