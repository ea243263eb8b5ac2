"""Another rank for a matrix in the middle of a training: its moments and directions, carried over.

    fewer            the leading directions stay, with their moments and ages
    more             all stay; Gaussian directions, orthonormal to them and to each other, enter with moments 0, age 0
    to dense         Q_old = Q, Q_new = 1 in ``optim.low_rank.bases.dense``; all columns take the largest age
    from dense       Q_old = 1, Q_new = the leading right singular vectors of M, likewise

Q (r, d) are the directions of ``optim.methods.welore_adamw``; dense is AdamW's state. New directions are made by one
rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.optim.core.optimizer import Slot
from lowrank_train.optim.low_rank.bases import Moments, find_basis
from lowrank_train.optim.low_rank.bases.dense import rotate
from lowrank_train.optim.shards.collectives import decide_on_one_rank, max_over_shards
from lowrank_train.optim.shards.layout import StateTensor, allocate, first_column, local, matrix_shape
from lowrank_train.optim.shards.tall import add_tall, tall
from lowrank_train.optim.spectral.welore_state import is_dense, rank_of, reallocate
from lowrank_train.optim.storage.quantization import read, replace, write

__all__ = ["change_ranks"]

_SPECTRA = find_basis("svd")


def change_ranks(changes: Sequence[tuple[Slot, int | None]], clock: int) -> None:
    """Give each matrix its new rank (None: dense) and what it has of moments and directions."""
    needing: list[tuple[Slot, int]] = []
    for slot, rank in changes:
        old = rank_of(slot.state)
        if rank is not None and slot.state["step"] and (old is None or rank > old):
            needing.append((slot, rank))
        elif not slot.state["step"]:  # there is nothing to keep
            reallocate(slot, rank, with_gram=False)
        elif rank is None:
            _to_dense(slot)
        else:
            _resize(slot, slot.state["basis"][:rank].clone())
    for i, decision in _new_directions(needing, clock):
        slot, rank = needing[i]
        basis = decision["basis"]
        if not basis.isfinite().all():
            reallocate(slot, rank, with_gram=False)
            slot.state["step"].zero_()  # it begins again with the next gradient
        elif is_dense(slot):
            _from_dense(slot, basis)
        else:
            _resize(slot, torch.cat([slot.state["basis"].to(basis.dtype), basis]))


def _new_directions(needing: Sequence[tuple[Slot, int]], clock: int) -> Iterable[tuple[int, dict[str, Tensor]]]:
    """Those that enter, where the rank grows; all of them, where there were none because the matrix was dense."""

    def statistics(i: int) -> Tensor:
        slot, _ = needing[i]
        if is_dense(slot):
            return _SPECTRA.statistics(_dense_moment(slot, "exp_avg"), {})
        return torch.zeros((), dtype=torch.float64, device=slot.param.device)

    def decide(i: int, total: Tensor) -> dict[str, Tensor]:
        slot, rank = needing[i]
        if not is_dense(slot):
            basis = slot.state["basis"].double()
            return {"basis": _orthonormal_to(basis, rank, seed=f"{slot.group['seed']}/{slot.name}/{clock}")}
        d = min(matrix_shape(slot.param.shape))
        if total.isfinite().all():
            try:
                return _SPECTRA.choose(total, d, rank, 0)
            except LinAlgError:
                pass
        return {"basis": total.new_full((rank, d), torch.nan)}

    like = []
    for slot, rank in needing:
        rows = rank - (rank_of(slot.state) or 0)
        like.append({"basis": torch.empty(rows, min(matrix_shape(slot.param.shape)), dtype=_wide(slot), device="meta")})
    return decide_on_one_rank([slot.param for slot, _ in needing], statistics, decide, like)


def _orthonormal_to(basis: Tensor, rank: int, *, seed: str) -> Tensor:
    """Rows (rank - r, d), orthonormal and to those of the basis (r, d); the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    r, d = basis.shape
    normal = torch.randn(rank - r, d, generator=generator, dtype=torch.float64).to(basis.device)
    q, upper = torch.linalg.qr(torch.cat([basis, normal]).mT)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).mT[r:].contiguous()


def _wide(slot: Slot) -> torch.dtype:
    return torch.promote_types(slot.param.dtype, torch.float32)


def _low_rank_moments(slot: Slot) -> Moments:
    age = slot.state["column_age"]
    exp_avg, exp_avg_sq = (
        read(slot.state, key, slice(None), age.numel(), _wide(slot)) for key in ("exp_avg", "exp_avg_sq")
    )
    return Moments(exp_avg, exp_avg_sq, age)


def _store_low_rank(slot: Slot, moments: Moments, basis: Tensor) -> None:
    """All that depends on the rank, anew."""
    reallocate(slot, len(basis), with_gram=False)
    replace(slot.state, "exp_avg", moments.exp_avg)
    replace(slot.state, "exp_avg_sq", moments.exp_avg_sq)
    slot.state["column_age"].copy_(moments.age)
    slot.state["basis"].copy_(basis)


def _resize(slot: Slot, basis: Tensor) -> None:
    """Between two ranks: the leading columns stay, those beyond are new."""
    rank = len(basis)

    def resized(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value[..., :rank], (0, max(0, rank - value.shape[-1])))

    _store_low_rank(slot, Moments(*map(resized, _low_rank_moments(slot))), basis)


def _to_dense(slot: Slot) -> None:
    moments = rotate(_low_rank_moments(slot), slot.state["basis"].to(_wide(slot)), slot.group["betas"])
    reallocate(slot, None, with_gram=False)
    state = slot.state
    state["age"].copy_(moments.age[0])
    for key, value in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
        whole = allocate(StateTensor(tuple(slot.param.shape), _wide(slot), "parameter"), slot.param)
        add_tall(whole, value)
        if f"{key}_scale" in state:
            offset = first_column(slot.param) or 0
            write(state, key, slice(None), local(whole), offset, lambda scale: max_over_shards(slot.param, scale))
        else:
            local(state[key]).copy_(local(whole))


def _from_dense(slot: Slot, basis: Tensor) -> None:
    exp_avg, exp_avg_sq = (_dense_moment(slot, key) for key in ("exp_avg", "exp_avg_sq"))
    age = slot.state["age"].to(torch.int32).repeat(basis.shape[1])
    _store_low_rank(slot, rotate(Moments(exp_avg, exp_avg_sq, age), basis.mT, slot.group["betas"]), basis)


def _dense_moment(slot: Slot, key: str) -> Tensor:
    """(m_local, d), in float32 or wider; a collective where ``tall`` is."""
    width = math.prod(local(slot.param).shape[1:])
    moment = read(slot.state, key, slice(None), width, _wide(slot), first_column(slot.param) or 0)
    return tall(slot.param, moment)
