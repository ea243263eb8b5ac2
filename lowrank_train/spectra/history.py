"""How spectra change over a run: singular values of the matrices in each of its checkpoints."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.config import methods
from lowrank_train.config.saved import read_saved
from lowrank_train.config.schema import Config
from lowrank_train.files.checkpoint_folder import checkpoints_of
from lowrank_train.files.checksums import unverified
from lowrank_train.layers.plain import merged_state_dict
from lowrank_train.models.families import block_matrices
from lowrank_train.optim.costs.table import aligned
from lowrank_train.spectra.spectrum import Summary, spectrum_of, summarize
from lowrank_train.train.checkpoint import read_weights

__all__ = ["Snapshot", "history", "history_table"]


@dataclass(frozen=True)
class Snapshot:
    """The matrices at one step of a run."""

    step: int
    summaries: list[Summary]
    sigma: dict[str, Tensor]


def history(run: Path, layers: str | None) -> list[Snapshot]:
    """Return the spectra of every checkpoint of a run folder, oldest first.

    Args:
        run: its folder; spectral layers, adapters and low-rank factors are multiplied out.
        layers: regular expression on module names; None: matrices of the layers of any family.

    Raises:
        UserError: no run, no checkpoint, a damaged one, no matrix that matches, or weights that are not finite.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder; checkpoints=true needs one (with config.yaml and checkpoints/)")
    found = checkpoints_of(run / "checkpoints")
    if not found:
        raise UserError(f"{run}/checkpoints holds no checkpoint; keep some with checkpoint.every and checkpoint.keep")
    config, notes = read_saved(run / "config.yaml", Config)
    settings = config.optimizer
    for note in [*notes, *(note for path in found for note in unverified(path))]:
        print(note, file=sys.stderr)
    try:
        kind = methods.find(str(settings.get("name"))).parametrization(settings)
    except ValueError as error:
        raise UserError(f"in {run / 'config.yaml'}: {error}") from None
    layers = block_matrices() if layers is None else layers
    snapshots = []
    for path in show_progress(found, "singular values", "checkpoints"):
        weights = merged_state_dict(kind.plain_state_dict(read_weights(path)))
        names = [name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 2]
        chosen = [name for name in names if re.search(layers, name)]
        if not chosen:
            raise UserError(f"layers={layers!r} matches no matrix of {path}; it has {', '.join(names[:3])}")
        sigma = {name: _spectrum(name, weights[f"{name}.weight"], path) for name in chosen}
        summaries = [summarize(name, _shape(weights[f"{name}.weight"]), sigma[name]) for name in chosen]
        snapshots.append(Snapshot(int(path.name.removeprefix("step-")), summaries, sigma))
    return snapshots


def history_table(snapshots: Sequence[Snapshot]) -> str:
    """Return the mean effective rank by kind of matrix, as a share of the whole, in a row for every checkpoint."""
    kinds = list(dict.fromkeys(summary.matrix.rpartition(".")[2] for summary in snapshots[0].summaries))
    rows = []
    for snapshot in snapshots:
        cells = []
        for kind in kinds:
            mine = [s for s in snapshot.summaries if s.matrix.rpartition(".")[2] == kind]
            cells.append(f"{fmean(s.effective_rank / min(s.rows, s.columns) for s in mine):.3f}")
        rows.append([f"{snapshot.step:,}", *cells])
    return "effective rank, share of the whole\n\n" + aligned([["step", *kinds], *rows], left=())


def _spectrum(name: str, weight: Tensor, path: Path) -> Tensor:
    try:
        return spectrum_of(name, weight)
    except ValueError as error:
        raise UserError(f"in {path}: {error}") from None


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
