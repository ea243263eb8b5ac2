"""The table at the end of a run: in report.md with how it was made, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_train.common.small_files import write_text

__all__ = ["write_table"]


def write_table(
    folder: Path,
    rows: list[tuple[str, str]],
    more: list[str],
    made: dict[str, Any],
    *,
    seed: int,
    precision: str,
) -> str:
    """Write report.md; returns the table as text.

    Args:
        folder: of the run.
        rows: (what, value).
        more: Markdown lines after the table.
        made: see ``lowrank_train.common.record.provenance``.
        seed: of the run.
        precision: of the run.
    """
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [f"# {folder.name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in rows]
    lines += ["", *more, ""]
    lines += [f"Command: `{made['command']}`; commit {made['commit']}; seed {seed}; "]
    lines += [f"{made['device']}, {made['threads']} thread(s), {precision}; Python {made['python']}, {versions}."]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"  {what:<{width}}  {value}" for what, value in rows)
