"""What a graph run was and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_train.hyperbolic.record import NetworkRecord

__all__ = ["GraphRecord"]


@dataclass(kw_only=True)
class GraphRecord(NetworkRecord):
    """One run. Scores from 0 to 1."""

    graph: str
    task: str
    protocol: str
    headline: str
    """The score that tables show."""
    test: dict[str, float]
    """Scores of the epoch that was best on validation."""
    validation: dict[str, float]
    """Scores of the same epoch."""
    epochs: int
    best_epoch: int
    manifold_error: float
    """Largest |<x, x> / k + 1| of the nodes' points at the best epoch; 0 in Euclidean space."""
    time_error: float | None = None
    """Largest error of x_0 of these points, relative to what it should be."""
    depth_correlation: float | None = None
    """Spearman's, of distance to the root's point and depth below the root."""
