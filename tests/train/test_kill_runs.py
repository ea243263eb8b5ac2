"""A selection of the kills that ``tests/tools/kill_runs.py`` tries: the points of no return of each kind of writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.kill_runs import Case, Kill, kill_and_resume, operations, undisturbed

pytestmark = pytest.mark.slow

POINTS = {
    "a checkpoint half written": ("fsync checkpoints/step-4.tmp/__0_0.distcp", False),
    "its name given, the older one still there": ("rename checkpoints/step-4.tmp", True),
    "the older one half deleted": ("unlink checkpoints/step-2.old.tmp", True),
    "the record not yet in its place": ("replace record.json.tmp", False),
}
"""What is cut short -> the first operation whose description begins so, and whether it is still done."""


def chosen(kills: list[Kill], start: str, after: bool) -> Kill:
    return next(kill for kill in kills if kill.operation.startswith(start) and kill.after == after)


@pytest.fixture(scope="module", params=[1, 2])
def case(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """One rank; and two, of which one is killed. With a run that was left in peace."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "stories.jsonl").write_bytes(text.read_bytes())
    ranks: int = request.param
    found = Case(folder / "stories.jsonl", ranks, background=ranks == 2, alone=ranks == 2)
    (folder / "whole").mkdir()
    return found, folder / "whole" / "run"


def test_a_killed_run_goes_on_as_if_nothing_had_been(case: tuple[Case, Path], tmp_path: Path) -> None:
    kind, whole = case
    kills = list(operations(undisturbed(kind, whole)))
    names = POINTS if kind.ranks == 1 else list(POINTS)[:1]  # each costs two runs
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        folder.mkdir()
        kill = chosen(kills, *POINTS[name])
        assert kill_and_resume(kind, kill, whole, folder) is None, f"{name}: {kill}"
