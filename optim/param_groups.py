"""Which parameter plays which role, from the types of the modules that own them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from optim.base import ROLES
from optim.wrapped import bare_model, plain_name

__all__ = ["param_groups"]


def param_groups(model: nn.Module, *, rules: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Parameter groups with roles, for any optimizer of this package; every trainable parameter exactly once.

    Roles: ``matrix`` (weight of an ``nn.Linear``), ``embedding``, ``head`` (what ``get_output_embeddings()`` returns,
    or else a linear layer as wide as the tallest embedding), ``vector`` (everything else: norms, biases). A weight tied
    between embedding and head is an ``embedding``. Only role ``matrix`` is updated by a low-rank method. Vectors of one
    dimension get ``weight_decay`` 0 unless a rule says otherwise.

    A module may name the roles of parameters below it itself, in an attribute ``parameter_roles`` (name relative to the
    module -> role), as spectral layers and adapters do; what it calls ``frozen`` is listed although it takes no
    gradient, because a method may exchange it for what is trained.

    Args:
        model: before or after ``fully_shard``; in DistributedDataParallel or compiled, too.
        rules: regular expression -> settings for the parameters whose name it matches (``re.search``; the first rule
            that matches wins), e.g. ``{"k_proj": {"rank": 32}, r"layers\\.0\\.": {"role": "vector"}}``.

    Raises:
        ValueError: for a rule that matches nothing, an unknown role, two roles of one parameter, a model without
            trainable parameters, and one in FSDP1 or DeepSpeed, which replace the parameters.
    """
    rules, model = dict(rules or {}), bare_model(model)
    roles = _roles(model)
    matched: set[str] = set()
    groups: dict[tuple[str, str | None, bool], dict[str, Any]] = {}
    for wrapped_name, param in model.named_parameters():
        name = plain_name(wrapped_name)
        if not param.requires_grad and roles.get(param) != "frozen":
            continue
        pattern = next((p for p in rules if re.search(p, name)), None)
        settings = dict(rules[pattern]) if pattern is not None else {}
        if pattern is not None:
            matched.add(pattern)
        role = settings.pop("role", roles.get(param, "vector"))
        if role not in ROLES:
            raise ValueError(f"rule {pattern!r} gives role {role!r}; expected one of {', '.join(ROLES)}")
        exempt = role == "vector" and param.ndim < 2
        if exempt:
            settings.setdefault("weight_decay", 0.0)
        group = groups.setdefault((role, pattern, exempt), {"params": [], "role": role, **settings})
        group["params"].append((name, param))
    unmatched = [pattern for pattern in rules if pattern not in matched]
    if unmatched:
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        raise ValueError(f"rule {unmatched[0]!r} matches no trainable parameter; names are like {', '.join(names[:3])}")
    if all(group["role"] == "frozen" for group in groups.values()):
        raise ValueError("the model has no trainable parameter; set requires_grad before building the optimizer")
    return list(groups.values())


def _roles(model: nn.Module) -> dict[Tensor, str]:
    roles: dict[Tensor, str] = {}
    modules = list(model.modules())
    for module in modules:
        for name, role in getattr(module, "parameter_roles", {}).items():
            param = module.get_parameter(name)
            if roles.setdefault(param, role) != role:
                raise ValueError(
                    f"{name!r} of a {type(module).__name__} has role {role!r} in its parameter_roles, and as the same "
                    f"tensor of another module role {roles[param]!r}; expected one role: untie it, or name it once"
                )
    for module in modules:
        if isinstance(module, nn.Embedding):
            roles.setdefault(module.weight, "embedding")
    # the tallest embedding is the vocabulary; positions have one of their own
    vocabulary = max((m.num_embeddings for m in modules if isinstance(m, nn.Embedding)), default=0)
    outputs = {getattr(module, "get_output_embeddings", lambda: None)() for module in modules} - {None}
    for module in modules:
        if isinstance(module, nn.Linear):
            is_head = module in outputs if outputs else module.out_features == vocabulary
            roles.setdefault(module.weight, "head" if is_head else "matrix")
    return roles
