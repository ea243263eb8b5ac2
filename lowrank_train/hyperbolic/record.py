"""A hyperbolic run, whatever it learned: what it was and what came out of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank_train.common.small_files import write_text

__all__ = ["NetworkRecord"]


@dataclass(kw_only=True)
class NetworkRecord:
    """One run. Times in seconds, memory in GiB (2^30 bytes) or bytes."""

    status: str
    """finished or interrupted (resumable)."""
    geometry: str
    optimizer: dict[str, Any]
    seconds: float
    """Seconds of training and of its validation scores, over all sessions, without loading and reports."""
    parameters: int
    """Parameters of the plain network."""
    trainable_parameters: int
    """Parameters of the network as it was trained."""
    optimizer_state_bytes: int
    peak_memory_gib: float
    """Memory of the process."""
    data: dict[str, Any]
    seed: int
    precision: str
    config: dict[str, Any]
    """All settings, resolved."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """Seed, processor and precision, for the report."""
        made = self.provenance
        return f"seed {self.seed}; {made.get('device')}, {made.get('threads')} thread(s), {self.precision}"

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")
