"""Numbers of a run as it goes: metrics.jsonl, TensorBoard and a progress bar, on the first rank."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import bar_style

__all__ = ["Metrics", "read_metrics"]


class Metrics:
    """Writes rows of named scalars; a resumed run continues its files as if it had never stopped.

    Args:
        folder: of the run.
        start: steps already done; later rows of an earlier session are dropped.
        steps: of the whole run.
        active: False on all ranks but the first: every call does nothing.

    Raises:
        UserError: the files cannot be written.
    """

    def __init__(self, folder: Path, *, start: int, steps: int, active: bool) -> None:
        self.active = active
        self.failure: OSError | None = None
        """What kept the last row from being written (a full disk); training may still reach a checkpoint."""
        if not active:
            return
        rows, broken = _read_rows(folder / "metrics.jsonl") if start else ([], 0)
        kept = [row for row in rows if row["step"] <= start]
        self._path = path = folder / "metrics.jsonl"
        scratch = folder / "metrics.jsonl.tmp"
        try:
            scratch.write_text("".join(_line(row) for row in kept))
            scratch.replace(path)  # at once: a kill or a full disk here must not cost the rows of earlier sessions
            self._file = path.open("a")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)
        except OSError as error:
            raise UserError(f"cannot write metrics to {folder}: {error}; free space and resume") from None
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            bar_format="{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            **bar_style(),
        )
        if broken:
            self.say(f"{path}: {broken} broken line(s) were left out; the rows after them are kept")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row; values that are not finite are null in the file."""
        if not self.active or self.failure is not None:
            return
        try:
            if not self._path.exists():  # the open file would take the rows, and they would be lost
                raise FileNotFoundError(errno.ENOENT, "was deleted or moved", str(self._path))
            self._file.write(_line({"step": step, **scalars}))
            self._file.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self.failure = error

    def advance(self, loss: float, speed: float, figures: dict[str, float], *, unit: str = "tokens/s") -> None:
        """Move the bar by one step; ``figures`` that are not finite yet are left out."""
        if self.active:
            shown = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items() if math.isfinite(value)]
            text = ", ".join([f"loss {loss:.4f}, {speed:,.0f} {unit}", *shown])
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if self.active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self._bar.close()
            with contextlib.suppress(OSError):  # said before, or of no consequence any more
                self._board.close()
                self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; lines that are no rows, such as a last one cut short by a kill, are
    left out.
    """
    return _read_rows(folder / "metrics.jsonl")[0]


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows, and how many lines before the last one are none."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = [_row(line) for line in lines]
    broken = sum(row is None and bool(line.strip()) for row, line in zip(rows[:-1], lines[:-1], strict=True))
    return [row for row in rows if row is not None], broken


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        return None
    return row if all(value is None or isinstance(value, int | float) for value in row.values()) else None


def _line(row: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
