"""The step benchmark: time, state and communication of every optimizer on the same matrices, without a model."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lowrank_train import optim
from lowrank_train.bench.grid import positive
from lowrank_train.bench.report import Report, markdown, origin, output_folder, publish
from lowrank_train.common.errors import UserError
from lowrank_train.common.host_memory import available_bytes
from lowrank_train.common.record import provenance
from lowrank_train.config.schema import ModelConfig
from lowrank_train.models.build import SIZES, architecture, skeleton
from lowrank_train.optim.costs.sent import FORMULAS, communicated_bytes, model_shapes
from lowrank_train.optim.costs.table import aligned, size_text
from lowrank_train.optim.costs.time import BASELINES, StepTime, rank_argument, time_steps

__all__ = ["communication", "find_device", "measure", "report"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Groups = list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------- time


def measure(arguments: Sequence[str]) -> str:
    """Time the steps that ``arguments`` ask for, and write step.json and step.md into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: arguments that do not fit together, or too little memory, before anything is measured.
    """
    given = _step_parser().parse_args(arguments)
    for key in ("interval", "rounds", "threads", "world_size"):
        if getattr(given, key) is not None:
            positive(f"--{key.replace('_', '-')}", getattr(given, key))
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = find_device(given.device)
    shapes = _shapes(given.shapes, given.layers, device)
    dtype = _DTYPES[given.dtype]
    names = given.optimizers or optim.names(of_matrices=True)
    load = _load()
    try:
        settings = {name: rank_argument(name, given.rank) for name in names}
        state = {name: optim.predicted_state_bytes(name, _groups(shapes, dtype), **settings[name]) for name in names}
        _check_memory(shapes, dtype, state, device)
        times = time_steps(
            settings,
            shapes,
            dtype=dtype,
            device=device,
            interval=given.interval,
            rounds=given.rounds,
            refreshes=min(given.rounds, 3),
            progress=_show,
        )
        _show("")
        rows = [_row(time, settings[time.name], state[time.name], shapes, dtype, given.world_size) for time in times]
    except (ValueError, torch.OutOfMemoryError) as error:
        raise UserError(str(error)) from None
    figures = {
        "what": "one step of every optimizer on the same matrices and gradients, interleaved with torch's AdamW",
        "provenance": provenance(device),
        "load_average": {"before": load, "after": _load()},
        "shapes": [list(shape) for shape in shapes],
        **{key: getattr(given, key) for key in ("dtype", "rank", "interval", "rounds", "world_size")},
        "rows": sorted(rows, key=lambda row: row["amortised_ratio"]["fused"]),
    }
    return publish(output_folder(given.out), "step", figures, report(figures))


def _row(
    time: StepTime,
    arguments: dict[str, Any],
    state: int,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    world_size: int,
) -> dict[str, Any]:
    interval = {} if time.interval is None else {"refresh_interval": time.interval}
    sent = communicated_bytes(time.name, _groups(shapes, dtype), world_size=world_size, **arguments, **interval)
    return {
        **asdict(time),
        "amortised_ratio": time.amortised_ratio,
        "arguments": arguments,
        "state_bytes": state,
        "state_bytes_per_parameter": state / sum(rows * columns for rows, columns in shapes),
        "sent_bytes": {"mean": sent.mean_sent, "ordinary_step": sent.step_sent, "refresh_step": sent.refresh_sent},
    }


def _step_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py optimizer-step", description="Time one step of each optimizer on the same matrices."
    )
    parser.add_argument(
        "--shapes",
        default="llama_1b",
        help=f"a model ({', '.join(SIZES)}) for its matrices, or matrices like 2048x2048,5504x2048; default: llama_1b",
    )
    parser.add_argument("--layers", type=int, help="of the model, only so many; default: 1 on a CPU, else all")
    parser.add_argument("--rank", type=int, help="of the methods that have one; default: theirs, a quarter")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights; default: float32")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--interval", type=int, default=200, help="steps between two refreshes; default: 200")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each; default: 10")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    parser.add_argument("--world-size", type=int, default=8, help="ranks, for communication; default: 8")
    parser.add_argument("--out", default="runs/optimizer-step", help="folder of step.json and step.md")
    return parser


def report(figures: Mapping[str, Any]) -> Report:
    """Return what step.md shows, from the figures of step.json."""
    head = ["optimizer", *(f"step x {key} AdamW" for key in BASELINES), "refresh s"]
    head += [*(f"amortised x {key}" for key in BASELINES), "first step s", "state B/parameter", "sent per step"]
    head += ["sent at a refresh"]
    return Report("One optimizer step", markdown(head, map(_cells, figures["rows"])), _notes(figures))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        *(f"{row['ordinary_ratio'][key]:.2f}" for key in BASELINES),
        f"{row['refresh_seconds']:.3f}" if row["interval"] else "",
        *(f"{row['amortised_ratio'][key]:.2f}" for key in BASELINES),
        f"{row['first_seconds']:.3f}",
        f"{row['state_bytes_per_parameter']:.3f}",
        size_text(row["sent_bytes"]["mean"]),
        size_text(row["sent_bytes"]["refresh_step"]) if row["interval"] else "",
    ]


def _notes(figures: Mapping[str, Any]) -> list[str]:
    load = figures["load_average"]
    shapes = Counter(tuple(shape) for shape in figures["shapes"])
    matrices = ", ".join(f"{count} of {rows} x {columns}" for (rows, columns), count in shapes.items())
    adamw = ", ".join(f"{key} {1000 * _median_adamw(figures, key):.1f} ms" for key in BASELINES)
    spread = max((q[1] - q[0]) / row["ordinary_ratio"]["fused"] for row in figures["rows"] for q in [_fused(row)])
    return [
        f"{matrices}; {figures['dtype']}, rank {figures['rank'] or 'a quarter'} (APOLLO-Mini: its own), "
        f"{figures['rounds']} rounds of interleaved steps, medians of paired ratios. torch's AdamW: {adamw}.",
        f"Amortised: (step + refresh / {figures['interval']}) / AdamW. An optimizer without refresh time has none, or "
        "chooses directions in every step. The first step, which also allocates, is in no ratio.",
        f"Sent: by one of {figures['world_size']} ranks, every payload taken as a ring all-reduce: at most that.",
        f"The middle half of a row's ratios to fused AdamW is at most {100 * spread:.0f} % wide; load average "
        f"{load['before']} before, {load['after']} after: what else the machine did is in the figures.",
        origin(figures["provenance"]),
    ]


def _fused(row: dict[str, Any]) -> tuple[float, float]:
    return row["quartiles"]["fused"]


def _median_adamw(figures: Mapping[str, Any], key: str) -> float:
    seconds = sorted(row["adamw_seconds"][key] for row in figures["rows"])
    return seconds[len(seconds) // 2]


def _shapes(text: str, layers: int | None, device: torch.device) -> list[tuple[int, int]]:
    if text in SIZES:
        if layers is None and device.type == "cpu":
            layers = 1
        return list(model_shapes(_model(text, layers)).matrices)
    if layers is not None:
        raise UserError(f"--layers goes with a model, and --shapes {text} is none of {', '.join(SIZES)}")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise UserError(f"--shapes {text}; expected matrices like 2048x2048,5504x2048 or one of {', '.join(SIZES)}")
    return [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in text.split(","))]


def _model(name: str, layers: int | None = None) -> nn.Module:
    """A model without memory, of the first ``layers`` layers. Raises UserError for an unknown name."""
    whole = architecture(ModelConfig(name=name)).num_hidden_layers
    if layers is None:
        layers = whole
    if not 1 <= layers <= whole:
        raise UserError(f"--layers {layers}; {name} has {whole}")
    return skeleton(
        architecture(ModelConfig(name=name, overrides={"num_hidden_layers": layers})), torch.get_default_dtype()
    )


def _groups(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Groups:
    params = [(f"matrix {i}", torch.empty(shape, dtype=dtype, device="meta")) for i, shape in enumerate(shapes)]
    return [{"params": params, "role": "matrix"}]


def _check_memory(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, state: dict[str, int], device: torch.device
) -> None:
    """Weights, gradients, the state of all optimizers at once, and workspace of four times the largest matrix."""
    sizes = [rows * columns for rows, columns in shapes]
    needed = (2 + 2 * len(BASELINES)) * sum(sizes) * dtype.itemsize + sum(state.values()) + 4 * max(sizes) * 4
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{sum(sizes):,} parameters with the state of {len(state)} optimizers need {needed / 2**30:.1f} GiB on "
            f"{device}, where {available / 2**30:.1f} GiB are free; give fewer --optimizers, --layers or --shapes"
        )


def find_device(name: str | None) -> torch.device:
    """Return a device by name; None: CUDA where there is one. Raises UserError for what is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}; expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name} is not available here; use cpu")
    return device


def _show(message: str) -> None:
    """On one line of a terminal; nowhere else."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def _load() -> str:
    """Mean number of processes that wanted a core in the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


# ------------------------------------------------------------------------------------------------------- communication


def communication(arguments: Sequence[str]) -> str:
    """Return what every optimizer sends per step when a model is sharded, beside formulas of other implementations.

    Raises:
        UserError: arguments that do not fit together.
    """
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py communication", description="Predict the bytes a rank sends in a step, from shapes."
    )
    parser.add_argument("--model", default="llama_7b", help="or a folder with a config.json; default: llama_7b")
    parser.add_argument("--world-size", type=int, default=8, help="ranks; default: 8")
    parser.add_argument("--rank", type=int, default=512, help="of the methods that have one; default: 512")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights; default: float32")
    given = parser.parse_args(arguments)
    ranks = positive("--world-size", given.world_size)
    model = _model(given.model).to(_DTYPES[given.dtype])
    head = ["optimizer", "payload", "sent", "sent at other steps", "every", "sent per step"]
    rows = []
    for name in optim.names(of_matrices=True):
        try:
            found = communicated_bytes(name, model, world_size=ranks, **rank_argument(name, given.rank))
        except ValueError as error:
            raise UserError(str(error)) from None
        others = size_text(found.step_sent) if found.interval not in (None, 1) else ""
        most = [found.step_payload + found.refresh_payload, found.refresh_sent]
        rows.append([name, *map(size_text, most), others, str(found.interval or ""), size_text(found.mean_sent)])
    shapes = model_shapes(model)
    formulas = [
        [label, size_text(formula(shapes, given.rank, ranks)), (formula.__doc__ or "").splitlines()[0]]
        for label, formula in FORMULAS.items()
    ]
    return "\n".join(
        [
            f"{given.model} ({len(shapes.matrices)} matrices, {shapes.parameters:,} parameters) in {given.dtype} on "
            f"{ranks} ranks, rank {given.rank}, from shapes; bytes of one rank.",
            "",
            "payload              what it hands to collectives at a step that chooses directions, where a method does",
            "sent                 what then leaves it, at most: each payload as a ring all-reduce, 2 (P - 1) / P of it",
            "sent at other steps  where directions are chosen every so many steps (every)",
            "sent per step        the mean of these",
            "",
            aligned([head, *rows]),
            "",
            "By formula, others, sent per step, in 2-byte numbers:",
            "",
            aligned(formulas, left=(0, 2)),
        ]
    )
