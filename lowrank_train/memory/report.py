"""What fits, as a table, CSV, JSON and stacked bars."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank_train.common.errors import UserError
from lowrank_train.common.small_files import write_text
from lowrank_train.common.units import show_bytes
from lowrank_train.memory.budget import Fit, Outcome
from lowrank_train.reports import drawing, write_csv, write_json, writing

__all__ = ["check_budget", "table", "write_budget"]

_TERMS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_state": "state",
    "activations": "activations",
    "logits": "logits",
    "gathered": "gathered",
    "reductions": "reductions",
    "temporaries": "temporaries",
    "refresh": "refresh",
}
"""The terms of ``memory.phases.Phase``, as headings."""


def table(outcome: Outcome) -> str:
    """Return Markdown, a row per setting; terms in GiB, at the worst moment of the step.

    What does not fit is named below.
    """
    times = ["s/step"] if any(fit.time for fit in outcome.fits) else []
    head = ["optimizer", "rank", "model", "micro-batch", "peak", "headroom", *times, "phase", *_TERMS.values()]
    lines = [outcome.question, "", _line(head), _line(["---"] * len(head))]
    for fit in outcome.fits:
        terms = [f"{fit.memory.terms[term] / 2**30:.2f}" for term in _TERMS]
        left = show_bytes(fit.headroom) if fit.headroom >= 0 else f"-{show_bytes(-fit.headroom)}: does not fit"
        known = [fit.label, _rank(fit), fit.model, str(fit.micro_batch), show_bytes(fit.memory.peak), left]
        seconds = [f"{fit.time.seconds:.3g} ({fit.time.device})" if fit.time else ""] if times else []
        lines.append(_line([*known, *seconds, fit.memory.phase, *terms]))
    if assumed := sorted({fit.optimizer for fit in outcome.fits if fit.rank_is_assumed}):
        rank = next(fit.rank for fit in outcome.fits if fit.rank_is_assumed)
        lines += ["", f"rank {rank} was assumed for {', '.join(assumed)}, which need one: choose it with --rank"]
    if outcome.missing:
        lines += ["", "nothing fits for:", *(f"  {name}" for name in outcome.missing)]
    return "\n".join(lines)


def check_budget(outcome: Outcome) -> None:
    """Raise UserError if a setting of the answer needs more than the budget; says what needs how much too much."""
    for fit in outcome.fits:
        if fit.headroom < 0:
            rank = f" at rank {fit.rank}" if fit.rank is not None else ""
            raise UserError(
                f"{fit.model} with {fit.label}{rank} and micro_batch={fit.micro_batch} does not fit: it needs "
                f"{fit.memory.in_words()}, which is {show_bytes(-fit.headroom)} more than the budget of "
                f"{show_bytes(fit.budget)}; --largest batch, rank or model says what fits"
            )


def write_budget(outcome: Outcome, folder: Path) -> None:
    """Write budget.csv, budget.json, budget.md and budget.png. Raises UserError if they cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "budget.csv", [_row(fit) for fit in outcome.fits])
        full = [
            {**_row(fit), "phases": {k: asdict(getattr(fit.memory, k)) for k in fit.memory.phases}}
            for fit in outcome.fits
        ]
        document = {"question": outcome.question, "fits": full, "nothing_fits": outcome.missing}
        write_json(folder / "budget.json", document)
        write_text(folder / "budget.md", table(outcome) + "\n")
        _plot(outcome, folder / "budget.png")


def _row(fit: Fit) -> dict[str, Any]:
    known = {"optimizer": fit.optimizer, "state_dtype": fit.state_dtype, "rank": fit.rank, "model": fit.model}
    sizes = {"peak": fit.memory.peak, "budget": fit.budget, "headroom": fit.headroom, **fit.memory.terms}
    in_bytes = {f"{name}_bytes": value for name, value in sizes.items()}
    time = {"seconds_per_step": fit.time.seconds, "timed_on": fit.time.device} if fit.time else {}
    unknown = {"seconds_per_step": None, "timed_on": None}
    return {**known, "micro_batch": fit.micro_batch, "phase": fit.memory.phase, **in_bytes, **unknown, **time}


def _rank(fit: Fit) -> str:
    return "" if fit.rank is None else str(fit.rank)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot(outcome: Outcome, path: Path) -> None:
    labels = [f"{fit.label}, {fit.model} x {fit.micro_batch}" for fit in outcome.fits]
    places = range(len(labels))
    start = [0.0] * len(labels)
    with drawing(path, (10, 1.2 + 0.35 * len(outcome.fits)), grid=None) as axes:
        for term, heading in _TERMS.items():
            widths = [fit.memory.terms[term] / 2**30 for fit in outcome.fits]
            axes.barh(places, widths, left=start, label=heading)
            start = [begin + width for begin, width in zip(start, widths, strict=True)]
        axes.axvline(outcome.fits[0].budget / 2**30, color="black", linewidth=1)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel("GiB of one rank at the predicted peak; the line is the budget")
        axes.legend(ncols=5, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
