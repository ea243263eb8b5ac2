"""Linear algebra that several methods share: Gram matrices, singular vectors, and the signs of both.

Eigenvectors and Q are unique up to signs only. Here the largest entry of a singular vector, and the diagonal of R, is
positive, so that a result does not depend on the solver.

The singular value decomposition goes by the Gram matrix of the smaller side in float64:

    A = W W^T = P L P^T;  B = W^T P;  sigma_i = |b_i|;  v_i = b_i / sigma_i

eigh of the Gram matrix is 40 times faster than an SVD of a wide matrix. v loses orthogonality as eps (sigma_1 /
sigma_i)^2, so where that matters B = Q R, and the SVD of the small R, which is nearly diagonal, turns Q and P.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

__all__ = [
    "SOLVER",
    "decompose",
    "decompose_bytes",
    "gram",
    "leading_eigenvectors",
    "orthonormal_columns",
    "signs",
    "singular_values",
]

SOLVER = 2
"""What a solver of torch.linalg uses inside, in multiples of its input: a guess, the only one of memory prediction."""

_WORST_RATIO = 1e-4
"""Smallest sigma_i / sigma_1 for which v_i = b_i / sigma_i are orthogonal to 1e-7: many such errors add up."""


def gram(rows: Tensor) -> Tensor:
    """Return G^T G (d, d) in float64 of rows (m, d), from blocks of d rows."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in rows.split(rows.shape[1]):
        wide = block.double()
        total.addmm_(wide.mT, wide)
    return total


def leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Return eigenvectors (count, d) by falling eigenvalue, each with its largest entry positive."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :count].mT
    return vectors * signs(vectors)


def signs(vectors: Tensor) -> Tensor:
    """Return (n, 1), to make the largest entry of each vector (n, d) positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def orthonormal_columns(x: Tensor) -> Tensor:
    """Return Q (..., m, n) of x = Q R, where the diagonal of R is positive: a direction keeps its sign."""
    q, upper = torch.linalg.qr(x)
    positive = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * positive.unsqueeze(-2)


def decompose(weight: Tensor) -> dict[str, Tensor]:
    """Return the singular value decomposition of a weight (out, in), in float64.

    It has ``u`` (k, out), ``sigma`` (k,) falling, and ``v`` (k, in). The largest entry of each u_i is positive.

    Raises ValueError for numbers that are not finite, or if neither this way nor LAPACK's own SVD on the CPU converges.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite")
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    try:
        vectors, sigma, other = _by_gram_matrix(wide)
    except LinAlgError:
        try:
            left, sigma, right = (part.to(weight.device) for part in torch.linalg.svd(wide.cpu(), full_matrices=False))
        except LinAlgError as error:
            raise ValueError(f"its singular value decomposition does not converge: {error}") from None
        vectors, other = left, right.mT
    order = sigma.argsort(descending=True, stable=True)
    narrow, long = vectors.mT[order], other.mT[order]
    u, v = (narrow, long) if weight.shape[0] <= weight.shape[1] else (long, narrow)
    sigma = sigma[order]
    of_u = signs(u)
    # Where sigma is 0, nothing ties the sign of v to that of u, and rounding must not choose it.
    nothing = (sigma <= 16 * torch.finfo(sigma.dtype).eps * sigma[0]).unsqueeze(1)
    return {"u": u * of_u, "sigma": sigma, "v": v * torch.where(nothing, signs(v), of_u)}


def decompose_bytes(out: int, width: int) -> int:
    """Return what ``decompose`` of a weight (out, in) needs on its owner, with the sums it is made of in float32.

    In float64: W; eigenvectors twice, the Gram matrix and the solver's own; images, sorted and signed pairs.
    """
    s, long = sorted((out, width))
    return 4 * 2 * s * long + 8 * (s * long + (4 + SOLVER) * s * s + 4 * s * long)


def singular_values(weight: Tensor) -> Tensor:
    """Return singular values (k,) float64, falling: roots of the Gram matrix's eigenvalues.

    They are exact to 1e-8 of the largest.

    Raises ValueError as ``decompose`` does.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite")
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    try:
        return torch.linalg.eigvalsh(wide @ wide.mT).clamp_(min=0).sqrt_().flip(0)
    except LinAlgError:
        return decompose(weight)["sigma"]


def _by_gram_matrix(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (s, s), sigma (s,) and V (l, s) of a matrix (s, l), s <= l, with a vector per column, in any order."""
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)
    image = wide.mT @ vectors
    sigma = torch.linalg.vector_norm(image, dim=0)
    if sigma.min() > _WORST_RATIO * sigma.max():
        return vectors, sigma, image / sigma
    orthonormal, upper = torch.linalg.qr(image)
    left, sigma, right = torch.linalg.svd(upper)
    return vectors @ right.mT, sigma, orthonormal @ left
