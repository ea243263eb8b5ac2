"""Checkpoints with torch.distributed.checkpoint: atomic, the newest k kept, loadable on any number of ranks.

A checkpoint is written to ``step-N.tmp`` and renamed when every rank's part is on disk, so that a kill at any instant
leaves the last good one. In the background it is written through a process group of its own: on the training's group
its messages would cross those of FSDP2 and deadlock.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from lowrank_train.common.errors import Diverged, UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.files.checkpoint_files import ChecksumWriter, load_plain, read_index
from lowrank_train.files.checkpoint_folder import (
    checkpoints_of,
    clear_leftovers,
    delete_checkpoint,
    error_cause,
    last_good,
    read_about,
    write_about,
)
from lowrank_train.files.checksums import damage_in, has_checksums
from lowrank_train.files.disk import write_failure
from lowrank_train.files.finite import name_not_finite
from lowrank_train.optim.shards.layout import laid_out_as, local
from lowrank_train.optim.storage.int8_weight import Int8Weight

if TYPE_CHECKING:
    from lowrank_train.optim import MatrixOptimizer

__all__ = ["Checkpoints", "read_weights"]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds ``step-N`` folders; made if absent.
        ranks: the run's ranks; all must make the same calls.
        every: steps between two of them; 0: only at the end.
        keep: newest checkpoints kept.
        asynchronous: write in the background.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, every: int, keep: int, asynchronous: bool) -> None:
        self.folder, self.ranks, self.asynchronous = folder, ranks, asynchronous
        self.every, self.keep = every, keep
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if asynchronous else None
        self._pending: tuple[Path, Future[Any]] | None = None
        self._failed: UserError | None = None
        """Why a complete checkpoint could not be given its name, on the first rank."""
        ranks.first(lambda: clear_leftovers(folder))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        """Write model, optimizer and ``extra`` (nested dicts of tensors and plain values) as ``step-N``.

        Args:
            step: N.
            model: sharded.
            optimizer: its state is sharded with it.
            extra: equal on all ranks, or under keys of one rank only.
            about: plain facts kept beside it as ``about.json``.

        Raises:
            Diverged: a number to be saved is not finite; nothing is written, and no earlier checkpoint deleted.
            UserError: an earlier or this write failed (disk full, no permission); the last good checkpoint is named.
        """
        self.wait()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": _in_parts(model_state), "optimizer": optimizer_state, **extra}
        self.check_finite(step, state)
        scratch = self.folder / f"step-{step}.tmp"
        self.ranks.first(self._check_there)
        self.ranks.first(lambda: write_about(scratch, {"step": step, **about}))
        writer = ChecksumWriter(scratch)
        try:
            if self.asynchronous:
                stager = DefaultStager(StagingOptions(False, False, False, False))  # async_save's own
                written = async_save(state, storage_writer=writer, process_group=self.group, async_stager=stager)
                assert isinstance(written, Future)
                written.add_done_callback(lambda _: stager.close())
                self._pending = (scratch, written)
            else:
                save(state, storage_writer=writer)
                self.ranks.first(lambda: self._publish(scratch))
        except (CheckpointException, OSError) as error:
            raise self._failure(scratch, error) from None

    def check_finite(self, step: int, state: dict[str, Any]) -> None:
        """Raise Diverged on all ranks if a tensor of a (nested) state holds a number that is not finite on one."""

        def check() -> None:
            name = name_not_finite(state)
            if name is not None:
                raise Diverged(
                    f"at step {step} {_in_words(name)} holds a number that is not finite: no checkpoint of it is "
                    f"written; {last_good(self.folder)}. Lower optimizer.lr or clip, and resume"
                )

        self.ranks.each(check)

    def poll(self) -> bool:
        """Publish a background checkpoint that is complete; True if writing it failed on this rank."""
        if self._pending is None or not self._pending[1].done():
            return False
        if self._pending[1].exception() is not None:
            return True
        scratch, _ = self._pending
        self._pending = None
        try:
            self._publish(scratch)
        except UserError as error:  # this rank's alone: ``wait`` raises it on all
            self._failed = error
        return self._failed is not None

    def wait(self) -> None:
        """Wait for a background checkpoint to be published; all ranks must call.

        Raises UserError on all ranks if it could not be written.
        """
        self.ranks.each(self._wait)

    def _wait(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._pending is None:
            return
        scratch, written = self._pending
        self._pending = None
        try:
            written.result()
        except (CheckpointException, OSError) as error:
            raise self._failure(scratch, error) from None
        self._publish(scratch)

    def load(self, path: Path, model: nn.Module, optimizer: MatrixOptimizer, about: dict[str, Any]) -> dict[str, Any]:
        """Restore model and optimizer in place from ``path``; returns the ``extra`` it was saved with.

        Args:
            path: a ``step-N`` folder.
            model: as saved, on any number of ranks.
            optimizer: as saved.
            about: what must be equal in ``about.json``.

        Raises:
            UserError: not a checkpoint, damaged, or of another model, optimizer, rank or data.
        """
        saved = read_about(path)
        for key, value in _flat(json.loads(json.dumps(about))).items():
            got = _flat(saved).get(key)
            if got != value:
                raise UserError(
                    f"{path} was written by a run with {key} = {got}; expected {value}: give the settings it was "
                    "written with, or resume=never with another run_dir"
                )
        try:
            metadata = read_index(path)
        except Exception as error:  # unpickling a damaged file may raise anything
            raise self._damage(path, error) from None
        model_state, optimizer_state = get_state_dict(model, optimizer)
        parts = _in_parts(model_state)  # of the same memory
        wanted: dict[str, Any] = {f"model.{key}": value for key, value in parts.items()}
        optimizer_tensors: dict[str, Any] = optimizer_state["state"]  # type: ignore[assignment]
        for name, tensors in optimizer_tensors.items():
            wanted.update({f"optimizer.state.{name}.{key}": value for key, value in tensors.items()})
        for key, value in wanted.items():
            found = getattr(metadata.get(key), "size", None)
            if found is None or tuple(found) != tuple(value.shape):
                got = "nothing" if found is None else f"shape {tuple(found)}"
                raise UserError(
                    f"{path} holds {got} for {key!r}; expected shape {tuple(value.shape)}: it is of another model, "
                    "optimizer or rank; give the settings it was written with, or resume=never with another run_dir"
                )
        left_over = [key for key in metadata if key.startswith(("model.", "optimizer.state.")) and key not in wanted]
        if left_over:
            raise UserError(
                f"{path} holds {left_over[0]!r}, which this model or optimizer has no place for; give the settings it "
                "was written with, or resume=never with another run_dir"
            )
        extra: dict[str, dict[str, Any]] = {}
        try:
            for key, entry in metadata.items():
                section, _, name = key.partition(".")
                if section not in ("model", "optimizer"):
                    empty = None
                    if isinstance(entry, TensorStorageMetadata):
                        empty = torch.empty(entry.size, dtype=entry.properties.dtype)
                    extra.setdefault(section, {})[name] = empty
            _leave_out_unsaved(optimizer_state, metadata)
            state: dict[str, Any] = {"model": parts, "optimizer": optimizer_state, **extra}
            load_plain(state, path)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._damage(path, error) from None
        self.ranks.each(lambda: self._check_loaded(path, {"model": parts, "optimizer": optimizer_state}))
        try:
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state["optimizer"])
        except ValueError as error:
            raise UserError(f"{path}: {error}, or resume=never with another run_dir") from None
        return {key: state[key] for key in extra}

    def _publish(self, scratch: Path) -> None:
        """Give a complete checkpoint its name and delete the oldest; on the first rank, which wrote the last file."""
        if not self.ranks.is_first:
            return
        final = scratch.with_suffix("")
        try:
            if final.exists():  # the same step, saved again after a resume
                delete_checkpoint(final)
            scratch.rename(final)
            for old in checkpoints_of(self.folder)[: -self.keep]:
                delete_checkpoint(old)
        except OSError as error:
            raise self._failure(scratch, error) from None

    def _check_loaded(self, path: Path, state: dict[str, Any]) -> None:
        name = name_not_finite(state)
        if name is not None:
            raise self._damage(path, ValueError(f"{_in_words(name)} holds a number that is not finite"))

    def _check_there(self) -> None:
        """Raise UserError if the folder was deleted under the run: the rest of the run went with it."""
        if not self.folder.is_dir():
            raise write_failure("a checkpoint", self.folder, "", last_good(self.folder))

    def _failure(self, scratch: Path, error: BaseException) -> UserError:
        if self.ranks.is_first:
            shutil.rmtree(scratch, ignore_errors=True)
        what = f"the checkpoint {scratch.with_suffix('')}"
        return write_failure(what, self.folder, error_cause(error), last_good(self.folder))

    def _damage(self, path: Path, error: BaseException) -> UserError:
        others = [other.name for other in checkpoints_of(path.parent) if other != path]
        then = f"delete it, and resume=auto goes on from {others[-1]}" if others else "there is no other beside it"
        return UserError(f"{path} is damaged ({error_cause(error)}); {then}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the whole weights in a checkpoint, by parameter name, in one process.

    Raises UserError if it is damaged.
    """
    damage = damage_in(path) if has_checksums(path) else None
    if damage is not None:
        raise UserError(f"{path} is damaged ({damage})")
    try:
        metadata = read_index(path)
        weights = {
            key.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.items()
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings(action="ignore"):  # that it is one process, which is what was asked for
            load_plain({"model": weights}, path, alone=True)
        for name in [key.removesuffix(_CODES) for key in weights if key.endswith(_CODES)]:
            whole = Int8Weight(weights.pop(name + _CODES), weights.pop(name + _SCALE))
            weights[name] = whole.wide(torch.float32)
    except (CheckpointException, Exception) as error:  # a damaged file may raise anything
        raise UserError(f"{path} is damaged ({error_cause(error)})") from None
    return weights


_CODES, _SCALE = ".int8_codes", ".int8_scale"


def _in_parts(model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices kept in int8 as codes and scales, which any reader of checkpoints knows."""
    parts: dict[str, Any] = {}
    for name, value in model_state.items():
        kept = local(value)
        if isinstance(kept, Int8Weight):
            parts[name + _CODES] = laid_out_as(value, kept.codes)
            parts[name + _SCALE] = laid_out_as(value, kept.scale, (value.shape[0], kept.scale.shape[1]))
        else:
            parts[name] = value
    return parts


def _leave_out_unsaved(optimizer_state: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    """Ask for no setting of a parameter group that an earlier version did not save: it keeps its present value."""
    for index, group in enumerate(optimizer_state["param_groups"]):
        for key in [key for key in group if f"optimizer.param_groups.{index}.{key}" not in metadata]:
            del group[key]


def _in_words(entry: str) -> str:
    """What an entry of a checkpoint is."""
    if entry.startswith("optimizer.state."):
        name, _, key = entry.removeprefix("optimizer.state.").rpartition(".")
        return f"{key} (optimizer state) of the parameter {name!r}"
    section, _, name = entry.partition(".")
    return f"the parameter {name!r}" if section == "model" else repr(entry)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
