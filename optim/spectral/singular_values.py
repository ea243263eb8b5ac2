"""Singular values of weights and of gradients, sharded or not, each found by one rank and told to the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.optim.core.optimizer import Slot
from lowrank_train.optim.low_rank.bases import find_basis
from lowrank_train.optim.shards.collectives import decide_on_one_rank
from lowrank_train.optim.shards.layout import matrix_shape
from lowrank_train.optim.shards.tall import tall

__all__ = ["gram", "singular_spectra"]

_SPECTRA = find_basis("svd")


def gram(slot: Slot, rows: Tensor) -> Tensor:
    """G^T G of this rank's rows (m_local, d)."""
    gram = torch.zeros_like(slot.state["gradient_gram"])
    for block in rows.split(rows.shape[1]):
        wide = block.to(gram.dtype)
        gram.addmm_(wide.mT, wide)
    return gram


def singular_spectra(slots: Sequence[Slot], source: str) -> list[dict[str, Tensor]]:
    """Singular values (k,) of each matrix, by source, on the CPU; nan where they are not known."""
    keys = [key for key in ("weight", "gradient") if source in (key, "mixed")]

    def statistics(i: int) -> Tensor:
        param = slots[i].param
        if "weight" not in keys:
            return torch.zeros((), dtype=torch.float64, device=param.device)  # gradient_gram is whole on every rank
        return _SPECTRA.statistics(tall(param, param), {})

    def decide(i: int, total: Tensor) -> dict[str, Tensor]:
        state, k = slots[i].state, min(matrix_shape(slots[i].param.shape))
        unknown = total.new_full((k, k), torch.nan)
        grams = {"weight": total, "gradient": state.get("gradient_gram", unknown).double()}
        return {key: _singular_values(grams[key]) for key in keys}

    like = [
        {key: torch.empty(min(matrix_shape(slot.param.shape)), dtype=torch.float64, device="meta") for key in keys}
        for slot in slots
    ]
    decisions = decide_on_one_rank([slot.param for slot in slots], statistics, decide, like)
    return [{key: value.cpu() for key, value in decision.items()} for _, decision in decisions]


def _singular_values(gram: Tensor) -> Tensor:
    """Of a matrix from its G^T G, falling; nan if they cannot be found."""
    if gram.isfinite().all():
        try:
            return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
        except LinAlgError:
            pass
    return gram.new_full((len(gram),), torch.nan)
