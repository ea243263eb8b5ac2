"""The step-cost benchmark: kernels, bytes and products of every optimizer's step, counted; and the time they predict.

Nothing is run on a device: ``lowrank_train.bench.steps.kernels`` counts. For a GPU of bandwidth B (bytes a second) and
product rate F (operations a second), which needs 4 us for each launch,

    predicted time of a step = sum over its kernels of max(4 us, bytes / B, operations / F)

It leaves out caches, which make small matrices faster, and kernels that reach neither B nor F, which is most of them:
it is a lower bound for a step without a CUDA graph.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_train import optim
from lowrank_train.bench.grid import positive
from lowrank_train.bench.report import Panel, Report, markdown, origin, output_folder, publish
from lowrank_train.bench.steps.kernels import StepCount, count
from lowrank_train.common.errors import UserError
from lowrank_train.common.record import provenance
from lowrank_train.common.small_files import write_text
from lowrank_train.config import methods
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.parametrization import Dense
from lowrank_train.models.build import architecture, skeleton
from lowrank_train.optim.costs.table import aligned
from lowrank_train.optim.costs.time import rank_argument

__all__ = ["GPUS", "Gpu", "measure", "of_language_models", "report", "step_costs"]

LAUNCH = 4e-6
"""Seconds the host needs to launch a kernel: about what eager torch takes."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_FORMULA = (
    f"Predicted: the sum over kernels of max({LAUNCH * 1e6:g} us, bytes / bandwidth, operations / rate), by the data "
    "sheet of the GPU, with TF32 for products in float32; nothing was measured."
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    ``bandwidth`` is in bytes a second; ``rates`` in operations a second of dense products, for float32 with TF32.
    """

    name: str
    bandwidth: float
    rates: dict[str, float]


GPUS = (
    Gpu("RTX 4090", 1.008e12, {"float32": 82.6e12, "bfloat16": 165e12}),
    Gpu("A100 80GB SXM", 2.039e12, {"float32": 156e12, "bfloat16": 312e12}),
    Gpu("H100 SXM", 3.35e12, {"float32": 495e12, "bfloat16": 989e12}),
    Gpu("H200 SXM", 4.8e12, {"float32": 495e12, "bfloat16": 989e12}),
)
"""NVIDIA's data sheets, without sparsity."""


def step_costs(
    model: str, *, rank: int, layers: int | None, dtype: str, state_dtype: str | None, names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row of counts for each training method, and why a method has none.

    Args:
        model: a size, such as ``llama_1b``, or a folder with a ``config.json``.
        rank: of the methods that have one.
        layers: of the model, only so many.
        dtype: of weights and gradients, ``float32`` or ``bfloat16``.
        state_dtype: of moments, as the optimizers take it.
        names: of methods, see ``lowrank_train.config.methods``.

    Raises:
        UserError: an unknown model or method, settings that fit no method.
    """
    for name in names:
        try:
            methods.find(name)
        except ValueError as error:
            raise UserError(f"--methods: {error}") from None
    overrides = {} if layers is None else {"num_hidden_layers": layers}
    shapes = architecture(ModelConfig(name=model, overrides=overrides))
    rows, refused = [], {}
    for name in names:
        plain = skeleton(shapes, _DTYPES[dtype])
        sizes = [
            param.numel()
            for group in optim.param_groups(plain)
            if group["role"] == "matrix"
            for _, param in group["params"]
        ]
        baseline = 7 * _DTYPES[dtype].itemsize  # parameter, gradient, two moments read; all but the gradient written
        try:
            first, alone = _two_steps(name, shapes, rank, dtype, state_dtype, matrices_only=True)
            _, whole = _two_steps(name, shapes, rank, dtype, state_dtype, matrices_only=False)
        except (ValueError, TypeError) as error:
            refused[name] = str(error)
            continue
        rows.append(
            {
                "method": name,
                "matrices": len(sizes),
                "kernels_per_step": len(whole.kernels),
                "kernels_per_matrix": round(len(alone.kernels) / len(sizes), 2),
                "bytes_over_fused_adamw": round(alone.bytes / (baseline * sum(sizes)), 3),
                "bytes_per_step": whole.bytes,
                "product_tflop": round(whole.flops / 1e12, 3),
                "device_reads": whole.device_reads,
                "first_kernels_per_matrix": round(len(first.kernels) / len(sizes), 2),
                "first_decompositions": first.decompositions,
                "predicted_ms": {
                    gpu.name: round(1e3 * whole.seconds(gpu.bandwidth, gpu.rates[dtype], LAUNCH), 3) for gpu in GPUS
                },
            }
        )
    if not rows:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return rows, refused


def of_language_models() -> list[str]:
    """Return the names of all methods that train the matrices of a language model, or layers made of them."""
    dense = optim.names(of_matrices=True)
    return [name for name in methods.names() if name in dense or methods.find(name).layers is not Dense]


def measure(arguments: Sequence[str]) -> str:
    """Count what ``arguments`` ask for, and write step_cost.json, .csv, .md and .png into ``--out``.

    Returns:
        The table, as text.

    Raises:
        UserError: settings that do not fit together.
    """
    given = _parser().parse_args(arguments)
    for key in ("rank", "layers"):
        if getattr(given, key) is not None:
            positive(f"--{key}", getattr(given, key))
    names = given.methods or of_language_models()
    rows, refused = step_costs(
        given.model,
        rank=given.rank,
        layers=given.layers,
        dtype=given.dtype,
        state_dtype=given.state_dtype,
        names=names,
    )
    settings = {key: getattr(given, key) for key in ("model", "rank", "layers", "dtype", "state_dtype")}
    figures = {
        "what": "kernels, bytes and products of one optimizer step, counted; times are predicted, not measured",
        "provenance": provenance(torch.device("cpu")),
        **settings,
        "gpus": {gpu.name: {"bandwidth": gpu.bandwidth, "rate": gpu.rates[given.dtype]} for gpu in GPUS},
        "launch_seconds": LAUNCH,
        "rows": rows,
        "refused": refused,
    }
    folder = output_folder(given.out)
    write_text(folder / "step_cost.csv", _csv(rows))
    publish(folder, "step_cost", figures, report(figures))
    left_out = [f"not counted: {name}, because {reason}" for name, reason in refused.items()]
    head = [*_HEAD, *(f"{gpu.name} ms (predicted)" for gpu in GPUS)]
    return "\n\n".join([aligned([head, *map(_cells, rows)]), *left_out, _FORMULA])


def _two_steps(
    name: str, shapes: Any, rank: int, dtype: str, state_dtype: str | None, *, matrices_only: bool
) -> tuple[StepCount, StepCount]:
    """Count a method's first step, which chooses directions where it has some, and the second, which does not.

    The intervals are the methods' own: a method that chooses at every step does so in both.
    """
    method = methods.find(name)
    offered = {"rank": rank, "state_dtype": state_dtype, "score": "uniform"}  # the score that reads no weights
    settings = {key: value for key, value in offered.items() if key in method.arguments()}
    if name in optim.names(of_matrices=True):
        settings = {**{key: value for key, value in settings.items() if key != "rank"}, **rank_argument(name, rank)}
    model = skeleton(shapes, _DTYPES[dtype])
    method.parametrization(settings).convert(model)
    groups = [g for g in optim.param_groups(model) if not (matrices_only and g["role"] in methods.OTHER_ROLES)]
    optimizer = optim.create(method.optimizer, groups, **method.optimizer_arguments(settings))
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty_like(param) if param.requires_grad else None
    return count(optimizer), count(optimizer)


_HEAD = ("method", "kernels a step", "a matrix", "bytes / fused AdamW", "products TFLOP", "kernels a matrix at first")


def _cells(row: Mapping[str, Any]) -> list[str]:
    first = f"{row['first_kernels_per_matrix']:.2f}" + " + QR or SVD" * bool(row["first_decompositions"])
    return [
        row["method"],
        str(row["kernels_per_step"]),
        f"{row['kernels_per_matrix']:.2f}",
        f"{row['bytes_over_fused_adamw']:.2f}",
        f"{row['product_tflop']:.2f}",
        first,
        *(f"{milliseconds:.1f}" for milliseconds in row["predicted_ms"].values()),
    ]


def report(figures: Mapping[str, Any]) -> Report:
    """Return table, notes and plot of the figures of ``step_cost.json``."""
    state = f", state in {figures['state_dtype']}" if figures["state_dtype"] else ""
    points = {row["method"]: ([row["kernels_per_matrix"]], [row["bytes_over_fused_adamw"]]) for row in figures["rows"]}
    return Report(
        "The cost of one optimizer step, counted",
        markdown([*_HEAD, *(f"{name}, ms, *predicted*" for name in figures["gpus"])], map(_cells, figures["rows"])),
        [
            f"{figures['model']}, {figures['rows'][0]['matrices']} matrices, rank {figures['rank']}, weights in "
            f"{figures['dtype']}{state}. Kernels of a step are those of the whole model; bytes are those of its "
            "matrices, over what torch's fused AdamW moves for them. A step lies between two choices of directions; "
            "the first step also makes one.",
            *(f"Not counted: `{name}`, because {reason}." for name, reason in figures["refused"].items()),
            _FORMULA,
            origin(figures["provenance"]),
        ],
        [Panel("", "kernels a matrix", "bytes / those of torch's fused AdamW", points, log_x=True, log_y=True)],
    )


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = [
        {
            **{key: value for key, value in row.items() if key != "predicted_ms"},
            **{f"predicted_ms {gpu}": value for gpu, value in row["predicted_ms"].items()},
        }
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py step-cost",
        description="Count kernels and bytes of every optimizer's step, and predict its time on GPUs.",
    )
    parser.add_argument("--model", default="llama_1b", help="a size, or a folder with a config.json; default: llama_1b")
    parser.add_argument("--layers", type=int, help="of the model, only so many; default: all")
    parser.add_argument("--rank", type=int, default=512, help="of the methods that have one; default: 512")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights; default: float32")
    parser.add_argument("--state-dtype", help="of moments: 8bit, 4bit, bfloat16; default: as the weights")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--out", default="runs/step-cost", help="folder of step_cost.json, .csv, .md and .png")
    return parser
