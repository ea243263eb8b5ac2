"""Small files of a run folder, written at once: a kill or a full disk leaves the old content or the new one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, read it back, and give it its name.

    Args:
        path: its folder must exist; an earlier file there is replaced.
        text: its whole content, in UTF-8.

    Raises:
        OSError: it cannot be written, or came back different; the earlier file, if any, is as it was.
    """
    scratch = path.with_name(path.name + ".tmp")
    data = text.encode()
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if scratch.read_bytes() != data:
            raise OSError(errno.EIO, "what was written came back different", str(scratch))
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
