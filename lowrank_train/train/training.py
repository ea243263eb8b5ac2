"""What every kind of training consists of: a model and its optimizer on all ranks, saved and restored as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.files.checkpoint_folder import checkpoints_of, last_good
from lowrank_train.files.disk import check_space, checkpoints_to_come, write_failure
from lowrank_train.optim.shards.layout import local
from lowrank_train.optim.storage.int8_weight import Int8Weight
from lowrank_train.train.checkpoint import Checkpoints

__all__ = ["Training"]


class Training(ABC):
    """Abstract: a run that a session trains."""

    unit: ClassVar[str] = "step"
    """What ``done`` and ``steps`` count."""
    exported: ClassVar[str]
    """What a finished run leaves in its folder."""
    to_train_on: ClassVar[str] = ""
    """What makes a finished run longer, for messages."""
    to_need_less: ClassVar[str] = ""
    """The key that lets a run need less of the disk, for messages."""

    ranks: Ranks
    folder: Path
    model: nn.Module
    optimizer: optim.MatrixOptimizer
    checkpoints: Checkpoints

    @property
    @abstractmethod
    def steps(self) -> int:
        """The number of steps in all, at most."""

    @property
    @abstractmethod
    def done(self) -> int:
        """The number of steps that are done."""

    @property
    def finished(self) -> bool:
        """Whether all that was asked for is done."""
        return self.done >= self.steps

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""

    @abstractmethod
    def greeting(self) -> str:
        """Return what is trained, for the first line."""

    def notes(self) -> list[str]:
        """Return what else is said at the start."""
        return []

    @property
    def predicted_bytes(self) -> int | None:
        """The predicted peak of memory, where there is a prediction."""
        return None

    @abstractmethod
    def progress_state(self) -> dict[str, Any]:
        """Return sections of a checkpoint beside weights, optimizer and random numbers: where the run stands."""

    @abstractmethod
    def load_progress(self, saved: dict[str, Any]) -> None:
        """Continue where ``progress_state`` was written. Raises TypeError for that of another version."""

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        extra = {**self.progress_state(), "random": _random_state(self.ranks)}
        self.checkpoints.save(self.done, self.model, self.optimizer, extra, self.about)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now.

        Raises:
            UserError: it is damaged, of another run, or of another version.
        """
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        extra = self.checkpoints.load(checkpoint, self.model, self.optimizer, self.about)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        _set_random_state(extra.pop("random"), self.ranks)
        try:
            self.load_progress(extra)
        except TypeError as error:
            raise UserError(
                f"{checkpoint} was written by another version of lowrank-train ({error}); set run_dir to another folder"
            ) from None

    def check_space(self) -> None:
        """Raise UserError on all ranks if the disk cannot take the checkpoints and the export that are to come."""
        here = torch.tensor([_local_bytes(self.model, self.optimizer), _parameter_bytes(self.model)])
        checkpoint, export = (size // self.ranks.replicas for size in self.ranks.sum(here).tolist())
        kept = self.checkpoints
        self.ranks.first(
            lambda: check_space(
                self.folder,
                checkpoint,
                to_come=checkpoints_to_come(self.done, self.steps, kept.every),
                there=len(checkpoints_of(kept.folder)),
                keep=kept.keep,
                export=0 if (self.folder / self.exported).exists() else export,
                keys=self.to_need_less,
            )
        )

    def write(self, what: str, work: Callable[[], str]) -> str:
        """Return what ``work`` returns, which writes a file. Raises UserError, with the last good checkpoint."""
        try:
            return work()
        except OSError as error:
            raise self.write_failure(what, error) from None

    def write_failure(self, what: str, error: OSError) -> UserError:
        """Return the error for a write that failed."""
        return write_failure(what, self.folder, str(error), last_good(self.checkpoints.folder))


def _parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers that this rank holds, as a checkpoint stores them."""
    parts = [local(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    kept = [[p.codes, p.scale] if isinstance(p, Int8Weight) else [p] for p in parts]
    return sum(tensor.numel() * tensor.element_size() for tensors in kept for tensor in tensors)


_ENTRY_BYTES = 3 * 2**10
"""What a tensor takes in a checkpoint beside its numbers: the archive it is in, its part of the index."""


def _local_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that this rank writes into a checkpoint."""
    tensors = len(list(model.parameters())) + sum(len(state) for state in optimizer.state.values())
    return _parameter_bytes(model) + optim.state_bytes(optimizer) + _ENTRY_BYTES * tensors


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {f"cpu_{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"cuda_{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(saved: dict[str, Tensor], ranks: Ranks) -> None:
    """Continue this rank's random numbers; a rank the checkpoint did not have keeps its fresh seed."""
    own = saved.get(f"cpu_{ranks.rank}", saved.get("cpu"))  # the latter of hyperbolic runs of earlier versions
    if own is not None:
        torch.set_rng_state(own)
    if ranks.device.type == "cuda" and f"cuda_{ranks.rank}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_{ranks.rank}"], ranks.device)
