"""The role of every parameter, from the module that owns it and from what it is to that module.

In this order, and the first that applies decides:

    declared     what a module says in ``parameter_roles``
    embedding    the table of an ``nn.Embedding``, or of a module that has ``num_embeddings``, or of a module without
                 ``in_features`` whose name says that it embeds
    head         all of what ``get_output_embeddings()`` returns, with wrappers in it (peft's ``modules_to_save``);
                 without that, a linear layer as wide as the tallest embedding. And a linear layer as wide as the
                 classes of a module with ``num_labels`` or ``num_classes``, outside of that module's backbone
    vector       parameters of norms and convolutions, and whatever has less than two dimensions
    matrix       the weights of linear maps: parameters of two dimensions or more whose own name says so (``weight``,
                 ``in_proj_weight``, ``weight_ih_l0``, ``down_proj``, ``w1``), with the two last of at least 4
    vector       all else: tables of positions, biases of experts, decay rates of state spaces

A weight with fewer than 4 rows or columns is no matrix, because a quarter of its directions, the rank that methods take
unless told otherwise, is less than one: value heads, classifiers of two classes, the magnitudes of weight norm. AdamW's
state of it is small.

A parametrized weight (``nn.utils.parametrizations``) has the role of the weight it makes.

Convolutions get AdamW. The papers of these methods are about linear layers; of Muon's, one flattens filters to the
first dimension by all others, and leaves the first layer to AdamW. A rule with role ``matrix`` does the same here.

``weight_layout`` of a matrix (``optim.parameters.stacks``) is "in,out" where the module says ``is_transposed``, or
where its bias is as long as the last dimension and not as the one before. A square weight is laid out as the others of
its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Found", "roles"]

FEWEST = 4
"""Rows and columns of a matrix: a quarter of fewer is less than one direction."""

_WEIGHT = re.compile(r"(^|_)(weight(_|$)|proj(ection)?$)|^[wv]\d+$")
_EMBEDS = re.compile(r"emb(ed|edding|eddings|s)?(_|\.|$)", re.IGNORECASE)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)


class Found(NamedTuple):
    """What is known of a parameter."""

    role: str
    module: str
    """Class of the module that owns it."""
    weight_layout: str


@dataclass(frozen=True)
class _Owned:
    """A parameter and the module it belongs to."""

    param: Tensor
    module: nn.Module
    name: str
    """Name of the parameter in its module, or of the tensor that it parametrizes there."""
    path: str
    """Name of the module in the model."""

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def is_convolution(self) -> bool:
        return hasattr(self.module, "kernel_size")

    @property
    def is_norm(self) -> bool:
        return isinstance(self.module, _NORMS) or hasattr(self.module, "normalized_shape")

    @property
    def is_embedding(self) -> bool:
        if isinstance(self.module, nn.Embedding | nn.EmbeddingBag) or hasattr(self.module, "num_embeddings"):
            return self.name == "weight" or self.name.startswith("weight_")
        known = self.is_linear or self.is_convolution or self.is_norm or hasattr(self.module, "in_features")
        return self.name == "weight" and self.param.ndim == 2 and not known and bool(_EMBEDS.search(self.path))

    @property
    def is_matrix(self) -> bool:
        if self.is_convolution or self.is_norm or self.param.ndim < 2 or min(self.param.shape[-2:]) < FEWEST:
            return False
        return bool(_WEIGHT.search(self.name))

    @property
    def transposed(self) -> bool | None:
        """Whether it is (in, out); None: its shape does not tell."""
        declared = getattr(self.module, "is_transposed", None)
        if isinstance(declared, bool):
            return declared
        if self.is_linear or self.param.ndim < 2:
            return False
        own = dict(self.module.named_parameters(recurse=False))
        biases = (own.get(key) for key in (self.name.replace("weight", "bias"), f"{self.name}_bias"))
        bias = next((b for b in biases if b is not None and b is not self.param), None)
        rows, columns = self.param.shape[-2:]
        if bias is None or bias.ndim != self.param.ndim - 1 or rows == columns:
            return None
        return bool(bias.shape[-1] == columns)


def roles(model: nn.Module) -> dict[Tensor, Found]:
    """Return the role of every parameter of a model, with its module and layout.

    Raises:
        ValueError: for a parameter to which two modules declare two roles.
    """
    owned: dict[Tensor, list[_Owned]] = {}
    for each in _owned(model):
        owned.setdefault(each.param, []).append(each)
    chosen: dict[Tensor, str] = {}
    for role, params in (
        *_declared(model),
        ("embedding", [param for param, owners in owned.items() if any(each.is_embedding for each in owners)]),
        ("head", _heads(model, owned)),
        ("matrix", [param for param, owners in owned.items() if any(each.is_matrix for each in owners)]),
    ):
        for param in params:
            chosen.setdefault(param, role)
    habits = {
        (type(each.module), each.name): transposed
        for owners in owned.values()
        for each in owners
        if (transposed := each.transposed) is not None
    }
    found = {}
    for param, owners in owned.items():
        first, transposed = owners[0], owners[0].transposed
        if transposed is None:
            transposed = habits.get((type(first.module), first.name), False)
        layout = "out,rest" if first.is_convolution else "in,out" if transposed else "out,in"
        found[param] = Found(chosen.get(param, "vector"), type(first.module).__name__, layout)
    return found


def _owned(model: nn.Module) -> Iterator[_Owned]:
    """Yield every parameter with each module that has it."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        owner, kept_as = module, path
        tensor = None
        if isinstance(module, ParametrizationList):
            kept_as, _, tensor = f".{path}".rpartition(".parametrizations.")
            kept_as = kept_as.removeprefix(".")
            owner = modules[kept_as]
        for name, param in module.named_parameters(recurse=False):
            yield _Owned(param, owner, name if tensor is None else tensor, kept_as)


def _declared(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
    declared: dict[Tensor, str] = {}
    for module in model.modules():
        for name, role in getattr(module, "parameter_roles", {}).items():
            param = module.get_parameter(name)
            if declared.setdefault(param, role) != role:
                raise ValueError(
                    f"{name!r} of a {type(module).__name__} has role {role!r} in its parameter_roles, and as the same "
                    f"tensor of another module role {declared[param]!r}; expected one role: untie it, or name it once"
                )
    return [(role, [param]) for param, role in declared.items()]


def _heads(model: nn.Module, owned: dict[Tensor, list[_Owned]]) -> list[Tensor]:
    modules = list(model.modules())
    outputs: set[Any] = {getattr(module, "get_output_embeddings", lambda: None)() for module in modules} - {None}
    heads = [param for output in outputs if isinstance(output, nn.Module) for param in _weights(output)]
    # the tallest embedding is the vocabulary; positions have one of their own
    vocabulary = max((m.num_embeddings for m in modules if isinstance(m, nn.Embedding)), default=0)
    linear = {each.module for owners in owned.values() for each in owners if each.is_linear}
    if not outputs:
        heads += [param for each in linear if each.out_features == vocabulary for param in _weights(each)]
    for module in modules:
        classes = getattr(module, "num_labels", getattr(module, "num_classes", None))
        if not isinstance(classes, int):
            continue
        backbone = getattr(module, getattr(module, "base_model_prefix", ""), None)
        inside = set(backbone.modules()) if isinstance(backbone, nn.Module) and backbone is not module else set()
        for each in module.modules():
            if each in linear and each not in inside and each.out_features == classes:
                heads += _weights(each)
    return heads


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the weights of a layer, which may be parametrized or wrapped."""
    return [param for param in module.parameters() if param.ndim > 1]
