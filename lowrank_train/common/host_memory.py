"""Memory of the host: what is left of it, whether a predicted need fits, and what to say when it runs out."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowrank_train.common.errors import OwnError, UserError, first_line
from lowrank_train.common.units import show_bytes

__all__ = ["available_bytes", "check_memory", "say_out_of_memory"]

_UNLIMITED = 2**60
"""Version 1 of cgroups writes a number beyond this where there is no limit."""

_ALLOCATOR = re.compile(r"can't allocate memory|not enough memory|tried to allocate|failed to allocate|Cannot allocate")
"""What the messages of torch's CPU allocator and of ``mmap`` say."""


def available_bytes() -> int | None:
    """Return what this process may still take: the least of what machine, cgroup and process limit leave.

    None where the system does not say.
    """
    left = [_machine(), *_cgroups(), _process()]
    known = [max(0, bytes_left) for bytes_left in left if bytes_left is not None]
    return min(known) if known else None


def check_memory(need: int, what: str, remedy: str) -> None:
    """Refuse what cannot fit, before it is built.

    Args:
        need: bytes of host memory, of all processes of this machine together.
        what: subject of the message, such as "this run".
        remedy: what the user can change, in the imperative.

    Raises:
        UserError: the need exceeds what is available.
    """
    available = available_bytes()
    if available is not None and need > available:
        raise UserError(
            f"{what} needs {show_bytes(need)} of host memory, and {show_bytes(available)} are available; {remedy}"
        )


@contextmanager
def say_out_of_memory(need: int | None = None, remedy: str = "take a smaller model or micro_batch") -> Iterator[None]:
    """Turn the errors of an allocation that failed into one message.

    Args:
        need: predicted bytes of host memory; None: not known.
        remedy: what the user can change, in the imperative.

    Raises:
        OwnError: the memory of this host, or of this process's device, ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_allocation(error):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this host"
        available = None if isinstance(error, torch.OutOfMemoryError) else available_bytes()
        predicted = "" if need is None else f"; {show_bytes(need)} are predicted"
        left = "" if available is None else f"; {show_bytes(available)} are available"
        cause = first_line(error).strip()
        asked = re.search(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)", cause)
        request = f" when {asked[1]} {asked[2]} more were asked for" if asked else ""
        raise OwnError(f"the memory of {where} ran out{request}{predicted}{left}; {remedy}") from None


def _is_allocation(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return bool(_ALLOCATOR.search(str(error)))


def _machine() -> int | None:
    try:
        figures = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE))
        return 1024 * (int(figures["MemAvailable"]) + int(figures.get("SwapFree", 0)))
    except (OSError, KeyError, ValueError):
        pass
    try:  # not Linux: all there is, which is an upper bound
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _cgroups() -> list[int]:
    """Return what the cgroup of this process and those above it leave; pages of files count as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / place.lstrip("/")
        for level in [folder, *folder.parents]:
            if not level.is_relative_to(root):
                break
            bytes_left = _cgroup(level, *names)
            if bytes_left is not None:
                left.append(bytes_left)
    return left


def _cgroup(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """None where this level has no limit, or is not visible from within a container."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= _UNLIMITED:
            return None
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int((folder / usage).read_text()) + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):
        return None


def _process() -> int | None:
    """Return what ``ulimit -v`` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
