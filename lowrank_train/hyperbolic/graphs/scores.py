"""How well scores rank pairs, and classes are guessed: ROC AUC, average precision, F1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_precision", "micro_f1", "roc_auc"]


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Return share of (positive, negative) pairs that are ranked rightly; a tie counts half. Scores, (p,) and (n,)."""
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double(), right=False)
    up_to = torch.searchsorted(ordered, positive.double(), right=True)
    return float((below + up_to).double().mean() / (2 * len(negative)))


def average_precision(positive: Tensor, negative: Tensor) -> float:
    """Sum over thresholds of precision times the recall gained; equal scores are one threshold. (p,) and (n,)."""
    thresholds, gained = positive.double().unique(return_counts=True)  # ascending
    above_or_equal = len(negative) - torch.searchsorted(negative.double().sort().values, thresholds, right=False)
    hits = gained.flip(0).cumsum(0).flip(0)
    precision = hits.double() / (hits + above_or_equal)
    return float((gained * precision).sum() / len(positive))


def micro_f1(scores: Tensor, labels: Tensor) -> float:
    """Return F1 over all classes together, which is the share of right guesses; (n, classes) and (n,)."""
    return float((scores.argmax(1) == labels).double().mean())
