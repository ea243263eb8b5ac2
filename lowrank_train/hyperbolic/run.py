"""What every run of this package consists of: one network on one process, stepped, saved, restored."""

from __future__ import annotations

import math
import pickle
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_train import optim
from lowrank_train.common.errors import Diverged, UserError, first_line
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.common.record import peak_memory_gib, provenance
from lowrank_train.config import methods
from lowrank_train.files.checkpoint_folder import last_good
from lowrank_train.files.finite import name_not_finite
from lowrank_train.hyperbolic.recipes import RecipeConfig, SpaceConfig
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.train.checkpoint import Checkpoints
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.session import hold_session
from lowrank_train.train.training import Training

__all__ = ["CPU", "DTYPES", "NetworkRun", "Progress", "load_saved", "saved_model", "train_alone"]

N = TypeVar("N", bound=nn.Module)
S = TypeVar("S", bound=SpaceConfig)
C = TypeVar("C", bound=RecipeConfig)
R = TypeVar("R", bound="NetworkRun")
Record = TypeVar("Record")

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
class NetworkRun(Training):
    """Abstract: a network on one process, built once."""

    exported = "network.pt"

    config: RecipeConfig
    ranks: Ranks
    folder: Path
    model: nn.Module
    layers: Parametrization
    """What its linear maps are made of."""
    optimizer: optim.MatrixOptimizer
    checkpoints: Checkpoints
    progress: Progress
    sha1: str
    """The hash of the data."""

    @property
    def done(self) -> int:
        """Steps, or epochs."""
        return self.progress.done

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that the plain network is built from, beside its weights."""

    def step(self, loss: Tensor) -> float:
        """Make one step of the optimizer; returns the norm of the whole gradient before it was clipped.

        Raises:
            Diverged: the loss or that norm is not finite; the network is as it was.
        """
        loss.backward()
        clip = math.inf if self.config.clip is None else self.config.clip
        norm = float(nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], clip))
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

    def progress_state(self) -> dict[str, Any]:
        """Return the progress, its dictionaries as sections."""
        values = asdict(self.progress)
        nested = {name: value for name, value in values.items() if isinstance(value, dict)}
        return {"progress": {name: value for name, value in values.items() if name not in nested}, **nested}

    def load_progress(self, saved: dict[str, Any]) -> None:
        """Take the progress that ``progress_state`` returned."""
        self.progress = type(self.progress)(**saved.pop("progress"), **saved)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that loads it, the tensors aside."""
        method = methods.find(self.config.optimizer["name"])
        data = {f"data.{key}": value for key, value in asdict(self.config.data).items() if key not in _NOT_LEARNED}
        settings = method.about(self.config.optimizer)
        return {**settings, "model": asdict(self.config.model), **data, "sha1": self.sha1}

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
            "parameters": sum(v.numel() for v in self.layers.plain_state_dict(self.model.state_dict()).values()),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "optimizer_state_bytes": optim.state_bytes(self.optimizer),
            "peak_memory_gib": peak_memory_gib(CPU),
            "seed": config.seed,
            "precision": config.precision,
            "config": asdict(config),
            "provenance": provenance(CPU),
        }


def train_alone(
    config: C,
    build: Callable[[C, Ranks], R],
    train: Callable[[R, Metrics], Iterator[None]],
    finish: Callable[[R], Record],
) -> Record:
    """Hold a session on one process; arguments as of ``hold_session``. Raises UserError for more than one rank."""
    with start(CPU.type) as ranks:
        if ranks.world_size > 1:
            raise UserError(
                f"these networks are trained in one process, not in {ranks.world_size}; start launch/hyperbolic.py "
                "with python"
            )
        return hold_session(config, ranks, build=lambda: build(config, ranks), train=train, finish=finish)


def saved_model(schema: type[S], about: Mapping[str, Any]) -> S:
    """Return the ``model`` section that a network was made with; raises KeyError for a key that was not saved.

    A default in its place would be another network, which its weights may fit all the same.
    """
    missing = [field.name for field in fields(schema) if field.name not in about]
    if missing:
        raise KeyError(missing[0])
    return schema(**about)


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
