"""One matrix during one step of the low-rank engine: its state, and the parts chosen for it, brought together.

The order of the maths is that of ``optim.low_rank.engine``, which calls these methods for many matrices at once and
does what has to be summed or decided over the ranks between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lowrank_train.optim.core import adam as rules
from lowrank_train.optim.core.weight_update import WeightUpdate, decay_of
from lowrank_train.optim.low_rank.bases import Basis, Directions, Moments, find_basis
from lowrank_train.optim.low_rank.residuals import Block, Previous, Rates, Residual, find_residual
from lowrank_train.optim.parameters.slot import Slot, dense_gradient
from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.layout import local, matrix_shape
from lowrank_train.optim.shards.tall import tall
from lowrank_train.optim.storage.quantization import read, replace, write

__all__ = ["ZERO", "MatrixStep"]

ZERO = "zero"


class MatrixStep:
    """A slot with the parts it is made of."""

    def __init__(self, slot: Slot, coordinates: Tensor | None = None) -> None:
        self.slot = slot
        self.given = coordinates  # g, where it was summed over micro-batches and the gradient is gone
        self.state = slot.state
        self.group = slot.group
        self.basis: Basis = find_basis(slot.group["basis"])
        self.residual: Residual = find_residual(slot.group["residual"])
        self.steps = int(slot.state["step"])
        self.d, _ = sorted(matrix_shape(slot.param.shape))
        self.r = slot.state["column_age"].numel()
        self.is_due = self.steps % slot.group["refresh_interval"] == 0
        self.has_directions = self.steps > 0
        self.had_gradient = slot.grad is not None or coordinates is not None
        self.dtype = torch.promote_types(slot.param.dtype, torch.float32)
        self.like = torch.empty((), dtype=self.dtype, device=slot.param.device)
        self.previous: Previous | None = None
        self.waiting: list[tuple[slice, Block]] = []
        self._gradient: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ its tensors

    @property
    def gradient(self) -> Tensor:
        """G (m_local, d), zeros if there is none; turned over only once."""
        if self._gradient is None:
            param = self.slot.param
            self._gradient = tall(param, dense_gradient(self.slot) if self.had_gradient else torch.zeros_like(param))
        return self._gradient

    @property
    def basis_keys(self) -> list[str]:
        """What the basis stores."""
        return list(self.basis.state_tensors(self.d, self.r, self.dtype))

    def moment(self, key: str, rows: slice) -> Tensor:
        """Return rows (b, r), to be stored again."""
        return read(self.state, key, rows, self.r, self.dtype)

    def residual_rows(self, rows: slice) -> dict[str, Tensor]:
        """Return what the residual stores of these rows."""
        keys = self.residual.state_tensors(1, self.d, self.dtype)
        return {key: local(self.state[key])[rows] for key, spec in keys.items() if spec.layout == "rows"}

    def blocks(self) -> Iterator[slice]:
        """Return the blocks of this rank's rows."""
        yield from row_blocks(local(self.state["exp_avg"]).shape[0], self.d, self.like.device)

    def directions(self, state: Mapping[str, Tensor]) -> Directions:
        """Return the basis as stored in ``state``."""
        return self.basis.directions(state, self.d, self.r, self.like)

    # ------------------------------------------------------------------------------------------------- refreshing

    def starting_directions(self) -> Mapping[str, Tensor]:
        """Return the present basis, or what the first choice starts from."""
        if self.steps:
            return {key: self.state[key] for key in self.basis_keys}
        return self.basis.start(self.d, self.r, self.like, self.seed)

    @property
    def seed(self) -> int:
        """Another at every refresh."""
        return int(self.group["seed"]) + self.steps

    def target(self) -> Tensor:
        """Return what a basis is chosen for: (1 - rho) A + rho lift(M_hat), (m_local, d)."""
        if not self.had_gradient:
            # zeros, whatever is owed: what is not updated does not change its state
            return self.gradient.to(self.dtype)
        everything = slice(None)
        target = self.residual.recall(self.gradient.to(self.dtype), self.residual_rows(everything))
        rho = self.group["rho"]
        if not rho or not self.steps:
            return target
        age = self.state["column_age"].double()
        mean = self.moment("exp_avg", everything) / (1 - self.group["betas"][0] ** age).to(self.dtype)
        return self.directions(self.state).lift(mean).mul_(rho).add_(target, alpha=1 - rho)

    def change_directions(self, new: Mapping[str, Tensor]) -> None:
        """Store new directions, and the moments as they are in them."""
        old = {key: self.state[key].clone() for key in self.basis_keys}
        if self.steps:
            everything = slice(None)
            exp_avg, exp_avg_sq = (self.moment(key, everything) for key in ("exp_avg", "exp_avg_sq"))
            age = self.state["column_age"]
            if self.residual.tracks_momentum:
                self.previous = Previous(self.directions(old), exp_avg.clone())
            moments = self._carried(Moments(exp_avg, exp_avg_sq, age), old, new)
            if moments is not None:
                replace(self.state, "exp_avg", moments.exp_avg)
                replace(self.state, "exp_avg_sq", moments.exp_avg_sq)
                age.copy_(moments.age)
        for key, value in new.items():
            self.state[key].copy_(value)
        self.has_directions = True

    def _carried(self, moments: Moments, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Moments | None:
        if self.group["moments"] == "keep":
            return None
        if self.group["moments"] == "reset":
            return Moments(*map(torch.zeros_like, moments))
        return self.basis.carry(moments, old, new, self.d, self.group["betas"])

    def keep_directions(self, reason: str) -> None:
        """Count and tell that a refresh was skipped, unless nothing has been chosen yet for lack of any gradient."""
        if self.steps or reason != ZERO:
            self.state["skipped_refreshes"] += 1
            warnings.warn(
                f"the gradient of {self.slot.name!r} is {reason}: its directions were not chosen anew "
                f"({int(self.state['skipped_refreshes'])} times now)",
                stacklevel=2,
            )

    # --------------------------------------------------------------------------------------------------- updating

    @property
    def rates(self) -> Rates:
        """Hyperparameters of the residual."""
        group = self.group
        return Rates(group["lr"], group["scale"], group["residual_scale"], group["betas"][0])

    def advance(self) -> None:
        """Count one update."""
        self.state["step"] += 1
        if self.had_gradient:
            self.state["column_age"] += 1

    def project(self) -> Tensor:
        """Return the projection of the whole gradient, (m_local, r)."""
        directions = self.directions(self.state)
        gradient = self.gradient  # perhaps a collective: before the blocks, of which a rank may have none
        blocks = [directions.project(gradient[rows].to(self.dtype)) for rows in self.blocks()]
        return torch.cat(blocks) if blocks else self.like.new_zeros(0, self.r)

    def adam(self) -> Iterator[tuple[slice, Block]]:
        """Update moments and return projected updates, block by block."""
        state, group = self.state, self.group
        age = state["column_age"].double()
        bias_correction1 = (1 - group["betas"][0] ** age).to(self.dtype)
        bias_correction2_sqrt = (1 - group["betas"][1] ** age).sqrt().to(self.dtype)
        directions = self.directions(state)
        whole = self.gradient if self.given is None else None  # perhaps a collective: a rank may have no blocks
        for rows in self.blocks():
            if whole is not None:
                gradient = self.residual.recall(whole[rows].to(self.dtype), self.residual_rows(rows))
                coordinates = directions.project(gradient)
            else:
                assert self.given is not None
                gradient = coordinates = self.given[rows]  # of the gradient itself nothing is needed
            exp_avg, exp_avg_sq = self.moment("exp_avg", rows), self.moment("exp_avg_sq", rows)
            carried, previous = None, None
            if self.previous is not None:
                carried = exp_avg.clone()
                previous = Previous(self.previous.directions, self.previous.exp_avg[rows])
            update = rules.adam_direction(
                coordinates,
                exp_avg,
                exp_avg_sq,
                bias_correction1,
                bias_correction2_sqrt,
                betas=group["betas"],
                eps=group["eps"],
            )
            write(state, "exp_avg", rows, exp_avg)
            write(state, "exp_avg_sq", rows, exp_avg_sq)
            yield rows, Block(gradient, coordinates, update, directions, carried, previous)

    def single_pass(self) -> None:
        """Make the update, where the residual needs no sums."""
        if self.had_gradient:
            self._add(self.adam(), None)

    def _add(self, blocks: Iterable[tuple[slice, Block]], factor: Tensor | None) -> None:
        """Decay the weight and add what the residual makes of every block."""
        update = WeightUpdate(self.slot.param, self.dtype, decay_of(self.group))
        for rows, block in blocks:
            with update.rows(rows) as weight:
                self.residual.add_(weight, block, self.rates, self.residual_rows(rows), factor)
        update.finish()

    def first_pass(self) -> Tensor:
        """Run Adam, and return this rank's part of the residual's sums."""
        total = torch.zeros(self.residual.sums, dtype=self.dtype, device=self.like.device)
        if self.had_gradient:
            for rows, block in self.adam():
                total += self.residual.partial_sums(block, self.rates)
                self.waiting.append((rows, block._replace(gradient=total)))  # its gradient is cheaper to read again
        return total

    def second_pass(self, total: Tensor) -> None:
        """Make the update, from the whole sums."""
        if not self.had_gradient:
            return
        factor = self.residual.factor(total, self.state)
        gradient = self.gradient  # perhaps a collective: a rank may have no blocks
        self._add(((rows, b._replace(gradient=gradient[rows].to(self.dtype))) for rows, b in self.waiting), factor)
