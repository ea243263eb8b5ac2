"""WeLore: a rank for every matrix from the weights alone, and the model compressed to these ranks.

Source: Jaiswal et al., "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights" (arXiv 2407.11239).

    1. singular values of every matrix                                        ``lowrank_train.spectra.spectrum.spectra``
    2. one threshold for all of them that meets the target                    ``plan_ranks``
    3. matrices of low rank (LRC) become factors, the others (N-LRC) stay     ``compress``

``rank_reduction`` is 1 - sum of ranks after / sum of ranks before, counted with what is done (footnote 5): a matrix
that stays whole keeps its whole rank. ``parameter_bytes`` bounds the matrices' bytes instead.

Classification of a matrix (m x n, k = min(m, n)) of rank r:
    break_even   LRC if r (m + n) < m n: factors are smaller and faster. Others stay as they are.
    half         LRC if r < k / 2, the paper's rule; it never grows a matrix, but leaves wide ones that could shrink.
    all          every matrix is truncated to its rank (WeLore-COMP); where factors would be larger it stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_train.layers.choice import replace_module, replaceable_layers
from lowrank_train.layers.low_rank import LowRankLinear, low_rank_layer, truncated
from lowrank_train.optim.spectral.ranks import allocate_ranks, scores

__all__ = [
    "CLASSIFICATIONS",
    "PlannedMatrix",
    "compress",
    "plan_ranks",
    "planned",
    "rank_reduction",
]

CLASSIFICATIONS: dict[str, Callable[[int, int, int], bool]] = {
    "break_even": lambda r, m, n: r * (m + n) < m * n,
    "half": lambda r, m, n: 2 * r < min(m, n),
    "all": lambda r, m, n: r < min(m, n),
}
"""Name -> whether a matrix (m, n) of rank r is of low rank."""


@dataclass(frozen=True)
class PlannedMatrix:
    """What becomes of one matrix."""

    name: str
    rows: int
    columns: int
    rank: int
    """Kept; the smaller side for a matrix that is left as it is."""
    is_low_rank: bool
    """An LRC: truncated to its rank."""
    itemsize: int
    """Bytes of a number."""

    @property
    def full_rank(self) -> int:
        """The smaller side."""
        return min(self.rows, self.columns)

    @property
    def is_factored(self) -> bool:
        """Whether it is stored as two factors: of low rank, and smaller so."""
        return self.is_low_rank and self.rank * (self.rows + self.columns) < self.rows * self.columns

    @property
    def bytes_before(self) -> int:
        """Bytes of the matrix."""
        return self.rows * self.columns * self.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes of the factors, or of the matrix."""
        return self.rank * (self.rows + self.columns) * self.itemsize if self.is_factored else self.bytes_before


def plan_ranks(
    model: nn.Module,
    spectra: Mapping[str, Tensor],
    *,
    rank_reduction: float | None = None,
    parameter_bytes: int | None = None,
    score: str = "minmax",
    classification: str = "break_even",
    offsets: Mapping[str, float] | None = None,
    multiple: int = 1,
    floor: int = 1,
    ceiling: int | None = None,
) -> list[PlannedMatrix]:
    """Return the ranks of all matrices whose spectrum is given, by one threshold.

    Args:
        model: that has them.
        spectra: singular values by name of an ``nn.Linear``.
        rank_reduction: target, between 0 and 1; the least that reaches it.
        parameter_bytes: target instead: most bytes of these matrices together.
        score: a name of ``optim.spectral.ranks.SCORES``; minmax is the paper's.
        classification: a name of ``CLASSIFICATIONS``.
        offsets: added to the scores of single matrices (OWL).
        multiple: ranks are multiples of it.
        floor: least rank.
        ceiling: largest rank of what becomes of low rank; where that is none any more, a matrix stays whole.

    Raises:
        ValueError: not exactly one target, or one out of reach; names that are not the model's; other values out of
            range.
    """
    if (rank_reduction is None) == (parameter_bytes is None):
        raise ValueError("give exactly one of rank_reduction and parameter_bytes")
    if rank_reduction is not None and not 0 < rank_reduction < 1:
        raise ValueError(
            f"rank_reduction={rank_reduction}; expected a share of the ranks to remove, above 0 and below 1"
        )
    if classification not in CLASSIFICATIONS:
        raise ValueError(f"classification={classification!r}; expected one of {', '.join(CLASSIFICATIONS)}")
    linears = {name: _linear(model, name, sigma) for name, sigma in spectra.items()}
    is_low_rank = CLASSIFICATIONS[classification]
    tables, values = [], []
    for name, linear in linears.items():
        m, n = linear.weight.shape
        k, itemsize = min(m, n), linear.weight.element_size()
        if rank_reduction is None:
            price = [
                min(r * (m + n), m * n) * itemsize if is_low_rank(r, m, n) else m * n * itemsize for r in range(k + 1)
            ]
        else:
            price = [r if is_low_rank(r, m, n) else k for r in range(k + 1)]
        tables.append(torch.tensor(price))
        bytes_of_ranks = torch.tensor([min(r * (m + n), m * n) * itemsize for r in range(k + 1)])
        values.append(scores(score, spectra[name], bytes_of_ranks) + (offsets or {}).get(name, 0.0))
    total = sum(len(sigma) for sigma in spectra.values())
    budget = int(total * (1 - rank_reduction) + 1e-9) if rank_reduction is not None else parameter_bytes
    assert budget is not None
    ranks = allocate_ranks(values, tables, budget, multiple=multiple, floor=floor, ceiling=ceiling)
    return [
        planned(name, linear.weight, rank, classification)
        for (name, linear), rank in zip(linears.items(), ranks, strict=True)
    ]


def planned(name: str, weight: Tensor, rank: int, classification: str) -> PlannedMatrix:
    """Return one matrix with the rank it is given; matrices that are not of low rank stay whole."""
    m, n = weight.shape
    low = CLASSIFICATIONS[classification](rank, m, n)
    return PlannedMatrix(name, m, n, rank if low else min(m, n), low, weight.element_size())


def rank_reduction(plan: Sequence[PlannedMatrix]) -> float:
    """Return 1 - sum of ranks after / before, as it was reached."""
    return 1 - sum(matrix.rank for matrix in plan) / sum(matrix.full_rank for matrix in plan)


@torch.no_grad()
def compress(
    model: nn.Module, plan: Sequence[PlannedMatrix], input_moments: Iterable[tuple[str, Tensor]] | None = None
) -> nn.Module:
    """Replace the matrices of low rank, in place; the ranks go into the model's configuration, if it has one.

    Args:
        model: unsharded.
        plan: as ``plan_ranks`` makes it.
        input_moments: name and C (in, in) of the matrices of low rank, see ``lowrank_train.layers.low_rank.factors``.

    Returns:
        The model itself.

    Raises:
        ValueError: no matrix is of low rank; the model is compressed already; the plan is of another model; weights
            that are tied or not finite.
    """
    chosen = {matrix.name: matrix for matrix in plan if matrix.is_low_rank}
    if not chosen:
        raise ValueError(
            "no matrix qualifies: none would get smaller at its rank; raise rank_reduction (or lower parameter_bytes), "
            "or give classification=all"
        )
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise ValueError("the model has low-rank layers already; compress the one it was made of, or merge it first")
    linears = {name: _linear(model, name) for name in chosen}
    replaceable_layers(model, "^(" + "|".join(map(re.escape, chosen)) + ")$")
    # the first layer replaced would change the inputs of the next
    made: dict[str, LowRankLinear] = {}
    weights: dict[str, Tensor] = {}
    for name, moment in ((name, None) for name in chosen) if input_moments is None else input_moments:
        try:
            if chosen[name].is_factored:
                made[name] = low_rank_layer(linears[name], chosen[name].rank, moment)
            else:
                weights[name] = truncated(linears[name].weight, chosen[name].rank, moment)
        except ValueError as error:
            raise ValueError(f"cannot factor {name!r}: {error}") from None
    for name, weight in weights.items():
        linears[name].weight.copy_(weight)
    for name, layer in made.items():
        replace_module(model, linears[name], layer)
    config = getattr(model, "config", None)
    if config is not None:
        config.low_rank = {"ranks": {name: chosen[name].rank for name in made}}
    return model


def _linear(model: nn.Module, name: str, sigma: Tensor | None = None) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"the model has no linear layer {name!r}: the plan is of another model")
    if sigma is not None and len(sigma) != min(module.weight.shape):
        raise ValueError(
            f"{len(sigma)} singular values for {name!r} of shape {tuple(module.weight.shape)}: they are of another "
            "model"
        )
    return module
