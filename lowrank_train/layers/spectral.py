"""Linear layers in the spectral domain, W = U diag(sigma) V^T: conversion, the layer, and the way back.

Source: Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481v3), sections 3 and 4.6. ``optim.SST`` trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_train.layers.choice import replace_module, replaceable_layers
from lowrank_train.layers.spectral_product import factored_is_cheaper, spectral_product
from lowrank_train.optim.linalg import decompose
from lowrank_train.optim.spectral.factors import FACTORS, SCALES, decode, encode
from lowrank_train.optim.spectral.sampling import SAMPLERS, draw_seed, sample

__all__ = [
    "SpectralLinear",
    "factorise",
    "plain_state",
    "spectral_values",
    "to_spectral",
]

_FROZEN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "8bit": torch.int8}


class SpectralLinear(nn.Module):
    """A linear map x -> U diag(sigma) V^T x + bias, full rank, of which r triplets are trained.

    Made by ``to_spectral``; one built directly has factors of zeros, to be filled.

    Parameters, a triplet per row: ``u_active`` (r, out), ``sigma_active`` (r,), ``v_active`` (r, in), trainable;
    ``sigma_frozen`` (k - r,), trainable; ``u_frozen`` (k - r, out) and ``v_frozen`` (k - r, in), not; k = min(out, in).
    With r = k there are no frozen ones. Frozen vectors in 8 bits come with ``u_frozen_scale`` and ``v_frozen_scale``.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        rank: r, 1 to k.
        bias: whether there is one.
        gradient: ``enhanced`` leaves sigma_i out of the gradient of u_i and v_i (Eq. 14, 15); ``plain`` is dL/du.
        frozen_dtype: of the frozen vectors: None for the others' own, "float32", "bfloat16", "float16", "8bit".
        path: ``auto`` takes the cheaper of ``factored`` and ``materialised`` for the tokens at hand.
        device, dtype: as for ``nn.Linear``.

    Raises:
        ValueError: rank out of range, unknown gradient, frozen_dtype or path.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        gradient: Literal["enhanced", "plain"] = "enhanced",
        frozen_dtype: str | None = None,
        path: Literal["auto", "factored", "materialised"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        k = min(in_features, out_features)
        _check_layer(rank, k, gradient, frozen_dtype, path)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.gradient, self.frozen_dtype, self.path = gradient, frozen_dtype, path

        def empty(*shape: int, stored: torch.dtype | None = dtype, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=stored), requires_grad=trained)

        self.u_active = empty(rank, out_features)
        self.sigma_active = empty(rank)
        self.v_active = empty(rank, in_features)
        if rank < k:
            stored = dtype if frozen_dtype is None else _FROZEN_DTYPES[frozen_dtype]
            self.u_frozen = empty(k - rank, out_features, stored=stored, trained=False)
            self.sigma_frozen = empty(k - rank)
            self.v_frozen = empty(k - rank, in_features, stored=stored, trained=False)
            if frozen_dtype == "8bit":
                self.u_frozen_scale = empty(k - rank, 1, trained=False)
                self.v_frozen_scale = empty(k - rank, 1, trained=False)
        self.bias = empty(out_features) if bias else None

    @property
    def parameter_roles(self) -> dict[str, str]:
        """The role of each factor, for ``optim.param_groups``."""
        roles = {}
        for name, _ in self.named_parameters(recurse=False):
            if name != "bias":
                vectors = "singular_vectors" if name.endswith("active") else "frozen"
                roles[name] = "singular_values" if name.startswith("sigma") else vectors
        return roles

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if casts and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        tokens = x.numel() // self.in_features
        cheaper = factored_is_cheaper(tokens, self.out_features, self.in_features, self.rank)
        frozen, scales = None, None
        if hasattr(self, "sigma_frozen"):
            frozen = (self.u_frozen, self.sigma_frozen, self.v_frozen)
            scales = (self.u_frozen_scale, self.v_frozen_scale) if hasattr(self, "u_frozen_scale") else None
        return spectral_product(
            x,
            (self.u_active, self.sigma_active, self.v_active),
            frozen,
            scales,
            self.bias,
            enhanced=self.gradient == "enhanced",
            factored=cheaper if self.path == "auto" else self.path == "factored",
        )

    @property
    def weight(self) -> Tensor:
        """W (out, in), to read: made anew at every access, without a gradient."""
        return _merged({name: param.detach() for name, param in self.named_parameters(recurse=False)})

    def extra_repr(self) -> str:
        """Return the sizes that print shows."""
        frozen = "" if self.frozen_dtype is None else f", frozen_dtype={self.frozen_dtype}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{shape}, bias={self.bias is not None}{frozen}"


def to_spectral(
    model: nn.Module,
    rank: int,
    *,
    layers: str | None = None,
    sampling: Literal["multinomial", "uniform", "sequential", "top"] = "multinomial",
    seed: int = 0,
    gradient: Literal["enhanced", "plain"] = "enhanced",
    frozen_dtype: str | None = None,
    path: Literal["auto", "factored", "materialised"] = "auto",
) -> nn.Module:
    """Replace linear layers by spectral ones with the same outputs, in place, before ``fully_shard``.

    Args:
        model: any module; on the meta device only shapes are made.
        rank: r, triplets trained at a time in every layer.
        layers: regular expression (``re.search``) on module names: which ``nn.Linear`` to replace; ``""`` for all;
            None: attention and feed-forward matrices, as the model's family names them.
        sampling: how the first active triplets are drawn, as ``optim.SST`` draws the later ones.
        seed: of that draw.
        gradient: of the layers, see ``SpectralLinear``.
        frozen_dtype: of the layers, see ``SpectralLinear``.
        path: of the layers, see ``SpectralLinear``.

    Returns:
        The model itself.

    Raises:
        ValueError: no layer matches, the model is spectral already, sharded or in DistributedDataParallel, a matched
            layer's weight is tied to another module, takes no gradient, is too small for the rank, all zero or not
            finite; wrong sampling, gradient, dtype or path. The model is as it was then.
    """
    if sampling not in SAMPLERS:
        raise ValueError(f"sampling={sampling!r}; expected one of {', '.join(SAMPLERS)}")
    spectral = next((name for name, module in model.named_modules() if isinstance(module, SpectralLinear)), None)
    if spectral is not None:
        raise ValueError(f"the model is spectral already (its {spectral!r}); merge it first, or convert it only once")
    found = replaceable_layers(model, layers)
    for name, linear in found.items():  # all of them before the first is replaced
        try:
            _check_layer(rank, min(linear.weight.shape), gradient, frozen_dtype, path)
            if not linear.weight.is_meta:
                _check_weight(linear.weight)
        except ValueError as error:
            raise ValueError(f"cannot convert {name!r}: {error}") from None
    for index, linear in enumerate(found.values()):
        made = _like(linear, rank, gradient=gradient, frozen_dtype=frozen_dtype, path=path)
        if not linear.weight.is_meta:
            factors = factorise(linear.weight, rank, sampling=sampling, seed=seed, index=index)
            for key, value in spectral_values(made, factors, linear.bias).items():
                made.get_parameter(key).data.copy_(value)
        model = replace_module(model, linear, made)
    return model


def factorise(
    weight: Tensor, rank: int, *, sampling: str = "multinomial", seed: int = 0, index: int = 0
) -> dict[str, Tensor]:
    """Return factors ``u``, ``sigma``, ``v`` of a weight (out, in), float64. The first ``rank`` triplets are drawn as
    active.

    Raises ValueError for a weight that is all zero or not finite.
    """
    _check_weight(weight)
    factors = decompose(weight.detach())
    chosen = sample(
        sampling, factors["sigma"].cpu(), rank, iteration=0, seed=draw_seed(seed, index, iteration=0)
    ).tolist()
    active = set(chosen)
    order = torch.tensor(chosen + [i for i in range(len(factors["sigma"])) if i not in active], device=weight.device)
    return {key: value[order] for key, value in factors.items()}


@torch.no_grad()
def spectral_values(target: SpectralLinear, factors: Mapping[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    """Return the result of ``factorise`` as the (whole) parameters of a spectral layer."""
    r = target.rank
    values = {f"{key}_active": value[:r] for key, value in factors.items()}
    if r < len(factors["sigma"]):
        values.update({f"{key}_frozen": value[r:] for key, value in factors.items()})
        if target.frozen_dtype == "8bit":
            for key in ("u_frozen", "v_frozen"):
                values[key], values[f"{key}_scale"] = encode(values[key])
    if bias is not None:
        values["bias"] = bias
    return values


@torch.no_grad()
def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole (unsharded) state dict of a model with spectral layers, as that of the plain model."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layer, dot, factor = name.rpartition(".")
        if factor in (*FACTORS, *SCALES):
            layers.setdefault(layer + dot, {})[factor] = value
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, dot, factor = name.rpartition(".")
        if factor == "u_active":
            merged[f"{layer}{dot}weight"] = _merged(layers[layer + dot])
        elif factor not in (*FACTORS, *SCALES):
            merged[name] = value
    return merged


def _merged(factors: Mapping[str, Tensor]) -> Tensor:
    """W in the type of ``u_active``; the sum is made in float32 or wider."""
    dtype = torch.promote_types(factors["u_active"].dtype, torch.float32)
    weight = factors["u_active"].to(dtype).mT @ _scaled(factors, "active", dtype)
    if "sigma_frozen" in factors:
        u = decode(factors["u_frozen"], factors.get("u_frozen_scale"), dtype)
        weight.addmm_(u.mT, _scaled(factors, "frozen", dtype))
    return weight.to(factors["u_active"].dtype)


def _scaled(factors: Mapping[str, Tensor], segment: str, dtype: torch.dtype) -> Tensor:
    v = decode(factors[f"v_{segment}"], factors.get(f"v_{segment}_scale"), dtype)
    return v * factors[f"sigma_{segment}"].to(dtype).unsqueeze(1)


def _like(linear: nn.Linear, rank: int, **settings: object) -> SpectralLinear:
    weight = linear.weight
    spectral = SpectralLinear(
        linear.in_features,
        linear.out_features,
        rank,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **settings,  # type: ignore[arg-type]
    )
    if linear.bias is not None:
        spectral.bias = linear.bias
    return spectral.train(linear.training)


def _check_weight(weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError("its weight has entries that are not finite")
    if not weight.any():
        raise ValueError("its weight is all zero, so its singular vectors mean nothing; initialise it, or leave it out")


def _check_layer(rank: int, k: int, gradient: str, frozen_dtype: str | None, path: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= k:
        raise ValueError(f"rank={rank!r}; expected a whole number from 1 to {k}, the smaller side of the weight")
    if frozen_dtype is not None and frozen_dtype not in _FROZEN_DTYPES:
        raise ValueError(f"frozen_dtype={frozen_dtype!r}; expected None or one of {', '.join(_FROZEN_DTYPES)}")
    for key, value, valid in (
        ("gradient", gradient, ("enhanced", "plain")),
        ("path", path, ("auto", "factored", "materialised")),
    ):
        if value not in valid:
            raise ValueError(f"{key}={value!r}; expected one of {', '.join(valid)}")
