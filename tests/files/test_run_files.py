"""The small files of a run folder: written at once, read whatever another version or a kill made of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.common import small_files
from lowrank_train.common.small_files import write_text
from lowrank_train.config.run_config import load_config
from lowrank_train.train.metrics import read_metrics
from lowrank_train.train.run_folder import changed_settings
from tests.distributed import DistributedFailure
from tests.runs import Launched, arguments, exact_history, failure, send, train_on
from tests.tiers import only_first_quick


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; to be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train_on(1, words(text, run_dir))
    return run_dir


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def words(text: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(text, run_dir, "steps=4", "checkpoint.every=2", *more)


def cut_and_die(name: str) -> Callable[[], None]:
    """Killed while the file is written, with half of it on the disk, wherever it is written."""

    def install() -> None:
        original = Path.write_text

        def killed(self: Path, data: str, *rest: object, **more: object) -> int:
            if self.name.startswith(name):
                original(self, data[: len(data) // 2])
                send(signal.SIGKILL)()
            return original(self, data, *rest, **more)  # type: ignore[arg-type]

        def killed_sync(descriptor: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(name):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                send(signal.SIGKILL)()
            sync(descriptor)

        sync = os.fsync
        Path.write_text = killed  # type: ignore[method-assign, assignment]
        small_files.os.fsync = killed_sync  # type: ignore[attr-defined]

    return install


@pytest.mark.parametrize("name", only_first_quick(["config.yaml", "record.json", "report.md"]))
def test_a_finished_run_killed_while_a_file_is_rewritten_is_exported_again(text: Path, copy: Path, name: str) -> None:
    before = (copy / name).read_text()
    shutil.rmtree(copy / "huggingface")
    with pytest.raises(DistributedFailure, match="died without an answer"):
        train_on(1, words(text, copy), cut_and_die(name))
    assert (copy / name).read_text() == before  # whole, as it was
    assert train_on(1, words(text, copy))[0].status == "finished"
    assert (copy / "huggingface" / "model.safetensors").is_file()
    assert not list(copy.glob("*.tmp"))


def test_settings_of_another_version_do_not_block_a_resume(text: Path, copy: Path, tmp_path: Path) -> None:
    file = copy / "config.yaml"
    file.write_text(file.read_text() + "from_the_future: 3\nclip_by: [no, longer]\n")
    text_before = file.read_text().replace("clip_by: global\n", "")
    file.write_text(text_before.replace("  keep: 2\n", "  keep: 2\n  compressed: true\n"))
    run = Launched(words(text, copy, "steps=6", "seed=0", "log_every=2"), tmp_path / "log")
    assert run.finish() == 0, run.output
    said = [line for line in run.output.splitlines() if "does not know" in line]
    assert len(said) == 1, run.output
    assert said[0].endswith("it is left out: checkpoint.compressed, from_the_future, clip_by")
    assert "changed since the last session: log_every 1 -> 2" in run.output  # the rest is compared
    assert "from_the_future" not in file.read_text()


def test_settings_that_cannot_be_read_do_not_block_a_resume(text: Path, copy: Path) -> None:
    config = load_config(words(text, copy, "steps=5"))
    for content in ("", "- a\n- b\n", "\x00", "a: b: c", "steps: ${oc.env:HOME}\n", "steps: {}\n", "run_dir: ["):
        (copy / "config.yaml").write_text(content)
        _, notes = changed_settings(copy, config)
        assert len(notes) == (content != ""), content
    assert train_on(1, words(text, copy, "steps=5"))[0].status == "finished"


def test_a_broken_line_costs_no_other_row(text: Path, copy: Path, tmp_path: Path) -> None:
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines()
    odd = [lines[1][: len(lines[1]) // 2], "[]", '{"step": "two"}', "null", "\x00\xff"]
    file.write_bytes("\n".join([lines[0], *odd, *lines[2:], lines[-1][:5]]).encode("latin-1"))
    kept = [json.loads(line) for line in [lines[0], *lines[2:]]]
    assert read_metrics(copy) == kept
    run = Launched(words(text, copy, "steps=5"), tmp_path / "log")
    assert run.finish() == 0, run.output
    assert read_metrics(copy)[: len(kept)] == kept
    assert run.output.count("5 broken line(s) were left out") == 1, run.output


def test_a_write_that_comes_back_different_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old\n")
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"ne")
    with pytest.raises(OSError, match="came back different"):
        write_text(tmp_path / "file", "new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old\n"


def test_other_settings_are_still_refused_where_a_run_is_finished(text: Path, copy: Path) -> None:
    assert "clip was 1.0, is 2.0" in failure(words(text, copy, "clip=2.0"))
    assert exact_history(copy)
