"""Newton-Schulz orthogonalization, of whole matrices and of tall ones whose rows are split over ranks.

    X_0 = X / ||X||_F;   X_{k+1} = X_k (a I + b A_k + c A_k^2),  A_k = X_k^T X_k;   k = 0 .. 4

``newton_schulz`` does just that, in bfloat16 as its authors: for a whole matrix it is the fastest.

Every step multiplies on the right by a polynomial in A_0, so the iteration needs X only at its two ends:

    A_0 = X^T X / tr(X^T X)                          (d, d), symmetric; tr(X^T X) = ||X||_F^2
    p_k = a I + b A_k + c A_k^2;   A_{k+1} = p_k A_k p_k
    X_5 = X P,   P = p_0 p_1 p_2 p_3 p_4 / ||X||_F

    X (m, d), m >= d, m split over the ranks; X^T X is the sum of what the ranks have, and X P is local. This is
    ``orthogonalized``: right where d is small, for d^2 numbers are summed and d^3 work repeated on every rank.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(kellerjordan.github.io/posts/muon), iteration and coefficients; Dao et al., "Gram Newton-Schulz"
(dao-ailab.github.io), the recursion on A.

We differ:
  * A is summed and iterated in float32, without TF32 (float64 for a float64 X). Rounding makes eigenvalues of A that
    should be 0 negative, and five steps multiply them by up to a^10 = 2e5: harmless at 1e-7, fatal at bfloat16's 1e-2
    (measured: singular values up to 210 instead of 1). Half precision would need a second sum in the middle.
  * one sum, where Muon under tensor parallelism usually sums at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lowrank_train.optim.shards.collectives import sum_over_shards

__all__ = ["CHUNK_NUMBERS", "gram_polynomial", "newton_schulz", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024: steepest at 0 among the quintics that keep [0, 1] within about [0.7, 1.2]."""

_STEPS = 5
"""Jordan et al. 2024."""

_SMALLEST_NORM = 1e-7
"""The least norm of X, as in the code of Jordan et al. and ``torch.optim.Muon``; it makes 0 of 0."""

CHUNK_NUMBERS = 2**25
"""128 MiB of float32: far beyond the size at which an all-reduce is limited by bandwidth, and little workspace."""


def newton_schulz(X: Tensor) -> Tensor:
    """Orthogonalize X (m, d), m >= d; in bfloat16, but in float64 for a float64 X."""
    a, b, c = _COEFFICIENTS
    Y = X if X.dtype == torch.float64 else X.bfloat16()
    Y = Y / Y.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_STEPS):
        A = Y.mT @ Y
        Y = torch.addmm(Y, Y, torch.addmm(A, A, A, beta=b, alpha=c), beta=a)
    return Y.to(X.dtype)


def gram_polynomial(gram: Tensor, steps: int = _STEPS, *, unit: float = 1.0) -> Tensor:
    """Return P such that X P is X orthogonalized, from X^T X (..., d, d), summed over all rows; 0 rows stay 0.

    ``unit``: X is in multiples of 1 / unit, so that the smallest norm is too.
    """
    a, b, c = _COEFFICIENTS
    inverse_norm = (
        gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=(_SMALLEST_NORM * unit) ** 2).rsqrt()[..., None, None]
    )
    A = (gram + gram.mT).mul_(0.5 * inverse_norm.square())
    P = inverse_norm
    for step in range(steps):
        p = (A @ A).mul_(c).add_(A, alpha=b)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        P = P * p if step == 0 else P @ p
        if step < steps - 1:
            A = p @ A @ p
    return P


def orthogonalized(params: Sequence[Tensor], blocks: Sequence[Tensor], *, unit: float = 1.0) -> list[Tensor]:
    """Return rows (m_local, d) of each orthogonalized matrix, from its tall rows; one all-reduce.

    Every rank must call this with the same parameters in the same order. ``unit``: what the rows were multiplied by.
    """
    results: list[Tensor] = list(blocks)
    with _without_tf32():
        grams = sum_over_shards(params, [block.mT @ block for block in blocks])
        sizes: dict[tuple[int, torch.dtype], list[int]] = {}
        for i, gram in enumerate(grams):
            sizes.setdefault((gram.shape[-1], gram.dtype), []).append(i)
        for members in sizes.values():
            polynomials = gram_polynomial(torch.stack([grams[i] for i in members]), unit=unit)
            for i, polynomial in zip(members, polynomials, strict=True):
                results[i] = blocks[i] @ polynomial
    return results


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Full float32 products inside, on GPUs and on CPUs with bfloat16 units; the user's choice comes back after."""
    with ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield
