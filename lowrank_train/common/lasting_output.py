"""Standard output and error that outlive their reader: a closed terminal, a pipe whose other end is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

__all__ = ["lasting_output"]


class _Lasting:
    """A stream whose first failed write sends everything after it to nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _silence(self._stream)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no write to the two standard streams fail, for as long as the context lasts.

    Work must not be lost because its output has no reader: a closed terminal gives EIO, a pipe EPIPE.
    """
    before = sys.stdout, sys.stderr
    wrapped = [stream if stream is None or isinstance(stream, _Lasting) else _Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in wrapped:
            if stream is not None:
                stream.flush()  # here, because Python's own flush at the end would complain
        sys.stdout, sys.stderr = before


def _silence(stream: TextIO) -> None:
    """Point the stream's descriptor at nothing: other writers of it, in C++ or in signal handlers, fail no more."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()  # what is still buffered
