"""The scripts of docs/swap.md, as they stand there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

__all__ = ["DIFFS", "SCRIPTS", "original", "run_script"]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "swap.md"


def _blocks() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Scripts by name, and the changed lines of those that are followed by a diff."""
    scripts: dict[str, str] = {}
    diffs: dict[str, list[str]] = {}
    last = ""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            last = re.match(r"# (\w+)\.py", text)[1]  # type: ignore[index]
            scripts[last] = text
        elif language == "diff":
            diffs[last] = text.splitlines()
    return scripts, diffs


SCRIPTS, DIFFS = _blocks()


def original(name: str) -> str:
    """The script before the swap: its diff undone. Raises AssertionError if the diff is not of this script."""
    script, taken = SCRIPTS[name], ""
    for line in DIFFS[name]:
        sign, text = line[0], line[1:] + "\n"
        if sign == "-":
            taken = text  # replaced by the line that follows
        else:
            assert sign == "+", line
            assert script.count(text) == 1, f"{text!r} is not one line of {name}.py"
            script = script.replace(text, taken)
            taken = ""
    assert not taken
    return script


def run_script(name: str, *, before: bool = False) -> dict[str, Any]:
    """What a script leaves behind, run in this folder; ``before``: as it was with AdamW."""
    text = original(name) if before else SCRIPTS[name]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text, f"{name}.py", "exec"), namespace)
    return namespace
