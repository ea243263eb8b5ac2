"""What a benchmark leaves: NAME.json with every figure, NAME.md with a table, and NAME.png if something is plotted.

A report follows from the figures alone, so that it can be made again from a file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import AutoLocator, NullFormatter

from lowrank_train.common.errors import UserError
from lowrank_train.common.small_files import write_text
from lowrank_train.reports import drawing

__all__ = ["Panel", "Report", "finite", "markdown", "origin", "output_folder", "publish", "rate", "spread"]


class Panel(NamedTuple):
    """One pair of axes with a line for each label; a label has the same color in all panels."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]
    """Label -> its points."""
    missing: Mapping[str, Sequence[Any]] = MappingProxyType({})
    """Label -> where it has no result: a cross at the lower edge."""
    markers: str = "o"
    linewidth: float = 1.2
    log_x: bool = False
    log_y: bool = False
    top: float | None = None


class Report(NamedTuple):
    """What is read first: a table, what belongs to it, and plots."""

    title: str
    table: str
    """Markdown."""
    notes: Sequence[str] = ()
    """Paragraphs below the table."""
    panels: Sequence[Panel] = ()


def publish(folder: Path, name: str, figures: Mapping[str, Any], report: Report) -> str:
    """Write NAME.json, NAME.md and, if there are panels, NAME.png.

    Returns:
        The table.

    Raises:
        UserError: the folder cannot be written.
    """
    plot = ["", f"![plot]({name}.png)"] if report.panels else []
    paragraphs = [line for note in report.notes for line in ("", note)]
    text = "\n".join([f"# {report.title}", "", report.table, *paragraphs, *plot, ""])
    try:
        write_text(folder / f"{name}.json", json.dumps(finite(figures), indent=1, allow_nan=False) + "\n")
        write_text(folder / f"{name}.md", text)
        if report.panels:
            _draw(report.panels, folder / f"{name}.png")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; free space, or give another folder") from None
    print(f"\n{folder / name}.md, .json{', .png' * bool(report.panels)}", file=sys.stderr)
    return report.table


def output_folder(path: str, key: str = "--out") -> Path:
    """Make a folder if it is absent. Raises UserError, naming the key, if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {key} {path}: {error}; give another folder") from None
    return Path(path)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, short rows filled up; its first column holds names, the others numbers."""
    filled = [[*map(str, row), *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *filled]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def origin(made: Mapping[str, Any]) -> str:
    """Return one line that says where figures come from, of what ``provenance`` found."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version is not None)
    return (
        f"Command: `{made['command']}`; commit {made['commit']}; {made['device']}, {made['cores']} cores, "
        f"{made['threads']} thread(s); Python {made['python']}, {versions}."
    )


def rate(lr: float) -> str:
    """Return a learning rate in few characters, such as 2.5e-4."""
    mantissa, exponent = f"{lr:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def spread(values: Sequence[float], form: str = ".2f", middle: float | None = None) -> str:
    """Return the mean of the seeds, or what stands for it, and their lowest and highest where there are several."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{fmean(values) if middle is None else middle:{form}}{ends}"


def finite(value: Any) -> Any:
    """Return figures with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(panels: Sequence[Panel], path: Path) -> None:
    labels = list(dict.fromkeys(label for panel in panels for label in [*panel.lines, *panel.missing]))
    colors = colormaps["tab20"]
    color = {label: colors(2 * i % 20 + i // 10 % 2) for i, label in enumerate(labels)}
    shown: dict[str, Any] = {}
    with drawing(path, (6 * len(panels), 5), columns=len(panels), grid="both") as made:
        for axes, panel in zip(np.ravel(made), panels, strict=True):
            for label, (xs, ys) in panel.lines.items():
                style = {"marker": panel.markers, "markersize": 4, "linewidth": panel.linewidth, "color": color[label]}
                shown[label] = axes.plot(xs, ys, **style)[0]
            for label, xs in panel.missing.items():
                axes.plot(xs, [0.02] * len(xs), "x", color=color[label], transform=axes.get_xaxis_transform())
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            if panel.log_x:
                axes.set_xscale("log")
            if panel.log_y:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(
                    AutoLocator()
                )  # a logarithmic axis labels powers of ten: often there is none
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            if panel.top is not None:
                axes.set_ylim(top=panel.top)
        axes.figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
