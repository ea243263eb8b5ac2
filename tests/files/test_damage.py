"""Damage in what a run reads of its own: every flipped byte is noticed, and an automatic resume goes back by one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.config.run_config import load_config
from lowrank_train.data.tokens import prepare_data
from lowrank_train.files.checkpoint_folder import choose_checkpoint
from lowrank_train.files.checksums import CHECKSUMS
from lowrank_train.train.checkpoint import read_weights
from tests.distributed import run_distributed
from tests.runs import Launched, arguments, checkpoints, failure, losses, train_on


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with checkpoints 2 and 4; to be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train_on(2, words(text, run_dir))
    return run_dir


def words(text: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(text, run_dir, "steps=4", "checkpoint.every=2", *more, optimizer="dct_adamw")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def positions(file: Path) -> list[int]:
    """The first and the last byte, and three between."""
    size = file.stat().st_size
    return sorted({0, size // 4, size // 2, 3 * size // 4, size - 1})


def test_every_flipped_byte_of_a_checkpoint_is_noticed_on_any_number_of_ranks(source: Path, tmp_path: Path) -> None:
    """By the rank that reads the file, and told to all; whoever asks for that very checkpoint is refused."""
    folder = tmp_path / "checkpoints"
    newest = shutil.copytree(source / "checkpoints" / "step-4", folder / "step-4")
    files = sorted(newest.iterdir())
    assert {file.name for file in files} >= {".metadata", "__0_0.distcp", "__1_0.distcp", "about.json", CHECKSUMS}

    contents = {file: file.read_bytes() for file in files}  # before the ranks: one reads while the other flips
    places = {file: positions(file) for file in files}

    def told() -> dict[tuple[str, int], str]:
        heard = {}
        with start("cpu") as ranks:
            for file, whole in contents.items():
                for position in places[file]:
                    ranks.first(lambda file=file, position=position: flip(file, position))  # type: ignore[misc]
                    try:
                        choose_checkpoint(str(newest), tmp_path / "none", ranks)
                    except UserError as error:
                        heard[file.name, position] = str(error)
                    ranks.first(lambda file=file, whole=whole: file.write_bytes(whole))  # type: ignore[misc]
            assert choose_checkpoint(str(newest), tmp_path / "none", ranks) == (newest, [])
        return heard

    for heard in run_distributed(lambda: _as_rank(told), 2):
        for file in files:
            for position in places[file]:
                message = heard[file.name, position]
                assert f"{newest} is damaged (" in message
                assert file.name in message or file.name == CHECKSUMS
    for file in files:  # and by those who read a checkpoint in one process
        whole = file.read_bytes()
        flip(file, len(whole) // 2)
        with pytest.raises(UserError, match="step-4 is damaged"):
            read_weights(newest)
        file.write_bytes(whole)
    read_weights(newest)


def _as_rank(work):  # type: ignore[no-untyped-def]
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    return work()


def test_an_automatic_resume_goes_back_by_one_and_says_so(text: Path, source: Path, copy: Path, tmp_path: Path) -> None:
    flip(max((copy / "checkpoints" / "step-4").glob("*.distcp")), 5000)
    run = Launched(words(text, copy), tmp_path / "log")
    assert run.finish() == 0, run.output
    said = [line for line in run.output.splitlines() if "is damaged" in line]
    assert len(said) == 1, run.output
    assert "__1_0.distcp is not as it was written" in said[0]
    assert "going on from step-2" in said[0]
    assert losses(copy) == losses(source)
    assert checkpoints(copy) == ["step-2", "step-4", "step-4.damaged"]


def test_the_checkpoint_that_was_asked_for_is_refused(text: Path, copy: Path, tmp_path: Path) -> None:
    newest = copy / "checkpoints" / "step-4"
    flip(newest / "about.json", 3)
    message = failure(words(text, tmp_path / "branch", f"resume={newest}"), world_size=2)
    assert message.startswith(f"{newest} is damaged (about.json")
    assert f"resume={copy / 'checkpoints' / 'step-2'} is the one before" in message
    assert checkpoints(copy) == ["step-2", "step-4"]


def test_when_all_are_damaged_nothing_starts_anew(text: Path, copy: Path) -> None:
    for step in ("step-2", "step-4"):
        (copy / "checkpoints" / step / "__0_0.distcp").unlink()
    message = failure(words(text, copy))
    assert "step-4 is damaged (__0_0.distcp is missing), and so is every checkpoint before it" in message
    assert checkpoints(copy) == ["step-2", "step-4"]


def test_what_an_earlier_version_wrote_is_read_with_one_note_each(text: Path, copy: Path, tmp_path: Path) -> None:
    for folder in (copy / "checkpoints" / "step-4", copy / "data"):
        (folder / CHECKSUMS).unlink()
    run = Launched(words(text, copy, "steps=5"), tmp_path / "log")
    assert run.finish() == 0, run.output
    assert run.output.count(f"has no {CHECKSUMS}") == 2, run.output


def test_every_flipped_byte_of_the_tokens_is_noticed(text: Path, source: Path, copy: Path) -> None:
    files = sorted(path for path in (copy / "data").rglob("*") if path.is_file() and path.name != "data.json")
    assert {file.name for file in files} >= {"train.bin", "validation.bin", "tokenizer.json", CHECKSUMS}
    config = load_config(words(text, copy))

    def told() -> list[str]:
        heard = []
        with start("cpu") as ranks:
            for file in files:
                whole = file.read_bytes()
                for position in positions(file):
                    flip(file, position)
                    try:
                        prepare_data(config, ranks, copy / "data")
                    except UserError as error:
                        heard.append(str(error))
                    else:
                        heard.append(f"nothing about {file}, byte {position}")
                    file.write_bytes(whole)
        return heard

    (heard,) = run_distributed(told, 1)
    assert [message for message in heard if "damaged" not in message or "delete" not in message] == []
