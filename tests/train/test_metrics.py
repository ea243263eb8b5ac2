"""metrics.jsonl across sessions."""

from pathlib import Path

import pytest

from lowrank_train.common.errors import UserError
from lowrank_train.train.metrics import Metrics, read_metrics


def write(folder: Path, *, start: int, rows: range) -> None:
    metrics = Metrics(folder, start=start, steps=9, active=True)
    for step in rows:
        metrics.log(step, {"train/loss": 1.0})
    metrics.close()


def test_a_resumed_session_drops_later_rows_and_leaves_no_scratch_file(tmp_path: Path) -> None:
    write(tmp_path, start=0, rows=range(1, 8))
    write(tmp_path, start=5, rows=range(6, 7))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_of_earlier_sessions_survive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, start=0, rows=range(1, 4))

    def full(self: Path, text: str) -> int:
        self.open("w").close()  # what a full disk leaves: a file that is cut short
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write metrics to .*No space left"):
        Metrics(tmp_path, start=3, steps=9, active=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
