"""Which parameter plays which role, from the types of the modules that own them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_train.optim.manifolds.maps import Description, describe_manifold, same_manifold
from lowrank_train.optim.parameters.group_checks import ROLES
from lowrank_train.optim.parameters.present import remember
from lowrank_train.optim.parameters.roles import roles
from lowrank_train.optim.parameters.wrappers import bare_model, plain_name
from lowrank_train.optim.shards.placements import reshard

__all__ = ["keep_manifolds", "param_groups"]


_BIAS = re.compile(r"(^|[._])bias(es)?(_[^.]*)?$")
"""A name of biases: those of a stack of experts have two dimensions."""


def param_groups(
    model: nn.Module, *, rules: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Return parameter groups with roles, for any optimizer of this package; every trainable parameter exactly once.

    Roles: ``matrix`` (weights of linear maps, alone or in stacks), ``embedding``, ``head``, ``vector`` (everything
    else: norms, biases, convolutions, what is too thin); ``optim.parameters.roles`` has the rules and their reasons. A
    weight tied between embedding and head is an ``embedding``. Only role ``matrix`` is updated by a low-rank method.
    Vectors of one dimension, and biases of any, get ``weight_decay`` 0 unless a rule says otherwise. Each group also
    has ``modules``, the classes that own its parameters, which an optimizer uses for its warnings and does not keep.

    A module may name the roles of parameters below it itself, in an attribute ``parameter_roles`` (name relative to the
    module -> role), as spectral layers and adapters do; what it calls ``frozen`` is listed although it takes no
    gradient, because a method may exchange it for what is trained.

    Parameters whose rows are points of a manifold get role ``points``, key ``manifold`` (a plain description) and
    ``weight_decay`` 0. Their module names them in ``parameter_manifolds`` (name relative to the module -> manifold of
    geoopt, or a description as ``("lorentz", 1.0)``), which survives meta-device initialisation, loading, copies and
    sharding; geoopt's ``ManifoldParameter`` are recognised as long as they are that.

    Args:
        model: before or after ``fully_shard``; in DistributedDataParallel or compiled, too.
        settings: of every group, where no rule says otherwise: ``stochastic_rounding=True``, ``offload_state=True``
            (``optim.SHARED_SETTINGS``), or any the optimizer has.
        rules: regular expression -> settings for the parameters whose name it matches (``re.search``; the first rule
            that matches wins), e.g. ``{"k_proj": {"rank": 32}, r"layers\\.0\\.": {"role": "vector"}}``.

    Raises:
        ValueError: for a rule that matches nothing, an unknown role, two roles of one parameter, a model without
            trainable parameters, one in FSDP1 or DeepSpeed, which replace the parameters, a manifold unknown to
            ``optim.manifolds.maps`` or two of them for one parameter, or a rule that would lose one.
    """
    rules, model = dict(rules or {}), bare_model(model)
    reshard(model)  # after an evaluation FSDP2 shows whole parameters, which are not those that get gradients
    remember(model)
    manifolds, found = _manifolds(model), roles(model)
    matched: set[str] = set()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for wrapped_name, param in model.named_parameters():
        name = plain_name(wrapped_name)
        known = found[param]
        if not param.requires_grad and known.role != "frozen":
            continue
        pattern = next((p for p in rules if re.search(p, name)), None)
        ruled = rules[pattern] if pattern is not None else {}
        own = {**settings, **ruled}
        if pattern is not None:
            matched.add(pattern)
        manifold = manifolds.get(param)
        role = own.pop("role", known.role if manifold is None else "points")
        if role not in ROLES:
            raise ValueError(f"rule {pattern!r} gives role {role!r}; expected one of {', '.join(ROLES)}")
        if manifold is not None:
            if role != "points" or "manifold" in own:
                raise ValueError(
                    f"rule {pattern!r} gives {name!r} another role or manifold; its rows are points of {manifold!r} "
                    "and would leave it: expected a rule without these keys, or a module without the manifold"
                )
            own["manifold"] = manifold
        exempt = role == "points" or (role == "vector" and (param.ndim < 2 or _BIAS.search(name) is not None))
        if exempt:
            own["weight_decay"] = ruled.get("weight_decay", 0.0)
        if role == "matrix" and own.setdefault("weight_layout", known.weight_layout) == "out,in":
            del own["weight_layout"]  # as everywhere else
        is_stack = role == "matrix" and param.ndim > 2
        key = (role, pattern, exempt, manifold, own.get("weight_layout"), is_stack)
        group = groups.setdefault(key, {"params": [], "modules": [], "role": role, **own})
        group["params"].append((name, param))
        group["modules"].append(known.module)
    unmatched = [pattern for pattern in rules if pattern not in matched]
    if unmatched:
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        raise ValueError(f"rule {unmatched[0]!r} matches no trainable parameter; names are like {', '.join(names[:3])}")
    if all(group["role"] == "frozen" for group in groups.values()):
        raise ValueError("the model has no trainable parameter; set requires_grad before building the optimizer")
    return list(groups.values())


def keep_manifolds(model: nn.Module) -> None:
    """Write the manifold of every geoopt ``ManifoldParameter`` into its module's ``parameter_manifolds``.

    To be called before what makes plain parameters of them: ``fully_shard``, ``to_empty``; on ``self`` at the end of
    ``__init__`` for ``from_pretrained``, which builds its own. Raises ValueError for a manifold unknown to
    ``optim.manifolds.maps``.
    """
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            manifold = _own_manifold(name, param)
            if manifold is not None:
                # a dict of its own: a class may hold one for all
                declared: Any = {**getattr(module, "parameter_manifolds", {}), name: manifold}
                module.parameter_manifolds = declared


def _own_manifold(name: str, param: Tensor) -> Description | None:
    """Of geoopt's subclass of parameters; those of Euclidean space have none."""
    manifold = getattr(param, "manifold", None)
    if manifold is None or type(manifold).__name__ == "Euclidean":
        return None
    try:
        return describe_manifold(manifold)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _manifolds(model: nn.Module) -> dict[Tensor, Description]:
    """Of every parameter whose rows are points."""
    found: dict[Tensor, Description] = {}
    for name, param in model.named_parameters():
        manifold = _own_manifold(name, param)
        if manifold is not None:
            found[param] = manifold
    for prefix, module in model.named_modules():
        for name, declared in getattr(module, "parameter_manifolds", {}).items():
            full_name = f"{prefix}.{name}" if prefix else name
            try:
                param, manifold = module.get_parameter(name), describe_manifold(declared)
            except (AttributeError, ValueError) as error:
                raise ValueError(f"parameter_manifolds names {full_name!r}: {error}") from None
            if not same_manifold(found.setdefault(param, manifold), manifold):
                raise ValueError(
                    f"{full_name!r} is said to hold points of {manifold!r} and of {found[param]!r}; expected one"
                )
    return found
