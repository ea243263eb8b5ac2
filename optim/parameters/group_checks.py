"""Parameter groups: the roles there are, the names of parameters, and the checks that every group must pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lowrank_train.optim.arguments.torch_arguments import check_rate, is_number
from lowrank_train.optim.parameters import stacks

__all__ = ["LAYERS", "ROLES", "SHARED_SETTINGS", "check_group", "check_not_flattened", "named_parameters"]

ROLES = (
    "matrix",
    "embedding",
    "head",
    "vector",
    "singular_vectors",  # of a spectral layer, one per row, in training
    "singular_values",
    "lora_a",  # (rank, in) and (out, rank): the factors beside a frozen matrix
    "lora_b",
    "points",  # of a manifold, one per row
    "frozen",  # takes no gradient and has no state; a method may exchange it for what is trained
)

LAYERS = {
    "singular_vectors": "spectral",
    "singular_values": "spectral",
    "lora_a": "adapter",
    "lora_b": "adapter",
    "points": "points",
}
"""Role -> the kind of converted layers that have parameters of it."""

SHARED_SETTINGS: dict[str, Any] = {"state_dtype": None, "stochastic_rounding": False, "offload_state": False}
"""Settings of a group that every optimizer has, with their defaults: how weights and state are kept between steps.

``state_dtype``: of the moments: None (the parameter's), "float32", "bfloat16", "8bit" or "4bit"
(``optim.storage.quantization``). ``stochastic_rounding``: bfloat16 weights, and moments, are rounded stochastically
(``optim.storage.rounding``) and not to the nearest. ``offload_state``: state is kept in host memory, pinned where the
parameter is on a GPU, and comes to the device for the step.
"""


def named_parameters(group: dict[str, Any], first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a group with their names, or with numbers that count from ``first``."""
    names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(group["params"]))]
    yield from zip(names, group["params"], strict=True)


def check_group(group: dict[str, Any], index: int) -> None:
    """Check the role, the hyperparameters that all optimizers share, and the parameters of a group.

    Args:
        group: of an optimizer; its betas are made a tuple.
        index: of the group, for the message.

    Raises:
        ValueError: a value does not fit.
    """
    role = group["role"]
    if role not in ROLES:
        raise ValueError(
            f"parameter group {index} has role {role!r}; expected one of {', '.join(ROLES)}: a parameter's shape does "
            "not tell an embedding from a matrix, so pass optim.param_groups(model) instead of model.parameters(), and "
            "optim.hf_factory(name) instead of a class to Hugging Face's Trainer"
        )
    if group["weight_layout"] not in stacks.LAYOUTS:
        raise ValueError(
            f"parameter group {index} has weight_layout={group['weight_layout']!r}; expected one of "
            + ", ".join(map(repr, stacks.LAYOUTS))
        )
    for key in ("lr", "weight_decay", "eps"):
        value = group[key]
        if not check_rate(value):
            raise ValueError(f"parameter group {index} has {key}={value!r}; expected a number >= 0, or a tensor of one")
    if len(set(group["params"])) < len(group["params"]):
        name = next(key for key, param in named_parameters(group) if sum(param is p for p in group["params"]) > 1)
        raise ValueError(f"parameter group {index} has {name!r} as a duplicate of another entry; expected it once")
    for name, param in named_parameters(group):
        if param.is_complex():
            raise ValueError(
                f"{name!r} is complex ({param.dtype}); expected real numbers: train torch.view_as_real of it"
            )
    for key in ("stochastic_rounding", "offload_state"):
        if not isinstance(group[key], bool):
            raise ValueError(f"parameter group {index} has {key}={group[key]!r}; expected True or False")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"parameter group {index} has betas={betas!r}; expected two numbers in [0, 1)")
    group["betas"] = tuple(betas)
    if role == "matrix":
        for name, param in named_parameters(group):
            if param.ndim < 2 or math.prod(param.shape) == 0:
                raise ValueError(
                    f"{name!r} has role 'matrix' and shape {tuple(param.shape)}; expected two non-empty dimensions, or "
                    "more for a stack of matrices: give it role 'vector' with rules={...} in optim.param_groups"
                )


def check_not_flattened(name: str, param: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError if a parameter that took the place of a matrix is flat."""
    if group["role"] == "matrix" and param.ndim < 2:
        raise ValueError(
            f"{name!r} has role 'matrix', and what replaced it has shape {tuple(param.shape)}: the framework flattens "
            "parameters, as DeepSpeed and FSDP1 do; shard with FSDP2 (fully_shard) instead"
        )
