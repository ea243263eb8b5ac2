"""What becomes of the part of a gradient that lies outside the chosen directions.

With A the gradient (error feedback included), g = project(A), u Adam's direction for g, and D = A - lift(g):

    drop              W -= lr s lift(u)
    error feedback    A = G + E;  E <- D;  W -= lr s lift(u)                        E whole, or in 8 bits, per row
    LDAdam            as that, E <- D + b1 / (1 - b1) (lift_old(M_old) - lift(M))   what M lost by the change of basis
    sign              W -= lr (s lift(u) + t sign(D))                               FRUGAL
    normalized        W -= lr (s lift(u) + t sqrt((d - r) / d) D_i / rms(D_i))      row by row, as SCALE on the rest
    Fira              W -= lr (s lift(u) + limit(phi D)),  phi_i = |u_i| / |g_i|    row by row
    APOLLO            W -= lr s limit(phi A)                                        phi per row, or one for the matrix

    limit(S): if |S|_F exceeds 1.01 times its value at the last step, S is scaled down to that.

s = ``scale``, t = ``residual_scale``. Rows are those of the tall matrix (m, d), split over ranks; what needs a sum over
all of them (|S|_F) asks for it by ``sums``, a few numbers per matrix that the optimizer adds up for all at once.

Sources: Fira, Chen et al. (arXiv 2410.01623); FRUGAL, Zmushko et al. (arXiv 2411.07837); APOLLO, Zhu et al.
(arXiv 2412.05270); LDAdam, Robert et al. (arXiv 2410.16103); error feedback as in DCT-AdamW (arXiv 2505.17967).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.low_rank.bases import Directions
from lowrank_train.optim.shards.blocks import add_rows_, contiguous_rows
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.shards.workspace import MatrixShape
from lowrank_train.optim.storage.quantization import decode_rows, encode_rows

__all__ = ["RESIDUALS", "Block", "Previous", "Rates", "Residual", "ResidualWorkspace", "find_residual"]

_NORM_GROWTH = 1.01  # gamma of Fira's limiter, kept by APOLLO
_EPS = 1e-8  # beside |g_i| in both released codes
_ROUNDING = 64
"""A row with |D_i|^2 <= 64 eps |A_i|^2 lies inside the directions: what is left of it is rounding, and counts as 0. Of
that sign() would make whole steps, and the limiter a norm that the next true one must not exceed."""


class Rates(NamedTuple):
    """Hyperparameters of one matrix."""

    lr: float | Tensor
    scale: float
    residual_scale: float
    beta1: float


class Previous(NamedTuple):
    """Before the directions changed at this step."""

    directions: Directions
    exp_avg: Tensor  # (b, r)


class Block(NamedTuple):
    """Some rows of one tall matrix."""

    gradient: Tensor  # (b, d) A, in the type of the arithmetic
    coordinates: Tensor  # (b, r) g
    update: Tensor  # (b, r) u
    directions: Directions
    carried: Tensor | None  # (b, r) M before this step's gradient, where ``Residual.tracks_momentum``
    previous: Previous | None  # of these rows, if the basis changed


class ResidualWorkspace(NamedTuple):
    """Bytes that a treatment needs for one matrix, beyond its state."""

    block: int = 0
    """Temporaries of a block of rows."""
    whole: int = 0
    """What the gradient becomes before a basis is chosen for it, where that is another tensor."""


class Residual(ABC):
    """One treatment."""

    needs_orthonormal = True
    """Whether it means anything only if lift(project(.)) is a projection."""
    whole_gradient = True
    """Whether it needs more of the gradient than its coordinates."""
    tracks_momentum = False
    """Whether it needs the first moment from before the directions changed."""
    sums = 0
    """How many numbers, summed over the rows of all ranks, it needs before it can add."""

    def state_tensors(self, m: int, d: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return what the residual keeps for one matrix."""
        return {}

    def recall(self, gradient: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return A from G (b, d) and the rows of the state that belong to them; may be G itself."""
        return gradient

    def partial_sums(self, block: Block, rates: Rates) -> Tensor:
        """Return the sums (sums,) of one block."""
        raise NotImplementedError

    def factor(self, sums: Tensor, state: Mapping[str, Tensor]) -> Tensor | None:
        """Return one factor for the matrix from the whole sums; may update its scalars in ``state``."""
        return None

    @abstractmethod
    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """Add the update to ``weight`` (b, d), of the arithmetic's type; tensors of the block may be overwritten."""

    @abstractmethod
    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return what this treatment needs for one matrix."""


class Drop(Residual):
    """It is lost."""

    needs_orthonormal = False
    whole_gradient = False

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr s lift(u)."""
        block.directions.add_lift_(weight, block.update.mul_(-rates.lr * rates.scale))

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return nothing."""
        return ResidualWorkspace()


class ErrorFeedback(Residual):
    """It is added to the next gradient."""

    def __init__(self, *, in_8bit: bool = False, momentum: bool = False) -> None:
        self.in_8bit = in_8bit
        self.tracks_momentum = momentum

    def state_tensors(self, m: int, d: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """``error_feedback``, tall; in 8 bits also ``error_feedback_scale``."""
        if not self.in_8bit:
            return {"error_feedback": StateTensor((m, d), dtype, "rows")}
        scale = StateTensor((m, 1), torch.promote_types(dtype, torch.float32), "rows")
        return {"error_feedback": StateTensor((m, d), torch.int8, "rows"), "error_feedback_scale": scale}

    def recall(self, gradient: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """G + E."""
        error = rows["error_feedback"]
        if self.in_8bit:
            error = decode_rows(error, rows["error_feedback_scale"], gradient.dtype)
        return gradient + error

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """E <- D; -lr s lift(u)."""
        lost, error = block.coordinates, block.gradient  # A is recall's own tensor
        if block.previous is not None:
            assert block.carried is not None
            share = rates.beta1 / (1 - rates.beta1)
            lost = torch.add(lost, block.carried, alpha=share)
            block.previous.directions.add_lift_(error, block.previous.exp_avg * share)
        block.directions.add_lift_(error, -lost)
        if not self.in_8bit:
            if rows["error_feedback"].dtype == torch.float16:  # of a long row of large gradients, above 65504
                error.clamp_(*(sign * torch.finfo(torch.float16).max for sign in (-1, 1)))
            rows["error_feedback"].copy_(error)
        else:
            codes, scale = encode_rows(error)
            rows["error_feedback"].copy_(codes)
            rows["error_feedback_scale"].copy_(scale)
        block.directions.add_lift_(weight, block.update.mul_(-rates.lr * rates.scale))

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return G + E of a block, and E decoded or encoded; to choose a basis, G + E whole."""
        return ResidualWorkspace(block=2 * shape.block, whole=shape.whole)


class Sign(Residual):
    """Only the signs of its elements are used."""

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr (s lift(u) + t sign(D))."""
        step, outside = _outside(block)
        step.sign_().mul_((outside > 0).to(step.dtype).mul_(-rates.lr * rates.residual_scale))
        block.directions.add_lift_(step, block.update.mul_(-rates.lr * rates.scale))
        add_rows_(weight, step)

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return D of a block, and one product with it."""
        return ResidualWorkspace(block=2 * shape.block)


class Normalized(Residual):
    """Every row is brought to one length: sqrt((d - r) / d) per element, the share of the directions it stands for."""

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr (s lift(u) + t sqrt((d - r) / d) D_i / rms(D_i))."""
        d, r = block.gradient.shape[1], block.coordinates.shape[1]
        squares = block.gradient.square().sum(1, keepdim=True)
        outside = squares - block.coordinates.square().sum(1, keepdim=True)
        norm = torch.where(outside > _floor(squares), outside, 0).sqrt_()
        factor = torch.where(norm > 0, (d - r) ** 0.5 / norm, 0).mul_(-rates.lr * rates.residual_scale)
        inside = block.update.mul_(-rates.lr * rates.scale).sub_(block.coordinates * factor)
        weight.addcmul_(block.gradient, factor)
        block.directions.add_lift_(weight, inside)

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return the squares of a block."""
        return ResidualWorkspace(block=shape.block)


class _Limited(Residual):
    """Abstract: a scaled step S whose length may not grow by more than 1 % from one step to the next."""

    sums = 1
    """|S|^2."""

    def state_tensors(self, m: int, d: int, dtype: torch.dtype) -> dict[str, StateTensor]:
        """Return ``limiter_norm``: |S|_F of the last step."""
        return {"limiter_norm": StateTensor((), torch.promote_types(dtype, torch.float32), "replicated")}

    def factor(self, sums: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the limiter's factor."""
        return _limit(sums[0].sqrt(), state["limiter_norm"])


class Fira(_Limited):
    """It is scaled, row by row, as Adam scaled the part inside."""

    def __init__(self, *, leak: bool = False) -> None:
        self.leak = leak  # D = A - s lift(g), as both released codes have it: (1 - s) of the inside stays in D

    def partial_sums(self, block: Block, rates: Rates) -> Tensor:
        """|S|^2 = sum of phi_i^2 (|A_i|^2 - (2 k - k^2) |g_i|^2): no need to form D."""
        kept = self._removed(rates)
        inside = block.coordinates.square().sum(1)
        whole = block.gradient.square().sum(1)
        outside = whole - inside * (2 * kept - kept**2)
        outside = torch.where(outside > _floor(whole), outside, 0)
        return (_row_scaling(block).squeeze(1).square_() * outside).sum().view(1)

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr (lift(s u - k c phi g) + c phi A)."""
        assert factor is not None
        phi = _row_scaling(block).mul_(factor)
        inside = block.update.mul_(rates.scale).sub_(block.coordinates * (phi * self._removed(rates)))
        weight.addcmul_(block.gradient, phi.mul_(-rates.lr))
        block.directions.add_lift_(weight, inside.mul_(-rates.lr))

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return the squares of a block, and the block read again for the second pass."""
        return ResidualWorkspace(block=2 * shape.block)

    def _removed(self, rates: Rates) -> float:
        return rates.scale if self.leak else 1.0


class ApolloRows(_Limited):
    """The whole gradient is scaled, row by row, as Adam scales its projection."""

    needs_orthonormal = False

    def partial_sums(self, block: Block, rates: Rates) -> Tensor:
        """|S|^2 = sum of phi_i^2 |A_i|^2."""
        return (_row_scaling(block).square_() * block.gradient.square().sum(1, keepdim=True)).sum().view(1)

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr s c phi A."""
        assert factor is not None
        weight.addcmul_(block.gradient, _row_scaling(block).mul_(factor * (-rates.lr * rates.scale)))

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return the squares of a block."""
        return ResidualWorkspace(block=shape.block)


class ApolloTensor(_Limited):
    """The whole gradient is scaled by one number, as Adam scales its projection."""

    needs_orthonormal = False
    sums = 3

    def partial_sums(self, block: Block, rates: Rates) -> Tensor:
        """|u|^2, |g|^2, |A|^2."""
        return torch.stack([t.square().sum() for t in (block.update, block.coordinates, block.gradient)])

    def factor(self, sums: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Scaling and limiter in one."""
        update, coordinates, gradient = sums.sqrt()
        scaling = update / (coordinates + _EPS)
        return scaling * _limit(scaling * gradient, state["limiter_norm"])

    def add_(
        self, weight: Tensor, block: Block, rates: Rates, rows: Mapping[str, Tensor], factor: Tensor | None
    ) -> None:
        """-lr s c A."""
        assert factor is not None
        weight.addcmul_(block.gradient, factor * (-rates.lr * rates.scale))

    def workspace(self, shape: MatrixShape) -> ResidualWorkspace:
        """Return the squares of a block."""
        return ResidualWorkspace(block=shape.block)


def _outside(block: Block) -> tuple[Tensor, Tensor]:
    """D, as a tensor of its own, and the length of its rows (b, 1)."""
    outside = contiguous_rows(block.gradient).clone()  # of a single row or column the former copies nothing
    whole = outside.norm(dim=1, keepdim=True)
    block.directions.add_lift_(outside, -block.coordinates)
    norm = outside.norm(dim=1, keepdim=True)
    return outside, torch.where(norm.square() > _floor(whole.square()), norm, 0)


def _floor(squares: Tensor) -> Tensor:
    return squares * (_ROUNDING * torch.finfo(squares.dtype).eps)


def _row_scaling(block: Block) -> Tensor:
    """phi (b, 1)."""
    return block.update.norm(dim=1, keepdim=True) / (block.coordinates.norm(dim=1, keepdim=True) + _EPS)


def _limit(norm: Tensor, last: Tensor) -> Tensor:
    """Factor that keeps a norm from growing by more than 1 %; ``last`` becomes the norm after it. No host sync."""
    bound = last.to(norm.dtype) * _NORM_GROWTH
    limited = torch.where((last > 0) & (norm > bound), bound, norm)
    last.copy_(limited)
    return torch.where(norm > 0, limited / norm, 1)


RESIDUALS: dict[str, Residual] = {
    "apollo": ApolloRows(),
    "apollo_mini": ApolloTensor(),
    "drop": Drop(),
    "error_feedback": ErrorFeedback(),
    "error_feedback_8bit": ErrorFeedback(in_8bit=True),
    "fira": Fira(),
    "fira_released": Fira(leak=True),
    "ldadam": ErrorFeedback(momentum=True),
    "normalized": Normalized(),
    "sign": Sign(),
}


def find_residual(name: str) -> Residual:
    """Return the treatment of a name. Raises ValueError with the nearest names for an unknown one."""
    if name not in RESIDUALS:
        raise ValueError(f"residual={name!r}; {suggestion(str(name), RESIDUALS)}")
    return RESIDUALS[name]
