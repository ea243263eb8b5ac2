"""All registered optimizers side by side, on one matrix: state, communication and time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_train.optim.costs.sent import communicated_bytes
from lowrank_train.optim.costs.state import predicted_state_bytes
from lowrank_train.optim.costs.time import StepTime, rank_argument, time_steps
from lowrank_train.optim.methods import find, names, summary

__all__ = ["Row", "aligned", "compare", "size_text", "summary", "timing_sizes"]

_CPU_NUMBERS = 2**20
"""Largest matrix timed on a CPU, so that a table takes seconds; Muon on 4096 x 4096 alone would take half a minute."""

_ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """One optimizer on one matrix."""

    name: str
    source: str
    state_bytes: int
    state_bytes_per_parameter: float
    interval: int | None
    """Steps from one choice of directions to the next; None for a method without one."""
    mean_sent_bytes: float
    """By one rank per step, over that interval."""
    refresh_sent_bytes: float
    """By one rank at a step that chooses directions."""
    time: StepTime | None
    """None if not measured."""


def compare(
    rows: int,
    columns: int,
    rank: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    world_size: int = 8,
    device: torch.device | None = None,
) -> list[Row]:
    """Compare every registered optimizer of matrices on one matrix of rows x columns, by name.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        rank: of every method that has one, unless it brings its own (APOLLO-Mini); None: their default, a quarter.
        dtype: of the parameter.
        world_size: ranks the matrix is sharded over, for communication.
        device: where to measure step times, on a smaller matrix if it is a CPU (``timing_sizes``); None: nowhere.

    Raises:
        ValueError: sizes that do not go together.
    """
    settings = {name: rank_argument(name, rank) for name in names(of_matrices=True)}
    times: dict[str, StepTime] = {}
    if device is not None:
        height, width, small = timing_sizes(rows, columns, rank, device)
        measured = {name: rank_argument(name, small) for name in settings}
        for time in time_steps(measured, [(height, width)], dtype=dtype, device=device, rounds=_ROUNDS):
            times[time.name] = time
    matrix = torch.empty(rows, columns, dtype=dtype, device="meta")
    table = []
    for name, arguments in settings.items():
        groups: list[dict[str, Any]] = [{"params": [("matrix", matrix)], "role": "matrix"}]
        state = predicted_state_bytes(name, groups, **arguments)
        sent = communicated_bytes(name, groups, world_size=world_size, **arguments)
        table.append(
            Row(
                name=name,
                source=find(name).published.paper,
                state_bytes=state,
                state_bytes_per_parameter=state / (rows * columns),
                interval=sent.interval,
                mean_sent_bytes=sent.mean_sent,
                refresh_sent_bytes=sent.refresh_sent,
                time=times.get(name),
            )
        )
    return table


def timing_sizes(rows: int, columns: int, rank: int | None, device: torch.device) -> tuple[int, int, int | None]:
    """Return rows, columns and rank to measure with: on a CPU halved together until a table takes seconds."""
    while device.type == "cpu" and rows * columns > _CPU_NUMBERS and min(rows, columns) > 1:
        rows, columns, rank = rows // 2, columns // 2, None if rank is None else max(1, rank // 2)
    return rows, columns, rank


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Return rows of text in columns, numbers to the right; ``left``: the columns that are words."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size_text(size: float) -> str:
    """Return bytes in decimal units, as networks count."""
    if size < 1000:
        return f"{size:.0f} B" if size == int(size) else f"{size:.1f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:.3g} {unit}"
