"""How long a step takes, from the records of runs that were made: nothing is guessed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_train.config.schema import Config
from lowrank_train.files.json_files import mapping_or_empty

__all__ = ["StepTime", "step_time"]

_SAME = ("model", "seq_len", "micro_batch", "precision", "weights", "fused_backward", "loss_chunk")
"""Keys of a configuration that a recorded run must share; of the optimizer name, rank and how state is kept."""

_SAME_OF_OPTIMIZER = ("name", "rank", "state_dtype", "other_state_dtype", "offload_state")


@dataclass(frozen=True)
class StepTime:
    """The time of a step, from the record of a similar run."""

    seconds: float
    """Seconds for as many tokens as the step in question has."""
    device: str
    record: str
    """Its file."""


def step_time(run: Config, world_size: int, folder: Path) -> StepTime | None:
    """Return the newest record below ``folder`` of a run with the same work per token; None if there is none."""
    found = [path for path in folder.glob("**/record.json") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            record = mapping_or_empty(path)
            if record["world_size"] == world_size and _work(record["config"]) == _work(asdict(run)):
                seconds = run.tokens_per_step / record["tokens_per_second"]
                return StepTime(seconds, str(record["provenance"]["device"]), str(path))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):  # not a record of this version
            continue
    return None


def _work(config: dict[str, Any]) -> dict[str, Any]:
    of_optimizer = {key: config["optimizer"].get(key) or None for key in _SAME_OF_OPTIMIZER}
    return {**{key: config[key] for key in _SAME}, "optimizer": of_optimizer}
