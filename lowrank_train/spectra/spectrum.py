"""Singular values of a model's matrices, what they say in one number each, and intruder dimensions.

W (out x in) = sum_i sigma_i u_i v_i^T, sigma_1 >= ... >= sigma_k >= 0, k = min(out, in):

    stable rank      ||W||_F^2 / sigma_1^2                       Rudelson and Vershynin (J. ACM 54, 2007)
    effective rank   exp(-sum p_i ln p_i), p_i = sigma_i / sum   Roy and Vetterli (EUSIPCO 2007)
    count at share   smallest j with sigma_1 + ... + sigma_j >= share (sigma_1 + ... + sigma_k)

Intruder dimensions, Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228),
in its usual form: y_j among the first ``top_k`` left singular vectors of the matrix after training is one if
max_i |cos(y_j, x_i)| < epsilon over all k left singular vectors x_i of the matrix before. The sign of a singular vector
is arbitrary, hence the absolute value; top_k = 10 and epsilon = 0.5 are the customary values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.common.progress import show_progress
from lowrank_train.layers.choice import linear_layers
from lowrank_train.optim.linalg import decompose, singular_values

__all__ = [
    "Summary",
    "best_cosines",
    "count_at_share",
    "decompositions",
    "factors_of_weight",
    "spectra",
    "spectrum_of",
    "summarize",
]


@dataclass(frozen=True)
class Summary:
    """One matrix in a few numbers; all ranks are 0 for a matrix of zeros."""

    matrix: str
    """Name of its module."""
    rows: int
    columns: int
    sigma_1: float
    stable_rank: float
    effective_rank: float
    count_90: int
    """Singular values that hold 90 % of their sum."""


def factors_of_weight(name: str, weight: Tensor) -> dict[str, Tensor]:
    """``decompose``, with the name in its errors: ``u`` (k, out), ``sigma`` (k,) falling, ``v`` (k, in), float64.

    Raises:
        ValueError: entries that are not finite, or no convergence.
    """
    try:
        return decompose(weight.detach())
    except (ValueError, LinAlgError) as error:
        raise ValueError(f"{name!r} has no singular values: {str(error).splitlines()[0]}") from None


def decompositions(model: nn.Module, layers: str | None = None) -> Iterator[tuple[str, nn.Linear, dict[str, Tensor]]]:
    """Name, layer and factors of every matching matrix, one at a time, so that one matrix's factors exist at once.

    Raises:
        ValueError: as ``linear_layers`` and ``factors_of_weight``.
    """
    for name, linear in show_progress(linear_layers(model, layers).items(), "singular values", "matrices"):
        yield name, linear, factors_of_weight(name, linear.weight)


def spectra(model: nn.Module, layers: str | None = None) -> dict[str, Tensor]:
    """Return the singular values (k,) of every matching matrix by the name of its module: falling, float64, on the
    CPU.

    Raises:
        ValueError: as ``linear_layers`` and ``factors_of_weight``.
    """
    return {name: factors["sigma"].cpu() for name, _, factors in decompositions(model, layers)}


def spectrum_of(name: str, weight: Tensor) -> Tensor:
    """Return the singular values of one matrix, as ``spectra`` does: faster without vectors, exact to 1e-8 of the
    largest.

    Raises:
        ValueError: as ``factors_of_weight``.
    """
    try:
        return singular_values(weight.detach()).cpu()
    except (ValueError, LinAlgError) as error:
        raise ValueError(f"{name!r} has no singular values: {str(error).splitlines()[0]}") from None


def count_at_share(sigma: Tensor, share: float) -> int:
    """Return the fewest leading singular values that hold ``share`` (0 to 1) of their sum.

    0 for a matrix of zeros; at 1 what cannot be told from zero when added to the others is left out.
    """
    total = sigma.double().cumsum(0)
    if total[-1] == 0:
        return 0
    reached = torch.searchsorted(total, share * total[-1])
    return min(int(reached), len(sigma) - 1) + 1


def summarize(name: str, shape: tuple[int, int], sigma: Tensor) -> Summary:
    """Return the figures of one matrix.

    Args:
        name: of the matrix.
        shape: (out, in).
        sigma: (k,), its singular values, falling.
    """
    sigma = sigma.double()
    largest = float(sigma[0])
    stable = effective = 0.0
    if largest > 0:
        stable = float((sigma / largest).square().sum())
        effective = float(torch.special.entr(sigma / sigma.sum()).sum().exp())
    return Summary(name, *shape, largest, stable, effective, count_at_share(sigma, 0.9))


def best_cosines(after: Tensor, before: Tensor, top_k: int = 10) -> Tensor:
    """Return the largest |cosine| of each leading left singular vector with all vectors before; low ones are
    intruders.

    Args:
        after: (k, out), unit rows, the most important first.
        before: (k, out), unit rows.
        top_k: how many of ``after`` are looked at.

    Returns:
        (min(top_k, k),), 0 to 1.
    """
    return (after[:top_k] @ before.mT).abs().amax(1).clamp(max=1.0)
