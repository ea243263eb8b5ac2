"""What a graph run was and what came out of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["GraphRecord"]


@dataclass
class GraphRecord:
    """One run. Scores from 0 to 1, times in seconds, memory in GiB (2^30 bytes) or bytes."""

    status: str
    """finished or interrupted (resumable)."""
    graph: str
    task: str
    protocol: str
    geometry: str
    optimizer: dict[str, Any]
    headline: str
    """The score that tables show."""
    test: dict[str, float]
    """Scores of the epoch that was best on validation."""
    validation: dict[str, float]
    """Of the same epoch."""
    epochs: int
    best_epoch: int
    seconds: float
    """Of training and of evaluation after every epoch, over all sessions; loading and reports aside."""
    parameters: int
    """Of the plain network."""
    trainable_parameters: int
    """Of the network as it was trained."""
    manifold_error: float
    """Largest |<x, x> / k + 1| of the nodes' points at the best epoch; 0 in Euclidean space."""
    optimizer_state_bytes: int
    peak_memory_gib: float
    """Of the process."""
    data: dict[str, Any]
    seed: int
    precision: str
    config: dict[str, Any]
    """All settings, resolved."""
    provenance: dict[str, Any] = field(default_factory=dict)
    depth_correlation: float | None = None
    """Spearman's, of distance to the root's point and depth below the root."""
    time_error: float | None = None
    """Largest error of x_0 of these points, relative to what it should be."""

    @property
    def stopped_at(self) -> str:
        """For the line that says how to go on."""
        return f"epoch {self.epochs}"

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
