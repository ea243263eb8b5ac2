"""How long a stretch of work takes on a device, measured without waiting for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch

__all__ = ["DeviceClock"]


class DeviceClock:
    """Times the blocks it is entered for: ``with clock: ...``.

    CUDA only queues work, so the host's clock would see nothing of it: a block lies between two events, which are read
    once the device has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = 0.0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def take(self) -> float:
        """Return the seconds of all blocks since the last call.

        A block that the device has not finished counts at a later call.
        """
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            self._seconds += first.elapsed_time(last) / 1000  # milliseconds
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((event, torch.cuda.Event(enable_timing=True)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began
