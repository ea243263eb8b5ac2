"""Low-rank adapters, h = W x + (alpha / r) B A x, as peft makes them, as a parametrization of a run.

Plain LoRA (Hu et al., arXiv 2106.09685) where AdamW trains them, ReLoRA (``optim.ReLoRA``) where it also merges them
now and then: the baselines of Zhao et al. (arXiv 2405.15481), who put them on the matrices that SST replaces and train
everything else as ever.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.common.errors import UserError
from lowrank_train.layers.choice import replaceable_layers, trained_layers
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.optim.arguments.torch_arguments import is_number
from lowrank_train.optim.methods.relora import drawn_factor, merged_weight

__all__ = ["LowRankAdapters", "add_adapters"]

_A, _B, _WEIGHT = "lora_A.default.weight", "lora_B.default.weight", "base_layer.weight"


class LowRankAdapters(Parametrization):
    """W + (alpha / r) B A in attention and feed-forward layers, W frozen, by peft's LoRA layers.

    Embeddings, norms, biases and head stay as they are, and in training.

    Args:
        rank: r, columns of B (out, r) and rows of A (r, in).
        alpha: the factors' product is scaled by alpha / r; None: r, so that it is not. ``optim.ReLoRA`` has an
            argument of the same name and meaning, and needs the same value.
        seed: of the first A; B begins at zero.
        layers: regular expression on names of linear layers; None: attention and feed-forward matrices in training.

    Raises:
        ValueError: values out of range; peft is not installed.
    """

    def __init__(self, rank: int, *, alpha: float | None = None, seed: int = 0, layers: str | None = None) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank={rank!r}; expected a whole number >= 1")
        if alpha is not None and not (is_number(alpha) and 0 < alpha < math.inf):
            raise ValueError(f"alpha={alpha!r}; expected a number > 0, or None for the rank")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed={seed!r}; expected a whole number >= 0")
        _peft()
        self.rank, self.alpha, self.seed, self.layers = rank, alpha, seed, layers

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def convert(self, model: nn.Module) -> None:
        """Give layers adapters by ``add_adapters``."""
        layers = trained_layers(model, self.layers)
        add_adapters(model, self.rank, layers=layers, alpha=self.alpha, seed=self.seed)

    def converted(self, module: nn.Module) -> bool:
        """Return whether a module is a linear layer with an adapter."""
        return isinstance(module, importlib.import_module("peft.tuners.lora").LoraLayer)

    def values(self, index: int, target: nn.Module, linear: nn.Module) -> dict[str, Tensor]:
        """Return the values of the linear layer, A (r, in) drawn from seed and index, and B (out, r) zero."""
        assert isinstance(linear, nn.Linear)
        weight, r = linear.weight, self.rank
        drawn = drawn_factor((r, linear.in_features), seed=self.seed, index=index, restart=0)
        values = {_WEIGHT: weight.detach(), _A: drawn.to(weight), _B: weight.new_zeros(linear.out_features, r)}
        if linear.bias is not None:
            values["base_layer.bias"] = linear.bias.detach()
        return values

    def plain_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return W + (alpha / r) B A under the name of W, and other names without ``base_layer``."""
        plain: dict[str, Tensor] = {}
        for name, value in state.items():
            layer = name.removesuffix(_WEIGHT)
            if name.endswith(_WEIGHT):
                plain[f"{layer}weight"] = merged_weight(value, state[layer + _A], state[layer + _B], self.scale)
            elif not name.endswith((_A, _B)):
                plain[re.sub(r"(^|\.)base_layer\.(?=bias$)", r"\1", name)] = value
        return plain


@torch.no_grad()
def add_adapters(
    model: nn.Module, rank: int, *, layers: str | None = None, alpha: float | None = None, seed: int = 0
) -> nn.Module:
    """Give linear layers an adapter each, in place, before ``fully_shard``; outputs stay as they are.

    Args:
        model: any module; on the meta device only shapes are made.
        rank: as of ``LowRankAdapters``.
        layers: regular expression (``re.search``) on module names: which ``nn.Linear``; ``""`` for all; None:
            attention and feed-forward matrices, as the model's family names them.
        alpha: as of ``LowRankAdapters``.
        seed: of the draw, as of ``LowRankAdapters``.

    Returns:
        The model itself.

    Raises:
        ValueError: no layer matches, the model has adapters already or is sharded, a matched layer is smaller than the
            rank; values out of range; peft is not installed.
    """
    adapters, peft = LowRankAdapters(rank, alpha=alpha, seed=seed), _peft()
    linears = _convertible(model, adapters, layers)
    trained = {param: param.requires_grad for param in model.parameters()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules="|".join(re.escape(name) for name in linears),
    )
    # factors on meta: peft's own would be drawn from, and move, the global generator
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for param, requires_grad in trained.items():  # peft freezes all but its own
        param.requires_grad_(requires_grad)
    for index, (name, linear) in enumerate(linears.items()):
        layer: Any = model.get_submodule(name)
        layer.parameter_roles = {_A: "lora_a", _B: "lora_b", _WEIGHT: "frozen"}  # for optim.param_groups
        linear.weight.requires_grad_(False)
        layer.to(linear.weight.dtype)
        layer.train(linear.training)
        if not linear.weight.is_meta:
            for factor in (layer.lora_A, layer.lora_B):
                factor.to_empty(device=linear.weight.device)
            values = adapters.values(index, layer, linear)
            for key in (_A, _B):
                layer.get_parameter(key).copy_(values[key])
    return model


def _convertible(model: nn.Module, adapters: LowRankAdapters, layers: str | None) -> dict[str, nn.Linear]:
    if any(adapters.converted(module) for module in model.modules()):
        raise ValueError("the model has adapters already; add them only once")
    found = {name: linear for name, linear in replaceable_layers(model, layers).items() if name}
    for name, linear in found.items():
        smaller = min(linear.in_features, linear.out_features)
        if adapters.rank > smaller:
            raise ValueError(f"rank={adapters.rank} for {name!r}; expected 1 to {smaller}, the weight's smaller side")
    return found


def _peft() -> Any:
    """The library, imported only by those who want adapters."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(
            f"adapters need peft, which cannot be imported ({error}); install it: pip install 'lowrank-train[peft]'"
        ) from None
