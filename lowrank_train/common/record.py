"""What a run was and what came out of it: the facts a result must be stated with."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_train.common.signals import typed_command
from lowrank_train.common.small_files import write_text

__all__ = ["RunRecord", "peak_memory_gib", "perplexity", "provenance"]

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "peft")


@dataclass
class RunRecord:
    """One run. Times in seconds, memory in GiB (2^30 bytes) or bytes, losses in nats per token."""

    status: str
    """finished or interrupted (resumable)."""
    model: str
    parameters: int
    optimizer: dict[str, Any]
    steps: int
    tokens: int
    """Training tokens seen since the start of the run, over all sessions."""
    seconds: float
    """Seconds of training steps, over all sessions, without loading, evaluation and checkpoints."""
    optimizer_seconds: float
    """Those of them spent in ``optimizer.step()``."""
    tokens_per_second: float
    train_loss: float | None
    initial_validation_loss: float | None
    validation_loss: float | None
    validation_step: int | None
    """When the validation loss was taken."""
    validation_tokens: int
    skipped_steps: int
    predicted_peak_gib: float | None
    """Peak of a training step on the first rank, with weights and state but without the process itself. None
    with an adapter."""
    peak_memory_gib: float
    """Over all sessions. CUDA: largest allocation on the first rank's device; CPU: its process's resident set."""
    optimizer_state_bytes: int
    """Measured on the first rank."""
    predicted_optimizer_state_bytes: int
    world_size: int
    precision: str
    seed: int
    data: dict[str, Any]
    config: dict[str, Any]
    """All settings, resolved."""
    provenance: dict[str, Any] = field(default_factory=dict)
    trained_parameters: int | None = None
    """Elements that take a gradient; None in records from before there was this."""

    @property
    def perplexity(self) -> float | None:
        """exp(validation loss)."""
        return None if self.validation_loss is None else perplexity(self.validation_loss)

    @property
    def initial_perplexity(self) -> float | None:
        """exp(initial validation loss)."""
        return None if self.initial_validation_loss is None else perplexity(self.initial_validation_loss)

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        figures = {**asdict(self), "perplexity": self.perplexity, "initial_perplexity": self.initial_perplexity}
        write_text(path, json.dumps(figures, indent=2) + "\n")


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the command, commit, versions and hardware of this process."""
    return {
        "command": typed_command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest memory used so far: allocated on a CUDA device, resident in RAM for CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout this code runs from, with + for local changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
