"""What the compress command leaves beside the model: the table, the ranks as CSV and JSON, and their plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_train.common.record import perplexity
from lowrank_train.common.units import show_bytes
from lowrank_train.compress.ranks import PlannedMatrix, rank_reduction
from lowrank_train.optim.costs.table import aligned
from lowrank_train.reports import drawing, write_csv, write_json

__all__ = ["Compression", "write_report"]

_RUINED = 2.0
"""Times the perplexity before: beyond it the model is of little use before fine-tuning."""


_MISSED = 0.05
"""The share of ranks beyond the target that is worth a message."""


@dataclass(frozen=True)
class Compression:
    """One model, before and after."""

    source: str
    plan: list[PlannedMatrix]
    sigma: dict[str, Tensor]
    bytes_before: int
    """Bytes of all parameters."""
    bytes_after: int
    loss_before: float | None
    """Nats per token; None: not measured."""
    loss_after: float | None


def write_report(result: Compression, settings: Mapping[str, Any], made: Mapping[str, Any], folder: Path) -> str:
    """Write compress.json, compress.csv and ranks.png into a folder; returns the table as text.

    Args:
        result: what was done.
        settings: all keys of the command.
        made: command, commit, versions and hardware.
        folder: exists.
    """
    rows = [_row(matrix) for matrix in result.plan]
    write_csv(folder / "compress.csv", rows)
    figures = {
        "what": "ranks of the matrices of a compressed model",
        "source": result.source,
        "settings": dict(settings),
        "provenance": dict(made),
        "rank_reduction": rank_reduction(result.plan),
        "parameter_bytes_before": result.bytes_before,
        "parameter_bytes_after": result.bytes_after,
        "perplexity_before": _finite(result.loss_before),
        "perplexity_after": _finite(result.loss_after),
        "matrices": rows,
    }
    write_json(folder / "compress.json", figures)
    _plot(result.plan, folder / "ranks.png")
    notes = _notes(result, settings.get("rank_reduction"))
    return "\n\n".join([_table(result.plan), *notes, f"model, plot, CSV and JSON: {folder}"])


def _row(matrix: PlannedMatrix) -> dict[str, Any]:
    return {
        **asdict(matrix),
        "full_rank": matrix.full_rank,
        "is_factored": matrix.is_factored,
        "bytes_before": matrix.bytes_before,
        "bytes_after": matrix.bytes_after,
    }


def _table(plan: Sequence[PlannedMatrix]) -> str:
    head = ["matrix", "shape", "rank", "of", "", "before", "after"]
    rows = [
        [
            matrix.name,
            f"{matrix.rows} x {matrix.columns}",
            str(matrix.rank),
            str(matrix.full_rank),
            _kind(matrix),
            show_bytes(matrix.bytes_before),
            show_bytes(matrix.bytes_after),
        ]
        for matrix in plan
    ]
    return aligned([head, *rows])


def _kind(matrix: PlannedMatrix) -> str:
    if matrix.is_factored:
        return "LRC"
    return "truncated, dense" if matrix.is_low_rank else "N-LRC"


def _notes(result: Compression, target: float | None) -> list[str]:
    plan = result.plan
    factored = sum(matrix.is_factored for matrix in plan)
    dense = [matrix.name for matrix in plan if not matrix.is_factored]
    lines = [
        f"rank reduction {100 * rank_reduction(plan):.2f} %; {factored} of {len(plan)} matrices are factors; "
        f"parameters {show_bytes(result.bytes_before)} -> {show_bytes(result.bytes_after)} "
        f"({100 * result.bytes_after / result.bytes_before:.1f} %)"
    ]
    if target is not None and rank_reduction(plan) - target > _MISSED:
        lines.append(
            f"{100 * target:g} % was asked for: matrices of equal scores (all square ones, if the method is uniform) "
            "become whole together; method=welore, or classification=all, comes nearer"
        )
    if dense:
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        lines.append(f"left dense, because factors would not be smaller: {', '.join(dense[:3])}{more}")
    if result.loss_before is not None and result.loss_after is not None:
        before, after = perplexity(result.loss_before), perplexity(result.loss_after)
        lines.append(f"perplexity {before:.4g} -> {after:.4g}")
        if not after <= _RUINED * before:
            lines.append(
                "this model is of little use before it is fine-tuned (launch/finetune.py train=low_rank); whiten=true "
                "loses less, and so does a smaller reduction"
            )
    return lines


def _plot(plan: Sequence[PlannedMatrix], path: Path) -> None:
    """Kept share of the rank by decoder layer, a line for each type of matrix."""
    kinds: dict[str, list[PlannedMatrix]] = {}
    for matrix in plan:
        kinds.setdefault(matrix.name.rpartition(".")[2], []).append(matrix)
    with drawing(path, (8, 4.5)) as axes:
        for kind, members in kinds.items():
            shares = [matrix.rank / matrix.full_rank for matrix in members]
            axes.plot(range(len(members)), shares, marker="o", markersize=4, label=kind)
        axes.set(xlabel="layer", ylabel="rank kept, share of the whole", ylim=(0, 1.05))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")


def _finite(loss: float | None) -> float | None:
    """Perplexity; JSON knows neither infinity nor NaN."""
    return None if loss is None or not math.isfinite(perplexity(loss)) else perplexity(loss)
