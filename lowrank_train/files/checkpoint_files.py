"""Files of torch.distributed.checkpoint: read without executing anything in them, written with their checksums.

torch reads the index of a checkpoint (``.metadata``) and its plain values with ``pickle``, which runs whatever code a
file asks for. Here only the classes of an index are found, and values are loaded with ``weights_only``.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lowrank_train.files.checksums import FileChecksum, write_checksums
from lowrank_train.files.inner_paths import is_inside

__all__ = ["ChecksumWriter", "load_plain", "read_index"]

_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Module -> what the index of a checkpoint is made of, beside data types and paths (torch 2.11 to 2.13)."""

_PATHS = {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}


def read_index(path: Path) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """Return entries of a checkpoint by name.

    Args:
        path: a checkpoint folder.

    Raises:
        Exception: whatever reading a damaged or hostile file raises; nothing in it was executed.
    """
    entries: dict[str, Any] = _Reader(path).read_metadata().state_dict_metadata
    return entries


def load_plain(state: dict[str, Any], path: Path, *, alone: bool = False) -> None:
    """Load a checkpoint into nested dicts of tensors, in place; other values must be plain and are replaced.

    Args:
        state: what is wanted of it.
        path: a checkpoint folder.
        alone: in this process only, whatever group it is in.

    Raises:
        CheckpointException: a file is damaged, or a value is more than numbers, text and tensors.
    """
    load(state, storage_reader=_Reader(path), planner=_PlainValues(), no_dist=alone)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PurePath  # only says where the checkpoint once was, perhaps on another system
        raise pickle.UnpicklingError(
            f"its .metadata asks for {module}.{name}, which is no part of a checkpoint; nothing was executed"
        )


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        _check_index(metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata  # type: ignore[no-any-return]


class _PlainValues(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's planner unpickles without limits; it is given only what was read with limits before.
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _check_index(metadata: Any) -> None:
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    fits = (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(metadata.storage_data, dict)
        and all(isinstance(key, str) for key in metadata.state_dict_metadata)
        and all(isinstance(entry, kinds) for entry in metadata.state_dict_metadata.values())
    )
    if not fits:
        raise ValueError("its .metadata is not the index of a checkpoint")
    for place in metadata.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or not is_inside(name) or "/" in name or "\\" in name:
            raise ValueError(f"its .metadata names the file {name!r}, which is not in the folder")


class ChecksumWriter(FileSystemWriter):
    """Writes a checkpoint and, as its last file, ``checksums.txt``.

    Every rank reads its own files back once they are written; in the background if the whole save is.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; checksums travel to the first rank as results of their own."""
        results = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        checksums = [FileChecksum.of(Path(self.path), name) for name in names]
        results += [WriteResult(MetadataIndex(c.name), c.size, c) for c in checksums]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, and then the checksums of all files."""
        found = [result for of_rank in results for result in of_rank]
        checksums = [result.storage_data for result in found if isinstance(result.storage_data, FileChecksum)]
        super().finish(metadata, [[r for r in found if not isinstance(r.storage_data, FileChecksum)]])
        write_checksums(Path(self.path), checksums)
