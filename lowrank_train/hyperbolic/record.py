"""A hyperbolic run, whatever it learned: what it was and what came out of it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank_train.common.small_files import write_text

__all__ = ["NetworkRecord"]


@dataclass(kw_only=True)
class NetworkRecord(ABC):
    """One run. Times in seconds, memory in GiB (2^30 bytes) or bytes."""

    status: str
    """finished or interrupted (resumable)."""
    geometry: str
    optimizer: dict[str, Any]
    seconds: float
    """Of training and of scores on validation meanwhile, over all sessions; loading and reports aside."""
    parameters: int
    """Of the plain network."""
    trainable_parameters: int
    """Of the network as it was trained."""
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
    @abstractmethod
    def stopped_at(self) -> str:
        """For the line that says how to go on."""

    def write(self, path: Path) -> None:
        """As JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")
