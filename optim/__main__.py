"""``python -m lowrank_train.optim``: every optimizer of this package on one matrix, measured on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lowrank_train.optim.costs.table import Row, aligned, compare, size_text, summary, timing_sizes

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None, program: str = "python -m lowrank_train.optim") -> int:
    """Print the table; exit code 0, or 2 for anything the user must mend."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="All optimizers on one matrix: bytes of state, bytes a rank sends when it is sharded, and time of "
        "a step over one of torch's AdamW.",
    )
    parser.add_argument("--rows", type=int, default=4096, help="default: 4096")
    parser.add_argument("--columns", type=int, default=4096, help="default: 4096")
    parser.add_argument("--rank", type=int, help="of every method that has one; default: a quarter of the smaller size")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the parameter; default: float32")
    parser.add_argument("--world-size", type=int, default=8, help="ranks it is sharded over; default: 8")
    parser.add_argument("--device", help="to time steps on; default: cuda where there is one, else cpu")
    parser.add_argument("--no-timing", action="store_true", help="do not measure")
    given = parser.parse_args(arguments)
    try:
        print(_report(given))
    except (ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _report(given: argparse.Namespace) -> str:
    for key in ("rows", "columns", "world_size"):
        if getattr(given, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(given, key)}; expected a whole number >= 1")
    largest = min(given.rows, given.columns)
    if given.rank is not None and not 1 <= given.rank <= largest:
        raise ValueError(
            f"--rank {given.rank} does not fit a {given.rows} x {given.columns} matrix; expected 1 to {largest}"
        )
    rank = given.rank or max(1, largest // 4)
    device = None if given.no_timing else torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = compare(
        given.rows, given.columns, rank, dtype=_DTYPES[given.dtype], world_size=given.world_size, device=device
    )
    lines = [
        f"One {given.rows} x {given.columns} matrix in {given.dtype}, rank {rank}. Sent: by one of {given.world_size} "
        "ranks, at most (every payload as a ring all-reduce); sent/step is the mean over all steps.",
        _timing_note(given, rank, device),
        "",
        _table(rows),
        "",
        aligned([[row.name, summary(row.name)] for row in rows], left=(0, 1)),
        "",
        "optim.describe(NAME) lists the arguments of one, help(optim.CLASS) what they mean.",
    ]
    return "\n".join(lines)


def _timing_note(given: argparse.Namespace, rank: int, device: torch.device | None) -> str:
    if device is None:
        return "Times were not measured."
    height, width, small = timing_sizes(given.rows, given.columns, rank, device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"Time: a mean step over one of torch's fused AdamW, refreshes included, on {height} x {width} at rank {small} "
        f"({place}), a few rounds."
    )


def _table(rows: Sequence[Row]) -> str:
    head = ["optimizer", "state", "B/parameter", "sent/step", "at a refresh", "every", "time", "published"]
    return aligned([head, *map(_cells, rows)], left=(0, 7))


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        size_text(row.state_bytes),
        f"{row.state_bytes_per_parameter:.3f}",
        size_text(row.mean_sent_bytes),
        size_text(row.refresh_sent_bytes) if row.interval else "",
        str(row.interval) if row.interval else "",
        "" if row.time is None else f"{row.time.amortised_ratio['fused']:.2f}x",
        row.source,
    ]


if __name__ == "__main__":
    sys.exit(main())
