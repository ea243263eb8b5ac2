"""What the reports of all commands share: files of figures, plots, and the table at the end of a run.

Plots are drawn without pyplot, so that no display is needed and nothing is kept between them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError
from lowrank_train.common.small_files import write_text

__all__ = ["drawing", "plot_metric", "write_csv", "write_json", "write_table", "writing"]


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn the failure of a write into one message.

    Raises:
        UserError: a file in ``out``, the folder of a command's results, cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to out={out}: {error}; set out to another folder") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the columns of all of them; a row may lack some."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures, none of which is infinite or NaN."""
    write_text(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")


@contextmanager
def drawing(
    path: Path,
    size: tuple[float, float],
    *,
    rows: int = 1,
    columns: int = 1,
    grid: str | None = "major",
    dpi: int = 120,
) -> Iterator[Any]:
    """Give the axes of a new figure, which is saved when the block ends.

    Args:
        path: of the PNG.
        size: width and height in inches.
        rows: of axes.
        columns: of axes; with more than one of both, an array (rows, columns) or (n,) is given.
        grid: lines at the major ticks, or at both; None for no lines.
        dpi: dots per inch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    yield axes.squeeze() if axes.size > 1 else axes[0, 0]
    for one in axes.flat if grid else ():
        one.grid(alpha=0.3, which=grid)
    figure.savefig(path, dpi=dpi)


def plot_metric(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """Plot a column of ``metrics.jsonl`` over the steps at which there is one; ``style`` is matplotlib's."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
        if "label" in style:
            axes.legend()


def write_table(
    folder: Path, rows: Sequence[tuple[str, str]], more: Sequence[str], made: Mapping[str, Any], how: str
) -> str:
    """Write report.md of a run: the table, what follows it and how the run was made.

    Args:
        folder: of the run.
        rows: (what, value).
        more: Markdown lines after the table.
        made: see ``lowrank_train.common.record.provenance``.
        how: seed, devices and precision, in words.

    Returns:
        The table as text.
    """
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    lines = [f"# {folder.name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in rows]
    lines += ["", *more, "", f"Command: `{made.get('command')}`; commit {made.get('commit')}; {how}; "]
    lines += [f"Python {made.get('python')}, {versions}."]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"  {what:<{width}}  {value}" for what, value in rows)
