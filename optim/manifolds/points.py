"""Parameters whose rows are points of a manifold: Adam in the tangent spaces. What every optimizer does to role points.

    g  = coordinates of the Riemannian gradient at x                              one row each, ``optim.manifolds.maps``
    v <- b2 v + (1 - b2) |g|^2                                                    one number a point
    m <- b1 m + (1 - b1) g
    u  = -lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)                      amsgrad: the largest v so far for v
    x <- exp_x(u);   m <- m carried to the new x by parallel transport

With ``point_rank`` r the first moment is kept as C (n, r), in r directions that all points share:

    m  = tangent_x(C Q);   at the end of the step  C <- m Q^T                     Q (r, p) orthonormal
    every ``point_refresh_interval`` steps, before that:  Q <- the r leading eigenvectors of M^T M, M the rows m

Approximate is this alone: of a moment, what is orthogonal to the span of Q is forgotten at the end of each step. Of all
Q, the one chosen at a refresh forgets least there. The present gradient and v are whole. At r = p nothing is forgotten.

A point without a gradient in this step, among others that have one, moves on by its momentum, as in AdamW and geoopt.
Where nothing moves a point it stays bit for bit. Points are completed from what is stored (``Manifold.completed``) and
moments are tangent by construction, so nothing drifts that would have to be stabilised now and then.

Rows are whole on their rank, and all of this is local, but for the sum of M^T M at a refresh.

Source: Becigneul & Ganea, "Riemannian adaptive optimization methods" (arXiv 1810.00760), Algorithm 1, each row a factor
of the product; corrections of bias as in Adam, and so as in geoopt's RiemannianAdam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.arguments.hyperparameters import check_flag, check_whole, is_whole
from lowrank_train.optim.linalg import gram, leading_eigenvectors
from lowrank_train.optim.manifolds.maps import Manifold, describe_manifold, find_manifold, same_manifold
from lowrank_train.optim.shards.blocks import row_blocks
from lowrank_train.optim.shards.collectives import decide_on_one_rank
from lowrank_train.optim.shards.layout import StateTensor, local, row_range, sharded_dim
from lowrank_train.optim.storage.quantization import as_stored, read, write

__all__ = ["completed", "point_state", "refresh_bytes", "step_points", "structural_objection"]

_SETTINGS: dict[str, Any] = {"amsgrad": False, "point_rank": None, "point_refresh_interval": 200}
"""The settings of a group of points, where neither the group nor the optimizer says otherwise."""

_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 3e-2
"""The largest ``Manifold.defect`` at the first step: far above rounding, far below a point not on the manifold."""

_TEMPORARIES = 8
"""Blocks are smaller by this than those of other updates, for what float64 and its temporaries take. Measured on 20,000
Lorentz points in R^65, one core: 52 ms of processor time, 118 ms at 1, 67 ms at 16."""


def completed(group: dict[str, Any], defaults: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a parameter group as given, with role, manifold and settings filled in if it is one of points.

    Raises ValueError for a manifold without the role, or the role without a manifold.
    """
    manifold, role = group.get("manifold"), group.get("role")
    if manifold is None and role != "points":
        return group
    if manifold is None:
        names = [entry[0] for entry in group["params"] if isinstance(entry, tuple)]
        raise ValueError(
            f"parameter group {index} has role 'points' and no manifold"
            + (f" ({names[0]!r})" if names else "")
            + "; expected one, as geoopt.Lorentz(): without it its points would be updated as vectors. Declare "
            "parameter_manifolds in the module, or call optim.keep_manifolds(model) before fully_shard, to_empty and "
            "from_pretrained, and make the groups with optim.param_groups(model)"
        )
    if role not in (None, "points"):
        raise ValueError(
            f"parameter group {index} has a manifold and role {role!r}; expected role 'points', or no manifold"
        )
    settings = {key: defaults.get(key, default) for key, default in _SETTINGS.items()}
    return {
        "weight_decay": 0.0,
        **settings,
        **group,
        "role": "points",
        "manifold": describe_manifold(manifold),
    }


def point_state(name: str, param: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
    """Return the state tensors of a parameter whose rows are points, in float32 or wider except as ``state_dtype``
    says.

    ``step`` (), in CPU memory; ``exp_avg`` (n, p), the first moments' coordinates, or (n, r); ``exp_avg_sq`` (n, 1);
    with amsgrad ``max_exp_avg_sq`` (n, 1); with ``point_rank`` ``basis`` (r, p) and ``clock`` (), also in CPU memory.

    Raises:
        ValueError: for shapes and settings that do not fit, and rows cut by sharding.
    """
    manifold, shape = find_manifold(group["manifold"]), tuple(param.shape)
    _check(name, param, group, manifold)
    dtype = torch.promote_types(param.dtype, torch.float32)
    coordinates = manifold.coordinates(shape)
    layout = {"step": StateTensor((), torch.float32, "host")}
    rank = group["point_rank"]
    if rank is not None:
        layout["clock"] = StateTensor((), torch.float32, "host")
        layout["basis"] = StateTensor((rank, coordinates[1]), dtype, "replicated")
        coordinates = (coordinates[0], rank)
    # one number a point: in fewer bits it would save nothing
    layout |= as_stored({"exp_avg": StateTensor(coordinates, dtype, "leading")}, group.get("state_dtype"))
    layout["exp_avg_sq"] = StateTensor((shape[0], 1), dtype, "leading")
    if group["amsgrad"]:
        layout["max_exp_avg_sq"] = StateTensor((shape[0], 1), dtype, "leading")
    return layout


def refresh_bytes(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    """Return what a subspace update hands to collectives for one parameter: M^T M, and the basis vectors chosen."""
    rank = group["point_rank"]
    if rank is None:
        return 0
    p = find_manifold(group["manifold"]).coordinates(shape)[1]
    return p * p * torch.float64.itemsize + rank * p * torch.promote_types(dtype, torch.float32).itemsize


def structural_objection(group: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """Return why state saved by another group means something else here; None if it does not."""
    if same_manifold(saved.get("manifold"), group["manifold"]):
        return None
    return (
        f"the checkpoint was written with manifold={saved.get('manifold')!r} and this optimizer has "
        f"manifold={group['manifold']!r}, so its points and their state mean something else; load it with the same"
    )


@torch.no_grad()
def step_points(
    name: str, param: Tensor, gradient: Tensor | None, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> None:
    """Make one step of one parameter, in place; with ``point_rank``, a collective where a new basis is due.

    Raises:
        ValueError: at the first step, for a point that is not on the manifold.
    """
    manifold = find_manifold(group["manifold"])
    due = _is_due(state, group)
    if gradient is None and not due:
        _advance(state, "clock")
        return
    weight = local(param)
    width = _TEMPORARIES * math.prod(weight.shape[1:])
    blocks = row_blocks(weight.shape[0], width, weight.device) if weight.numel() else []
    if gradient is not None:
        gradient = local(gradient)
        if not state["step"]:
            _check_points(name, param, gradient, group, manifold)
        state["step"] += 1
    moments = []
    for rows in blocks:
        x = manifold.completed(weight[rows].double())
        moment = _first_moment(manifold, x, state, rows)
        if gradient is not None:
            moment = _update(manifold, weight, x, gradient[rows].double(), moment, state, group, rows)
        if due:
            moments.append(moment.to(_real(weight)))
        else:
            _keep(state, rows, moment)
    if due:
        p = manifold.coordinates(param.shape)[1]
        chosen = _refresh(param, moments, state, p, int(group["point_rank"]))
        for rows, moment in zip(blocks, moments, strict=True):
            _keep(state, rows, moment.double())
        if not chosen and not state["clock"]:
            return  # no gradient yet: still due
    _advance(state, "clock")


def _update(
    manifold: Manifold,
    weight: Tensor,  # (n_local, ...), written
    x: Tensor,  # (b, ...) float64, the points of these rows
    euclidean: Tensor,  # as x
    moment: Tensor,  # (b, p)
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    rows: slice,
) -> Tensor:
    """Move the points of these rows; returns their first moments (b, p) there."""
    (beta1, beta2), steps = group["betas"], float(state["step"])
    present = (euclidean != 0).flatten(1).any(1)
    gradient = torch.where(_like(present, x), manifold.gradient(x, euclidean), 0.0)
    square = local(state["exp_avg_sq"])[rows].double() * beta2
    square = square + (1 - beta2) * gradient.flatten(1).square().sum(1, keepdim=True)
    local(state["exp_avg_sq"])[rows].copy_(square)
    if group["amsgrad"]:
        largest = local(state["max_exp_avg_sq"])[rows]
        largest.copy_(torch.maximum(largest.double(), square))
        square = largest.double()
    moment = beta1 * moment + (1 - beta1) * gradient
    rate = (square / (1 - beta2**steps)).sqrt() + group["eps"]
    u = moment * (-group["lr"] / (1 - beta1**steps)) / _like(rate[:, 0], moment)
    y, carried = manifold.move(x, u, moment)
    moved = (u != 0).flatten(1).any(1)
    old = weight[rows]
    old.copy_(torch.where(_like(moved, x), manifold.storable(y, weight.dtype), old.double()))
    return torch.where(_like(moved, moment), carried, moment)


def _first_moment(manifold: Manifold, x: Tensor, state: Mapping[str, Tensor], rows: slice) -> Tensor:
    width = len(state["basis"]) if "basis" in state else math.prod(manifold.coordinates(tuple(x.shape))[1:])
    moment = read(state, "exp_avg", rows, width, torch.float64)
    if "basis" in state:
        moment = moment @ state["basis"].double()
    present = (moment != 0).flatten(1).any(1)  # where it is not, the weights perhaps hold no numbers yet
    return torch.where(_like(present, moment), manifold.tangent(x, moment), 0.0)


def _keep(state: Mapping[str, Tensor], rows: slice, moment: Tensor) -> None:
    if "basis" in state:
        moment = moment @ state["basis"].double().mT
    if "exp_avg_scale" in state:
        write(state, "exp_avg", rows, moment)
    else:
        local(state["exp_avg"])[rows].copy_(moment)


def _is_due(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> bool:
    return "clock" in state and int(state["clock"]) % int(group["point_refresh_interval"]) == 0


def _advance(state: Mapping[str, Tensor], key: str) -> None:
    if key in state:
        state[key].add_(1)


def _refresh(param: Tensor, moments: list[Tensor], state: Mapping[str, Tensor], p: int, r: int) -> bool:
    """Choose directions for the moments of all ranks; False, and the old ones, if there are none to choose for."""
    basis, device = state["basis"], local(param).device

    def statistics(i: int) -> Tensor:
        total = torch.zeros(p, p, dtype=torch.float64, device=device)
        for block in moments:
            total += gram(block)
        return total

    def decide(i: int, total: Tensor) -> dict[str, Tensor]:
        magnitude = float(total.abs().sum())
        if not 0 < magnitude < math.inf:
            return {"basis": torch.zeros_like(basis)}
        return {"basis": leading_eigenvectors(total, r)}

    ((_, decision),) = decide_on_one_rank([param], statistics, decide, [{"basis": basis}])
    if not decision["basis"].any():
        return False
    basis.copy_(decision["basis"])
    return True


def _check(name: str, param: Tensor, group: Mapping[str, Any], manifold: Manifold) -> None:
    shape = tuple(param.shape)
    objection = manifold.objection(shape)
    if objection is not None:
        raise ValueError(f"{name!r} of shape {shape} cannot hold points of manifold={group['manifold']!r}: {objection}")
    if not param.is_floating_point():
        raise ValueError(f"{name!r} holds points in {param.dtype}; expected a floating-point type")
    if sharded_dim(param) not in (None, 0):
        raise ValueError(
            f"{name!r} of shape {shape} holds a point per row and is sharded along dimension {sharded_dim(param)}, "
            "which cuts them; expected dimension 0: in shard_placement_fn return Shard(0) for role 'points'"
        )
    if isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0:
        raise ValueError(
            f"weight_decay={group['weight_decay']!r} for {name!r}, whose rows are points: they have no zero to decay "
            "to; expected 0 (pull them to an origin in the loss)"
        )
    check_flag(group, "amsgrad", name)
    check_whole(group, "point_refresh_interval", 1, name=name, unit=" of steps")
    rank = group["point_rank"]
    if rank is None:
        return
    if not manifold.low_rank:
        raise ValueError(
            f"point_rank={rank!r} for {name!r}: points of manifold={group['manifold']!r} are matrices, whose moments "
            "share no directions; expected None"
        )
    largest = manifold.coordinates(shape)[1]
    if not is_whole(rank) or not 1 <= rank <= largest:
        raise ValueError(
            f"point_rank={rank!r} for {name!r} of shape {shape}; expected a whole number from 1 to {largest}"
        )


def _check_points(name: str, param: Tensor, gradient: Tensor, group: Mapping[str, Any], manifold: Manifold) -> None:
    """Of the rows that have a gradient: checkpoint code steps with none, on weights that are not there yet."""
    weight = local(param)
    if weight.device.type == "meta" or not weight.numel():
        return
    defect = manifold.defect(weight.double())
    tolerance = _TOLERANCE if weight.dtype.itemsize >= torch.float32.itemsize else _TOLERANCE_16_BITS
    off = ~(defect <= tolerance) & (gradient != 0).flatten(1).any(1)
    if off.any():
        row = int(off.nonzero()[0])
        raise ValueError(
            f"row {row_range(param).start + row} of {name!r} is not on manifold={group['manifold']!r}: it is off by "
            f"{float(defect[row]):.2g} of its size, expected at most {tolerance:g} ({int(off.sum())} rows are off): "
            "initialise the parameter with points, e.g. by the manifold's projx or expmap0"
        )


def _real(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """One number a row, (n,), made to broadcast."""
    return rows.view(-1, *[1] * (tensor.ndim - 1))
