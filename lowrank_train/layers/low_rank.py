"""Linear layers stored as two factors, W = A B: the layer, conversion of a model, and the way back.

Source: Jaiswal et al., WeLore (arXiv 2407.11239): a matrix of low rank r is replaced by A (out, r) and B (r, in), from
its leading singular triplets: A = U_r sqrt(Sigma_r), B = sqrt(Sigma_r) V_r^T. With inputs of second moment
C = E[x x^T] = S S^T at hand, the factors come from the decomposition of W S instead, B = sqrt(Sigma_r) V_r^T S^-1,
which loses the least of the layer's outputs: Wang et al., SVD-LLM (arXiv 2403.07378), section 3.1.

We differ: biases are kept; the ranks are in the model's configuration, so that a folder can be read back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_train.layers.choice import replace_module, replaceable_layers
from lowrank_train.optim.linalg import decompose

__all__ = [
    "LowRankLinear",
    "factors",
    "low_rank_layer",
    "plain_state",
    "shape_low_rank",
    "to_low_rank",
    "train_low_rank_only",
    "truncated",
]

_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
"""The share of the mean eigenvalue of C that is added to its diagonal until C is positive definite."""


class LowRankLinear(nn.Module):
    """A linear map x -> A (B x) + bias.

    ``right`` holds B (rank, in), ``left`` A (out, rank) and the bias: two ``nn.Linear``, so that any optimizer or
    adapter treats them as the matrices they are.

    Args:
        in_features: columns of B.
        out_features: rows of A.
        rank: 1 to min(in, out).
        bias: whether there is one.
        device, dtype: as for ``nn.Linear``.

    Raises:
        ValueError: rank out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        k = min(in_features, out_features)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= k:
            raise ValueError(f"rank={rank!r}; expected a whole number from 1 to {k}, the smaller side of the weight")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.left(self.right(x))

    @property
    def weight(self) -> Tensor:
        """A B (out, in), made anew at every access; differentiable, for losses that read a head's weight."""
        return _product(self.left.weight, self.right.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), which ``left`` holds."""
        return self.left.bias

    def extra_repr(self) -> str:
        """Return the sizes that print shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factors(weight: Tensor, rank: int, input_moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return A (out, rank) and B (rank, in), float64, whose product is the nearest matrix of that rank to a weight
    (out, in).

    Args:
        weight: finite.
        rank: 1 to min(out, in).
        input_moment: C (in, in) = mean of x x^T; nearest in the layer's outputs then, instead of in W itself.

    Raises:
        ValueError: entries that are not finite, or no convergence.
    """
    try:
        if input_moment is None:
            parts = decompose(weight.detach())
            root = parts["sigma"][:rank].sqrt()
            return parts["u"][:rank].mT * root, parts["v"][:rank] * root.unsqueeze(1)
        triangle = _cholesky(input_moment.double())
        parts = decompose(weight.detach().double() @ triangle)
        root = parts["sigma"][:rank].sqrt()
        right = torch.linalg.solve_triangular(triangle, parts["v"][:rank], upper=False, left=False)
        return parts["u"][:rank].mT * root, right * root.unsqueeze(1)
    except LinAlgError as error:
        raise ValueError(f"no singular values: {str(error).splitlines()[0]}") from None


def truncated(weight: Tensor, rank: int, input_moment: Tensor | None = None) -> Tensor:
    """Return the product of ``factors``, (out, in), in the type of the weight."""
    left, right = factors(weight, rank, input_moment)
    return (left @ right).to(weight.dtype)


def _cholesky(moment: Tensor) -> Tensor:
    """S, lower triangular."""
    mean = float(moment.diagonal().mean())
    for ridge in _RIDGES:
        damped = moment + ridge * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        triangle, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and torch.isfinite(triangle).all():
            return triangle
    raise ValueError("the inputs of this layer have no positive definite second moment; calibrate on more text")


def shape_low_rank(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Put empty low-rank layers in place of linear ones; the model, on meta or not, is to be filled.

    Args:
        model: any module.
        ranks: name of an ``nn.Linear`` -> rank.

    Raises:
        ValueError: a name that is no linear layer of the model, or a rank that does not fit its shape.
    """
    for name, rank in ranks.items():
        linear = _linear(model, name)
        try:
            replace_module(model, linear, _like(linear, rank))
        except ValueError as error:
            raise ValueError(f"cannot factor {name!r}: {error}") from None
    return model


@torch.no_grad()
def low_rank_layer(linear: nn.Linear, rank: int, input_moment: Tensor | None = None) -> LowRankLinear:
    """Return the best approximation of a linear layer by one of a given rank, with its bias; arguments as of
    ``factors``.
    """
    layer = _like(linear, rank)
    left, right = factors(linear.weight, rank, input_moment)
    layer.left.weight.copy_(left)
    layer.right.weight.copy_(right)
    return layer


def to_low_rank(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace linear layers by their best approximations of given ranks, in place, before ``fully_shard``.

    Args:
        model: any module with weights.
        ranks: name of an ``nn.Linear`` -> rank.

    Returns:
        The model itself. Its configuration is not told; ``lowrank_train.compress.ranks.compress`` does that, for
        folders.

    Raises:
        ValueError: as ``shape_low_rank``; also for weights that are tied, frozen or not finite, and sharded models. The
            model is as it was then.
    """
    made: dict[nn.Linear, LowRankLinear] = {}
    for name, rank in ranks.items():
        linear = _linear(model, name)
        replaceable_layers(model, f"^{re.escape(name)}$")
        try:
            made[linear] = low_rank_layer(linear, rank)
        except ValueError as error:
            raise ValueError(f"cannot factor {name!r}: {error}") from None
    for linear, layer in made.items():
        replace_module(model, linear, layer)
    return model


@torch.no_grad()
def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole (unsharded) state dict of a model with low-rank layers, as that of the plain model."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = name.removesuffix("left.weight")
        if layer != name and f"{layer}right.weight" in state:
            plain[f"{layer}weight"] = _product(value, state[f"{layer}right.weight"])
        elif name.endswith("right.weight") and f"{name.removesuffix('right.weight')}left.weight" in state:
            continue
        elif name.endswith("left.bias") and f"{name.removesuffix('left.bias')}right.weight" in state:
            plain[f"{name.removesuffix('left.bias')}bias"] = value
        else:
            plain[name] = value
    return plain


def train_low_rank_only(model: nn.Module) -> nn.Module:
    """Leave in training the low-rank layers and the norms, in place: what WeLore fine-tunes; returns the model.

    Everything else takes no gradient, and so has no optimizer state.

    Raises:
        ValueError: there is no low-rank layer.
    """
    low_rank = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    if not low_rank:
        raise ValueError(
            "train=low_rank, but the model has no low-rank layer; compress it first (launch/compress.py), or train=all"
        )
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    kept = {param for module in [*low_rank, *norms] for param in module.parameters()}
    for param in model.parameters():
        param.requires_grad_(param in kept)
    return model


def _product(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if type(module) is not nn.Linear:
        got = "nothing" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"the model has {got} named {name!r}; expected an nn.Linear: the ranks are of another model")
    return module


def _like(linear: nn.Linear, rank: int) -> LowRankLinear:
    weight = linear.weight
    layer = LowRankLinear(
        linear.in_features,
        linear.out_features,
        rank,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    if linear.bias is not None:
        layer.left.bias = linear.bias
    return layer.train(linear.training)
