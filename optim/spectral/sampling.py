"""Which singular triplets are trained next.

    multinomial   r without replacement from p_i = (1 / k + sigma_i / sum_j sigma_j) / 2      Eq. 16
    uniform       r without replacement, all alike
    sequential    one block of r after the other, until all had their turn
    top           the r largest

Source: Zhao et al., Sparse Spectral Training (arXiv 2405.15481), Eq. 16 and the ablation of its appendix E, in which
"top" is the only one clearly behind.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SAMPLERS", "draw_seed", "sample"]


def _multinomial(sigma: Tensor, r: int, iteration: int, generator: torch.Generator) -> Tensor:
    total = sigma.sum()
    share = sigma / total if 0 < total < torch.inf else torch.zeros_like(sigma)
    return torch.multinomial((1 / len(sigma) + share) / 2, r, generator=generator)


def _uniform(sigma: Tensor, r: int, iteration: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(sigma), generator=generator)[:r]


def _sequential(sigma: Tensor, r: int, iteration: int, generator: torch.Generator) -> Tensor:
    """Rows 0 .. r - 1 are active. Exchanged for each waiting block in turn, they wait in the place of the next."""
    blocks = -(-(len(sigma) - r) // r)
    if iteration == 0 or blocks == 0:
        return torch.arange(r)
    start = r + (iteration - 1) % blocks * r
    block = torch.arange(start, min(start + r, len(sigma)))
    return torch.cat([torch.arange(r - len(block)), block])


def _top(sigma: Tensor, r: int, iteration: int, generator: torch.Generator) -> Tensor:
    return sigma.argsort(descending=True, stable=True)[:r]


SAMPLERS: dict[str, Callable[[Tensor, int, int, torch.Generator], Tensor]] = {
    "multinomial": _multinomial,
    "uniform": _uniform,
    "sequential": _sequential,
    "top": _top,
}


def draw_seed(seed: int, layer: int, *, iteration: int) -> int:
    """Return the seed of the draw that begins an iteration of a layer; layers are numbered in the order of the
    parameters.
    """
    return zlib.crc32(f"{seed}/{layer}/{iteration}".encode())


def sample(rule: str, sigma: Tensor, r: int, *, iteration: int, seed: int) -> Tensor:
    """Choose the indices of the r triplets to train, sorted; they are equal wherever the arguments are.

    Args:
        rule: one of ``SAMPLERS``.
        sigma: (k,), singular values >= 0 on the CPU; the active triplets first.
        r: how many.
        iteration: since the last re-SVD, or since the start where there was none.
        seed: of this drawing.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in SAMPLERS:
        raise ValueError(f"sampling={rule!r}; expected one of {', '.join(SAMPLERS)}")
    generator = torch.Generator().manual_seed(seed)
    return SAMPLERS[rule](sigma.double(), r, iteration, generator).sort().values
