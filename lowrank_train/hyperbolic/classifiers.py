"""Scores of classes, from distances to their centres, in both spaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_train.hyperbolic.lorentz import check_curvature, lift

__all__ = ["EuclideanClassifier", "LorentzClassifier"]


class LorentzClassifier(nn.Module):
    """Score of a class: minus the squared distance to its centre, 2 k + 2 <x, c>, plus a bias.

    ``centres`` (classes, width) are points and stay on the manifold, see ``LorentzEmbedding``; ``bias`` (classes,)
    begins at zero, the centres at distance ``radius`` from the origin, anywhere.
    """

    def __init__(self, width: int, classes: int, *, curvature: float = 1.0, radius: float = 1.0) -> None:
        super().__init__()
        self.curvature = check_curvature(curvature)
        directions = nn.functional.normalize(torch.randn(classes, width - 1), dim=-1)
        self.centres = nn.Parameter(lift(radius * directions, self.curvature))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.parameter_manifolds = {"centres": ("lorentz", self.curvature)}

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, width) to (n, classes)."""
        flipped = torch.cat([-x[..., :1], x[..., 1:]], dim=-1)
        return 2 * self.curvature + 2 * flipped @ self.centres.mT + self.bias


class EuclideanClassifier(nn.Module):
    """The twin: minus the squared Euclidean distance to the centre of a class, plus a bias."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(nn.functional.normalize(torch.randn(classes, width), dim=-1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, width) to (n, classes)."""
        return self.bias - (x.unsqueeze(1) - self.centres).square().sum(-1)
