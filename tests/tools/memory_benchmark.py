"""Predicted, tracked and measured peaks of a training step, side by side, for settings from 60M to 7B.

    python tests/tools/memory_benchmark.py                        all settings, predicted and tracked
    python tests/tools/memory_benchmark.py --only llama_60m --device cpu    also measured, one setting

Predicted: closed formulas (``memory_terms``). Tracked: the step run on fake tensors (``memory_tracker``).
Measured: the step run, its allocations counted by CUDA, or by torch's profiler on a CPU (``memory_measured``).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lowrank_train.bench.report import output_folder
from lowrank_train.common.command import run_command
from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.record import provenance
from lowrank_train.common.small_files import write_text
from lowrank_train.common.units import show_bytes
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config
from lowrank_train.memory.measured import measure
from lowrank_train.memory.step import predict
from lowrank_train.plan import Plan
from tests.tools.memory_tracker import track

__all__ = ["SETTINGS", "measure_memory"]

_BF16 = "precision=bfloat16 seq_len=1024 model.checkpointing=full"
_LEAN = f"{_BF16} fused_backward=true clip=null"

SETTINGS: list[tuple[int, str]] = [
    (1, "llama_60m micro_batch=8 seq_len=512"),
    (1, f"llama_60m micro_batch=8 {_BF16} optimizer.name=galore_adamw optimizer.other_state_dtype=8bit"),
    (1, f"llama_130m micro_batch=8 {_BF16} optimizer.name=dct_adamw"),
    (1, "llama_350m micro_batch=4 precision=bfloat16 seq_len=1024 model.checkpointing=selective"),
    (1, f"llama_350m micro_batch=4 {_BF16} optimizer.name=apollo optimizer.state_dtype=8bit"),
    (1, f"llama_1b micro_batch=4 {_BF16} weights=bfloat16 optimizer.state_dtype=8bit"),
    (1, f"llama_1b micro_batch=4 {_LEAN} tokens_per_step=16384 optimizer.name=dct_adamw optimizer.rank=512"),
    (1, f"llama_3b micro_batch=2 {_BF16} weights=bfloat16 optimizer.state_dtype=4bit"),
    (1, f"llama_7b micro_batch=1 {_LEAN} weights=bfloat16 tokens_per_step=1024 optimizer.name=scale"),
    (1, f"llama_7b micro_batch=1 {_LEAN} weights=int8 tokens_per_step=1024 optimizer.name=scale"),
    (
        1,
        f"llama_7b micro_batch=1 {_LEAN} weights=int8 tokens_per_step=4096 optimizer.name=galore_adamw "
        "optimizer.rank=512 optimizer.state_dtype=8bit",
    ),
    (8, f"llama_7b micro_batch=1 {_BF16} optimizer.name=adamw"),
    (1, f"opt_125m micro_batch=8 {_BF16}"),
    (1, f"opt_350m micro_batch=4 {_BF16} optimizer.name=galore_adamw"),
    (1, f"opt_1.3b micro_batch=2 {_BF16} weights=bfloat16 optimizer.name=muon"),
    (8, f"opt_6.7b micro_batch=1 {_BF16} optimizer.name=dct_adamw"),
]
"""Ranks, and what is changed of a configuration."""


def measure_memory(arguments: Sequence[str]) -> str:
    """Compare the settings that ``arguments`` ask for; write memory.json and memory.md into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: unknown settings, an unwritable folder, no tracker in this torch.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="words that a setting must have, e.g. llama_7b int8")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="also measure there, settings of one rank")
    parser.add_argument("--largest", type=float, default=float("inf"), help="measure only up to this predicted GiB")
    parser.add_argument("--no-track", action="store_true", help="leave out the tracker, which takes minutes for 7B")
    parser.add_argument("--out", default="runs/memory", help="folder of memory.json and memory.md")
    given = parser.parse_args(arguments)
    chosen = [pair for pair in SETTINGS if all(word in pair[1] for word in given.only)]
    if not chosen:
        raise UserError(f"--only {' '.join(given.only)}: no setting has these words; leave it out for all")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu, or leave it out")
    folder = output_folder(given.out)
    rows = []
    for world_size, words in show_progress(chosen, "settings", "settings", active=True):
        config = load_config([f"model.name={word}" if i == 0 else word for i, word in enumerate(words.split())])
        rows.append(_row(config, world_size, words, given))
    device = torch.device(given.device or "cpu")
    figures = {"what": __doc__, "provenance": provenance(device), "measured_on": given.device, "settings": rows}
    write_text(folder / "memory.json", json.dumps(figures, indent=2) + "\n")
    table = _table(rows)
    write_text(folder / "memory.md", f"# Memory of a training step\n\n{table}\n")
    return table


def _row(config: Config, world_size: int, words: str, given: argparse.Namespace) -> dict[str, Any]:
    plan = Plan.of(config, world_size=world_size)
    memory = predict(plan)
    row: dict[str, Any] = {"ranks": world_size, "setting": words, "phase": memory.phase, "terms": memory.terms}
    row["predicted"] = {**memory.phases, "peak": memory.peak}
    if not given.no_track:
        tracked = track(plan, updates=_has_small_updates(config))
        row["tracked"] = {**tracked.phases, "peak": tracked.peak}
    if given.device is not None and world_size == 1 and memory.peak <= given.largest * 2**30:
        at_most = 2 * config.micro_batch * config.seq_len  # of more micro-batches the third is as the second
        on_device = replace(config, device=given.device, tokens_per_step=min(config.tokens_per_step, at_most))
        expected = predict(Plan.of(on_device))
        found = measure(on_device)
        row["predicted_on_device"] = {**expected.phases, "peak": expected.peak}
        row["measured"] = {**found.phases, "peak": found.peak}
        gc.collect()
    return row


def _has_small_updates(config: Config) -> bool:
    """Whether its updates are traced too: for large matrices that takes minutes, and the peak is in backward."""
    return config.model.name in ("llama_60m", "llama_130m", "opt_125m")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| setting | ranks | predicted peak | phase | tracked | difference | measured | difference |"]
    lines += ["| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = [row["setting"], str(row["ranks"]), show_bytes(row["predicted"]["peak"]), row["phase"]]
        for kind, against in (("tracked", "predicted"), ("measured", "predicted_on_device")):
            if kind not in row:
                cells += ["", ""]
                continue
            phases = [name for name in row[kind] if name != "peak"]
            own = max(row[against][name] for name in phases)  # of the phases that were looked at
            cells += [show_bytes(row[kind]["peak"]), f"{100 * (own / row[kind]['peak'] - 1):+.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(lambda: print(measure_memory(sys.argv[1:])), stopped="stopped; it starts from the beginning"))
