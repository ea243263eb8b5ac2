"""What every run of this package consists of: one network on one process, stepped, saved, restored."""

from __future__ import annotations

import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.common.errors import Diverged, UserError, first_line
from lowrank_train.common.record import peak_memory_gib, provenance
from lowrank_train.common.signals import Stop
from lowrank_train.config import methods
from lowrank_train.files.checkpoint_folder import checkpoints_of, last_good
from lowrank_train.files.disk import check_space, checkpoints_to_come, local_bytes, parameter_bytes, write_failure
from lowrank_train.files.finite import name_not_finite
from lowrank_train.hyperbolic.recipes import RecipeConfig
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.train.checkpoint import Checkpoints
from lowrank_train.train.metrics import Metrics

__all__ = ["CPU", "DTYPES", "NetworkRun", "Progress", "load_saved"]

N = TypeVar("N", bound=nn.Module)

CPU = torch.device("cpu")
"""Where these networks are trained."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""By ``precision``."""

_NOT_LEARNED = ("folder", "root", "tokenizer_folder")
"""Keys of ``data`` that change nothing of what is learned."""


@dataclass
class Progress:
    """The position of a run, which every checkpoint holds."""

    done: int = 0
    """Steps, or epochs."""
    seconds: float = 0.0
    """Seconds of training, over all sessions."""


@dataclass
class NetworkRun(ABC):
    """Built once."""

    unit: ClassVar[str]
    """What ``progress.done`` counts: step, or epoch."""

    config: RecipeConfig
    folder: Path
    network: nn.Module
    layers: Parametrization
    """What its linear maps are made of."""
    optimizer: optim.MatrixOptimizer
    checkpoints: Checkpoints
    progress: Progress
    sha1: str
    """The hash of the data."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether all that was asked for is done."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that the plain network is built from, beside its weights."""

    @abstractmethod
    def greeting(self) -> str:
        """Return what is trained, for the first line."""

    def step(self, loss: Tensor) -> float:
        """Make one step of the optimizer; returns the norm of the whole gradient before it was clipped.

        Raises:
            Diverged: the loss or that norm is not finite; the network is as it was.
        """
        loss.backward()
        clip = math.inf if self.config.clip is None else self.config.clip
        norm = float(nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.requires_grad], clip))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise Diverged(
                f"the loss or the gradient of {self.unit} {self.progress.done + 1} is not finite; "
                f"{last_good(self.checkpoints.folder)}. Lower optimizer.lr or clip, and resume"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.done += 1
        return norm

    def scalars(self, loss: Tensor, norm: float, rate: float) -> dict[str, float]:
        """Return what every kind of run logs of a step."""
        return {
            "train/loss": loss.item(),
            "train/grad_norm": norm,
            "train/learning_rate": rate,
            "memory/peak_gib": peak_memory_gib(CPU),
            **{f"optimizer/{name}": value for name, value in self.optimizer.figures().items()},
        }

    def keep(self, metrics: Metrics, stop: Stop) -> None:
        """Write a checkpoint after a step if one is due.

        Raises:
            UserError: it cannot be written, or figures could not be.
        """
        if metrics.failure is not None:
            raise write_failure("metrics", self.folder, str(metrics.failure), last_good(self.checkpoints.folder))
        every = self.config.checkpoint_every
        if (every > 0 and self.progress.done % every == 0) or self.finished or stop.requested:
            self.save()

    def check_space(self, steps: int) -> None:
        """Raise UserError if the disk cannot take the checkpoints and the network that are to come."""
        check_space(
            self.folder,
            local_bytes(self.network, self.optimizer),
            to_come=checkpoints_to_come(self.progress.done, steps, self.config.checkpoint_every),
            there=len(checkpoints_of(self.checkpoints.folder)),
            keep=self.checkpoints.keep,
            export=parameter_bytes(self.network),
        )

    def save(self) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        values = asdict(self.progress)
        nested = {name: value for name, value in values.items() if isinstance(value, dict)}  # sections of their own
        plain = {name: value for name, value in values.items() if name not in nested}
        extra = {"progress": plain, **nested, "random": {"cpu": torch.get_rng_state()}}
        self.checkpoints.save(self.progress.done, self.network, self.optimizer, extra, self.about)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written; hyperparameters stay as configured now."""
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        extra = self.checkpoints.load(checkpoint, self.network, self.optimizer, self.about)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        torch.set_rng_state(extra.pop("random")["cpu"])
        try:
            self.progress = type(self.progress)(**extra.pop("progress"), **extra)
        except TypeError as error:
            raise UserError(
                f"{checkpoint} was written by another version of lowrank-train ({error}); set run_dir to another folder"
            ) from None

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        name = self.config.optimizer["name"]
        layers = {f"optimizer.{key}": value for key, value in methods.find(name).layer_settings(self.config.optimizer)}
        data = {f"data.{key}": value for key, value in asdict(self.config.data).items() if key not in _NOT_LEARNED}
        return {"optimizer.name": name, **layers, "model": asdict(self.config.model), **data, "sha1": self.sha1}

    def write_network(self, state: dict[str, Tensor]) -> None:
        """Leave the plain network in network.pt, for ``load_saved``; ``state`` is that of the one in training.

        Raises:
            UserError: it cannot be written.
        """
        plain = self.layers.plain_state_dict(state)
        file = self.folder / "network.pt"
        bad = name_not_finite(plain)
        if bad is not None:
            raise Diverged(
                f"{bad!r} holds a number that is not finite; {file} is not written; "
                f"{last_good(self.checkpoints.folder)}"
            )
        scratch = file.with_name(file.name + ".tmp")
        try:
            torch.save({"network": self.arguments(), "precision": self.config.precision, "state": plain}, scratch)
            scratch.replace(file)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {file}: {error}; free space and resume") from None

    def figures(self) -> dict[str, Any]:
        """Return the part of a record that is the same for every kind of run."""
        config = self.config
        return {
            "status": "finished" if self.finished else "interrupted",
            "geometry": config.model.geometry,
            "optimizer": dict(config.optimizer),
            "seconds": self.progress.seconds,
            "parameters": sum(v.numel() for v in self.layers.plain_state_dict(self.network.state_dict()).values()),
            "trainable_parameters": sum(p.numel() for p in self.network.parameters() if p.requires_grad),
            "optimizer_state_bytes": optim.state_bytes(self.optimizer),
            "peak_memory_gib": peak_memory_gib(CPU),
            "seed": config.seed,
            "precision": config.precision,
            "config": asdict(config),
            "provenance": provenance(CPU),
        }


def load_saved(folder: Path, build: Callable[[dict[str, Any]], N]) -> N:
    """Load the plain network that ``write_network`` left in the folder of a finished run, for evaluation.

    Args:
        folder: of the run.
        build: makes the network of ``NetworkRun.arguments``.

    Raises:
        UserError: there is none, or it is of another version.
    """
    file = folder / "network.pt"
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # the last for what is not plain
        reason = first_line(error)
        raise UserError(f"cannot read {file}: {reason}; expected the run_dir of a finished run") from None
    try:
        network = build(saved["network"]).to(DTYPES[saved["precision"]])
        network.load_state_dict(saved["state"])
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{file} was written by another version of lowrank-train ({error}); train it again in another run_dir"
        ) from None
    return network.eval()
