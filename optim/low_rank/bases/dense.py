"""Moments carried between two arbitrary sets of directions.

    R = Q_old^T Q_new                                                      (r, r')
    M_hat' = M_hat R
    V_hat' = | (V_hat - M_hat^2) (R * R) + (M_hat R)^2 |

hat: divided by the bias correction 1 - beta^age of its column; a column of age 0 has no mean yet and adds nothing.
Afterwards all columns have the largest age there was: M_hat' mixes all of them, and its bias correction is undone once.

The estimator takes the coordinates' variances, V_hat - M_hat^2, as uncorrelated, and adds the square of the new mean.

Source: Robert et al., LDAdam (arXiv 2410.16103), projection-aware update of the second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_train.optim.low_rank.bases.base import Moments
from lowrank_train.optim.shards.workspace import MatrixShape

__all__ = ["rotate", "rotate_bytes"]


def rotate(
    moments: Moments,  # exp_avg, exp_avg_sq (m, r), age (r,)
    overlap: Tensor,  # R (r, r')
    betas: tuple[float, float],
) -> Moments:
    """Return moments (m, r') after the change of basis whose overlap R is given."""
    exp_avg, exp_avg_sq, age = moments
    bias_correction1 = (1 - betas[0] ** age.double()).to(exp_avg.dtype)
    bias_correction2 = (1 - betas[1] ** age.double()).to(exp_avg.dtype)
    mean, square = (
        torch.where(age > 0, value / correction, 0)
        for value, correction in ((exp_avg, bias_correction1), (exp_avg_sq, bias_correction2))
    )
    new_mean = mean @ overlap
    new_square = ((square - mean.square()) @ overlap.square()).add_(new_mean.square()).abs_()
    # both grow with age
    return Moments(
        new_mean * bias_correction1.max(), new_square * bias_correction2.max(), age.max().repeat(overlap.shape[1])
    )


def rotate_bytes(shape: MatrixShape, r: int) -> int:
    """Return the temporaries of ``rotate``: mean and square, corrected and rotated, a variance and a square."""
    return 6 * shape.itemsize * shape.rows * r
