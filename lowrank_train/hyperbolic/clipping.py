"""Clipping of gradients, each parameter's on its own, as HyboNet's code does."""

from __future__ import annotations

import torch

__all__ = ["clip_each"]


def clip_each(parameters: list[torch.nn.Parameter], clip: float | None) -> float:
    """Shorten each gradient that is longer than ``clip``; the norm of all of them together, before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if clip is not None:
        factors = (clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return float(torch.linalg.vector_norm(norms))
