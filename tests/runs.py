"""Tiny models, tiny text, and training runs in forked processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lowrank_train.common.errors import UserError
from lowrank_train.common.record import RunRecord
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config
from lowrank_train.data.blocks import TokenFile, TokenStream
from lowrank_train.models.families import FAMILIES, Family
from lowrank_train.train.loop import train
from lowrank_train.train.metrics import read_metrics
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "launch" / "pretrain.py"
SEQUENCE = 16

_WORDS = re.findall(
    r"\w+",
    "the of a river stone tree walks quickly under bright morning sky letter green house never always found carry "
    "small large wind over mountain old new and then she he they water light answered nobody knew why it had been so",
)

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_WHERE_GIVEN = {"word_embed_proj_dim": 32, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 12}
"""Keys that only some families have; a window is shorter than a sequence."""


def tiny(family: Family) -> tuple[str, dict[str, int]]:
    """A size of a family, and what to override of it."""
    name = next(iter(family.sizes))
    given = {**family.defaults, **family.sizes[name]}
    small = {**_SMALL, **{key: value for key, value in _SMALL_WHERE_GIVEN.items() if key in given}}
    positions = {"max_position_embeddings": 64} if family.learned_positions else {}
    return name, {**small, family.feed_forward: 48, **positions}


def _words(name: str, overrides: dict[str, int]) -> list[str]:
    return [f"model.name={name}", *(f"model.overrides.{key}={value}" for key, value in overrides.items())]


TINY = {family.model_type: _words(*tiny(family)) for family in FAMILIES}
"""Family -> the words of a tiny model."""

OPTIMIZERS = {
    "adamw": ["optimizer.name=adamw", "optimizer.lr=3e-3"],
    "dct_adamw": [
        "optimizer.name=dct_adamw",
        "optimizer.lr=3e-3",
        "optimizer.rank=8",
        "optimizer.refresh_interval=5",
    ],
}


def documents(count: int, seed: int = 0) -> list[str]:
    """Different short English-like texts."""
    chooser = random.Random(seed)
    return [
        f"Story {seed}-{i}. " + " ".join(chooser.choice(_WORDS) for _ in range(chooser.randint(15, 60))) + "."
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def arguments(
    text: Path, run_dir: Path, *more: str, model: str = "llama", optimizer: str = "adamw", precision: str = "float32"
) -> list[str]:
    """A run of 20 steps of 8 sequences, with 19 validation blocks of which the last is not full."""
    return [
        *TINY[model],
        *OPTIMIZERS[optimizer],
        f"precision={precision}",
        f"data.path={text}",
        "data.vocab_size=300",
        "data.validation_fraction=0.1",
        "evaluation.tokens=300",
        "evaluation.every=0",
        "checkpoint.every=0",
        f"seq_len={SEQUENCE}",
        f"tokens_per_step={8 * SEQUENCE}",
        "micro_batch=4",
        "steps=20",
        "schedule.warmup_steps=3",
        "device=cpu",
        f"run_dir={run_dir}",
        *more,
    ]


def train_on(
    world_size: int, words: Sequence[str], before: Callable[[], None] | None = None, *, plot: bool = False
) -> list[RunRecord]:
    """Train in forked ranks, after calling ``before`` in each; the record each rank returned."""
    return run_distributed(_train, world_size, load_config(words), before, plot)


def failure(words: Sequence[str], world_size: int = 1, before: Callable[[], None] | None = None) -> str:
    """The first rank's message of the UserError that training raises on all ranks."""
    messages = run_distributed(_fail, world_size, load_config(words), before)
    assert None not in messages, f"training was expected to fail on all ranks: {messages}"
    return str(messages[0])


def at_step(step: int, act: Callable[[], None], *, rank: int | None = None) -> Callable[[], None]:
    """For ``train_on``: act when the data of a step is fetched, on one rank or all."""

    def install() -> None:
        for source in (TokenFile, TokenStream):
            original = source.take

            def take(self: object, count: int, *ranks: int, original: Callable[..., torch.Tensor] = original):  # type: ignore[no-untyped-def]
                if self.position == (step - 1) * count and rank in (None, dist.get_rank()):  # type: ignore[attr-defined]
                    act()
                return original(self, count, *ranks)

            source.take = take  # type: ignore[method-assign, assignment]

    return install


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    rows = [row for row in read_metrics(run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


def exact_history(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock and the machine."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("throughput/", "memory/"))}
        for row in read_metrics(run_dir)
    ]


def checkpoints(run_dir: Path) -> list[str]:
    """Names in the folder of checkpoints, oldest first."""
    return sorted((p.name for p in (run_dir / "checkpoints").iterdir()), key=lambda name: (len(name), name))


class Launched:
    """``python launch/pretrain.py ...`` in a forked process: the real script and exit code, without its imports."""

    def __init__(self, words: Sequence[str], log: Path, launcher: Path = LAUNCHER) -> None:
        self.log = log
        self.process = multiprocessing.get_context("fork").Process(target=_launch, args=(list(words), log, launcher))
        self.process.start()

    def finish(self, seconds: float = 60) -> int:
        """Wait for the end; the exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the run did not end within {seconds} s\n{self.output}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.log.read_text()


def _train(run: Config, before: Callable[[], None] | None, plot: bool) -> RunRecord:
    _as_torchrun_does()
    if not plot:  # drawing takes as long as twenty tiny steps
        Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    if before is not None:
        before()
    return train(run)


def _fail(run: Config, before: Callable[[], None] | None) -> str | None:
    try:
        _train(run, before, plot=False)
    except UserError as error:
        return str(error)
    return None


def _as_torchrun_does() -> None:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))


def _launch(words: list[str], log: Path, launcher: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # the buffers that the test runner captures would be written by both processes
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(launcher), *words]
    runpy.run_path(str(launcher), run_name="__main__")


def checkpoint_tensors(checkpoint: Path, section: str = "") -> dict[str, Tensor]:
    """All whole tensors of a checkpoint whose names start with ``section``."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(section)
    }
    assert tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_equal_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different
