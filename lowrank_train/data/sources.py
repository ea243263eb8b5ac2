"""What tokens were made from, by content: changed text is noticed, and text at another place is the same text.

A source is plain JSON, kept in ``data.json`` beside the tokens:

    files of this machine    {"place": PATH, "files": [{name, size, mtime_ns, ctime_ns, sha256}, ...], "left_out": ...}
    a Hugging Face dataset   {"hub": NAME, "config": ..., "split": ..., "content": "not checked"}
    the text of Python       {"embedded": VERSION}
    a tokenizer of the run   {"trained": KIND}

Size and times tell quickly that a file is the one of last time; otherwise its content is read again.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.config.schema import DataConfig
from lowrank_train.text.files import find_files

__all__ = ["KEYS", "describe_source", "difference", "digest", "sources", "summary"]

KEYS = ("data.path", "data.validation", "data.tokenizer")
"""Keys of the configuration that name what tokens are made from."""

_CHUNK = 2**20
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


def sources(
    config: DataConfig, known: Mapping[str, Any], *, sampled: bool, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Return key -> source for ``KEYS``; {} for a key without a value.

    Args:
        config: where text comes from.
        known: sources of last time, whose files need not be read again where size and times are the same.
        sampled: read only the start, middle and end of each file. For streamed text, which is too large to be read
            before training.
        skip: keys that are left {}.

    Raises:
        UserError: a file cannot be read, or there is none.
    """
    describe = {
        "data.path": lambda known: _training_text(config, known, sampled),
        "data.validation": lambda known: _held_out_text(config, known),
        "data.tokenizer": lambda known: _tokenizer(config, known),
    }
    return {key: {} if key in skip else describe[key](known.get(key, {})) for key in KEYS}


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say how the content of two sources differs; None if it is the same."""
    if digest(then) == digest(now):
        return None
    if "files" not in then or "files" not in now:
        return f"it was {_in_short(then)}, is {_in_short(now)}"
    old, new = ({file["name"]: file["sha256"] for file in source["files"]} for source in (then, now))
    changes = {
        "changed": [name for name in new if name in old and old[name] != new[name]],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    words = [f"{what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for what, names in changes.items() if names]
    return "; ".join(words) or "its files have another order"


def digest(source: Mapping[str, Any]) -> str:
    """Return one hash of the content of all files in their order, or what stands for the content."""
    if "files" not in source:
        return str({key: value for key, value in source.items() if key != "content"})
    together = hashlib.sha256()
    for file in source["files"]:
        together.update(f"{''.join(Path(file['name']).suffixes[-2:])}:{file['sha256']}\n".encode())
    return together.hexdigest()


def summary(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record of the run says about a source."""
    if "files" not in source:
        return dict(source)
    names = [file["name"] for file in source["files"]]
    shown = names if len(names) <= 20 else [*names[:19], f"and {len(names) - 19} more"]
    return {"files": shown, "left_out": source.get("left_out", []), "sha256": digest(source)}


def describe_source(key: str, source: Mapping[str, Any]) -> list[str]:
    """Say which files of a folder are read and which are not; nothing for a single file."""
    names = [file["name"] for file in source.get("files", [])]
    lines = []
    if names and names != [Path(source["place"]).name]:
        lines.append(f"{key}={source['place']}: reads {_some(names)}")
    if source.get("left_out"):
        lines.append(
            f"{key}={source['place']}: does not read {_some(source['left_out'])}, held-out text by its name; "
            "data.validation=FILE evaluates on it, and under another name it is training text"
        )
    return lines


def _training_text(config: DataConfig, known: Mapping[str, Any], sampled: bool) -> dict[str, Any]:
    if config.path is None:
        return {"embedded": platform.python_version()}
    if not Path(config.path).exists():
        return _on_hub(config.path, config.name, "train")
    found = find_files(config.path, "data.path", without=config.validation, training=True)
    left_out = [found.name(file) for file in found.left_out]
    return {**_of_files(found.root, found.files, known, sampled), "left_out": left_out}


def _held_out_text(config: DataConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    if config.validation is None:
        return {}
    if not Path(config.validation).exists():
        return _on_hub(str(config.path), config.name, config.validation)
    found = find_files(config.validation, "data.validation")
    return _of_files(found.root, found.files, known, False)


def _tokenizer(config: DataConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    if config.tokenizer is None:
        return {"trained": f"bpe-{config.vocab_size}"}
    root = Path(config.tokenizer)
    if not root.exists():
        return _on_hub(config.tokenizer, None, None)
    parts = {root} if root.is_file() else {f for pattern in _TOKENIZER_FILES for f in root.glob(pattern) if f.is_file()}
    return _of_files(root, sorted(parts), known, False)


def _some(names: list[str]) -> str:
    shown = ", ".join(names if len(names) <= 5 else [*names[:3], "...", names[-1]])
    return f"{len(names)} file{'s' * (len(names) > 1)} ({shown})"


def _in_short(source: Mapping[str, Any]) -> str:
    if "files" in source:
        return f"{len(source['files'])} file(s) in {source['place']}"
    return ", ".join(f"{key} {value}" for key, value in source.items() if value is not None) or "nothing"


def _on_hub(name: str, config: str | None, split: str | None) -> dict[str, Any]:
    return {"hub": name, "config": config, "split": split, "content": "not checked"}


def _of_files(root: Path, files: list[Path], known: Mapping[str, Any], sampled: bool) -> dict[str, Any]:
    cached = {_stamp(file): file["sha256"] for file in known.get("files", [])}
    found: list[dict[str, Any]] = []
    unread: list[tuple[dict[str, Any], Path]] = []
    for file in files:
        about = file.stat()
        entry: dict[str, Any] = {
            "name": file.name if file == root else file.relative_to(root).as_posix(),
            "size": about.st_size,
            "mtime_ns": about.st_mtime_ns,
            "ctime_ns": about.st_ctime_ns,
        }
        entry["sha256"] = cached.get(_stamp(entry))
        if entry["sha256"] is None or entry["sha256"].startswith("sample") != sampled:
            unread.append((entry, file))
        found.append(entry)
    for _ in show_progress(_hash(unread, sampled), "reading files to know their content", "MiB"):
        pass
    return {"place": str(root.resolve()), "given": os.path.abspath(root), "files": found}


def _stamp(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("name", "size", "mtime_ns", "ctime_ns"))


def _hash(files: list[tuple[dict[str, Any], Path]], sampled: bool) -> Iterator[None]:
    """Fill in the hashes, a chunk at a time."""
    for entry, file in files:
        hasher = hashlib.sha256(str(entry["size"]).encode() if sampled else b"")
        try:
            with file.open("rb") as stream:
                if sampled and entry["size"] > 3 * _CHUNK:
                    for place in (0, entry["size"] // 2, entry["size"] - _CHUNK):
                        stream.seek(place)
                        hasher.update(stream.read(_CHUNK))
                        yield
                else:
                    while chunk := stream.read(_CHUNK):
                        hasher.update(chunk)
                        yield
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        entry["sha256"] = f"{'sample ' * sampled}{hasher.hexdigest()}"
