"""The update fused into the backward pass: a full-size gradient lives no longer than it takes to use it.

Each parameter's hook runs when its gradient is complete (under FSDP2: reduced and sharded). Three cases:

    accumulation_steps = 1                 the parameter is updated at once and its gradient freed
    accumulation_steps = k, coordinates    coordinates g_i = project(G_i) are summed over the micro-batches and each G_i
    suffice (residual "drop")              freed: (m, r) numbers wait instead of (m, d); exact, since project is linear.
                                           Directions due are chosen from the first micro-batch
    accumulation_steps = k, otherwise      gradients are summed in ``param.grad`` as always, and freed by the update in
                                           the last backward

Clipping by the global norm needs every gradient before the first update. With ``max_norm`` the coordinates and squared
norms are collected in backward, and the update happens in ``step()``; embeddings, head and vectors keep their gradients
until then. The norm is that of the whole gradient for one micro-batch; for several, that of the summed coordinates.

Sources: LOMO, Lv et al. (arXiv 2306.09782), and GaLore's per-layer update (arXiv 2403.03507), which neither accumulate
nor clip, and have one optimizer and one schedule per parameter. Here there is one, and one ``step()`` per real step.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_train.optim.arguments.hyperparameters import check_whole
from lowrank_train.optim.arguments.surroundings import undisturbed
from lowrank_train.optim.arguments.torch_arguments import is_number
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.stepping import at_work, matrices, step_slots
from lowrank_train.optim.parameters.slot import Slot, stored_gradient
from lowrank_train.optim.parameters.wrappers import bare_model, bare_optimizer, is_replicated
from lowrank_train.optim.shards.collectives import sum_over_shards
from lowrank_train.optim.shards.layout import laid_out_as, local
from lowrank_train.optim.shards.placements import placed_as, reshard, work_copies

__all__ = ["BackwardUpdates", "attach_to_backward"]

_REPLICATED = (
    "the model is in DistributedDataParallel, which keeps all gradients in buckets until backward ends, so that ranks "
    "would use gradients of their own; expected a bare or fully_shard-ed model: with FSDP2 the update can be fused "
    "into backward"
)


def attach_to_backward(
    model: nn.Module,
    optimizer: MatrixOptimizer,
    *,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
    clip: Literal["global", "parameter"] = "global",
) -> BackwardUpdates:
    """Update parameters during ``loss.backward()``; call ``optimizer.step()`` and the scheduler as ever.

    Args:
        model: after ``fully_shard``, if it is to be sharded.
        optimizer: any of this package, built for this model; in the wrapper of Accelerate or Lightning, too.
        accumulation_steps: backward passes per ``step()``. A ``step()`` that comes earlier uses what there is.
        max_norm: clip gradients to this norm; None does not. ``clip_grad_norm_`` would come too late.
        clip: ``global``, the norm over all parameters; ``parameter``, each gradient by its own norm.

    Returns:
        A handle: ``handle.detach()`` ends it; ``handle.grad_norm`` is the norm of all gradients of the last ``step()``,
        before clipping, a collective there where parameters are sharded; ``handle.discard()`` forgets what several
        backward passes have summed so far.

    Raises:
        ValueError: for an optimizer of another package, parameters that are not the model's (sharded later?), a model
            in DistributedDataParallel, which keeps every gradient in its buckets, or in FSDP1 or DeepSpeed, wrong
            numbers, or global clipping of a method that needs more of a gradient than its coordinates.
    """
    return BackwardUpdates(model, bare_optimizer(optimizer), accumulation_steps, max_norm, clip)


class BackwardUpdates:
    """What ``attach_to_backward`` returns."""

    def __init__(
        self, model: nn.Module, optimizer: MatrixOptimizer, accumulation_steps: int, max_norm: float | None, clip: str
    ) -> None:
        _check(model, optimizer, accumulation_steps, max_norm, clip)
        self.grad_norm: Tensor | None = None
        self._model, self._checked = model, False
        self._optimizer, self._update_of = optimizer, optimizer.update_of
        self._accumulation_steps = accumulation_steps
        self._max_norm = max_norm
        self._waits_for_norm = max_norm is not None and clip == "global"
        self._passes: dict[Tensor, int] = {}
        self._coordinates: dict[Tensor, dict[int, Tensor]] = {}  # by parameter, then by its matrices
        self._squares: dict[Tensor, Tensor] = {}
        slots = [slot for slot in optimizer.slots() if slot.group["role"] != "frozen"]
        for slot in slots:
            if self._waits_for_norm and slot.group["role"] in optimizer.updates and not self._projects(slot):
                raise ValueError(
                    f"max_norm={max_norm} with clip='global' needs every gradient before the first update, and "
                    f"{type(optimizer).__name__} needs the whole gradient of {slot.name!r} for it; use "
                    "clip='parameter', residual='drop' where the method has one, or clip_grad_norm_ without "
                    "attach_to_backward"
                )
        self._slots = {slot.param: slot for slot in slots}
        self._hooks = [slot.param.register_post_accumulate_grad_hook(self._hook) for slot in slots]
        optimizer.in_backward = self

    def check_replaceable(self, replaced: Set[Tensor], changed: Set[Tensor]) -> None:
        """Raise RuntimeError for parameters that cannot be exchanged, or change, any more.

        The hooks are on those that were attached, and what was summed of a gradient has its parameter's old shape.
        """
        lost = [slot.name for param, slot in self._slots.items() if param in replaced]
        if lost:
            raise RuntimeError(
                f"{lost[0]!r} was replaced (sharded) after attach_to_backward, so its gradients were not used; shard "
                "the model first, then call attach_to_backward"
            )
        summed = [slot.name for param, slot in self._slots.items() if param in changed and param in self._passes]
        if summed:
            raise RuntimeError(
                f"{summed[0]!r} was resized, moved or converted after a backward pass whose gradient waits for step(); "
                "call discard() on the handle of attach_to_backward, and run backward() again"
            )

    def detach(self) -> None:
        """Return to gradients that wait for ``step()``."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer.in_backward = None

    def discard(self) -> None:
        """Forget the gradients of the passes since the last update, as ``zero_grad`` does."""
        for held in (self._passes, self._coordinates, self._squares):
            held.clear()
        for param in self._slots:
            param.grad = None

    def finish(self) -> None:
        """Make the updates that could not be made in backward, and compute the norm; ``optimizer.step()`` calls it."""
        if not self._checked and is_replicated(self._model):
            raise ValueError(_REPLICATED)
        self._checked = True
        waiting = [self._slots[param] for param in self._passes]
        if self._waits_for_norm:
            self._clip_all(waiting)
        for slot in waiting:
            self._update(slot)
        self._passes.clear()
        if not self._waits_for_norm:
            squares = [self._squares.get(param, _no_square(param)) for param in self._slots]
            self.grad_norm = _norm(list(self._slots.values()), squares)
            self._squares.clear()

    @torch.no_grad()
    @undisturbed()
    def _hook(self, param: Tensor) -> None:
        slot = self._slots[param]
        if self._optimizer.has_changed(param):
            self._optimizer.ensure_state()
        assert param.grad is not None
        placed = placed_as(param.grad, param, slot.name)
        if placed is not param.grad:
            param.grad = placed
        first = param not in self._passes
        self._passes[param] = self._passes.get(param, 0) + 1
        last = self._passes[param] == self._accumulation_steps
        if self._projects(slot) and (self._waits_for_norm or self._accumulation_steps > 1):
            self._squares[param] = _square_sum(slot.param, _own_gradient(slot))
            self._project(slot, first=first)
            param.grad = None
        if last and not self._waits_for_norm:
            self._update(slot)
            del self._passes[param]
        else:
            _keep_alone(param)

    def _project(self, slot: Slot, *, first: bool) -> None:
        """Add the coordinates of a gradient to those of the passes before; directions are chosen in the first."""
        found = {} if first else self._coordinates.get(slot.param, {})
        update = self._update_of(slot.group)
        with matrices(slot, self._update_of) as own:
            for i, matrix in enumerate(own):
                if first or i in found:
                    with at_work([matrix], self._update_of) as (copy,):
                        coordinates = update.project_gradient(copy, refresh=first)
                    if coordinates is not None:
                        found[i] = coordinates if first else found[i] + coordinates
        # A rank whose shard of a stack has no matrix, or none with directions, joins in the norm all the same.
        if found or update.takes_apart(slot.param, slot.group):
            self._coordinates[slot.param] = found

    def _projects(self, slot: Slot) -> bool:
        return self._update_of(slot.group).coordinates_suffice(slot)

    @torch.no_grad()
    def _update(self, slot: Slot) -> None:
        coordinates = self._coordinates.pop(slot.param, None)
        gradients = list(coordinates.values()) if coordinates is not None else _own_gradient(slot)
        if (coordinates is not None or gradients) and not self._waits_for_norm:
            square = _square_sum(slot.param, gradients)
            if coordinates is not None:
                square = square / work_copies(slot.param)
            self._squares[slot.param] = square
            if self._max_norm is not None:
                factor = _factor(_norm([slot], [square]), self._max_norm)
                for gradient in gradients:
                    gradient.mul_(factor)
        if coordinates is not None:
            with matrices(slot, self._update_of) as own:
                for i, of_matrix in coordinates.items():
                    with at_work([own[i]], self._update_of) as (copy,):
                        self._update_of(slot.group).step_coordinates(copy, of_matrix)
        elif slot.param.grad is not None:
            step_slots([slot], self._update_of)
            slot.param.grad = None

    @torch.no_grad()
    def _clip_all(self, slots: list[Slot]) -> None:
        squares = []
        for slot in slots:
            if slot.param in self._coordinates and self._accumulation_steps > 1:
                of_all = list(self._coordinates[slot.param].values())
                squares.append(_square_sum(slot.param, of_all) / work_copies(slot.param))
            elif slot.param in self._squares:
                squares.append(self._squares[slot.param])
            else:
                squares.append(_square_sum(slot.param, _own_gradient(slot)))
        self._squares.clear()
        if not slots:
            return
        assert self._max_norm is not None
        self.grad_norm = _norm(slots, squares)
        factor = _factor(self.grad_norm, self._max_norm)
        for slot in slots:
            if slot.param in self._coordinates:
                for coordinates in self._coordinates[slot.param].values():
                    coordinates.mul_(factor)
            elif slot.param.grad is not None:
                local(slot.param.grad).mul_(factor)


def _keep_alone(param: Tensor) -> None:
    """FSDP2 makes the gradients of a group in one piece of memory, which a norm's or a bias's would hold on to."""
    if param.grad is None:
        return
    gradient = local(param.grad)
    own = gradient.numel() * gradient.element_size()
    if 4 * own < gradient.untyped_storage().nbytes():
        param.grad = laid_out_as(param.grad, gradient.clone())


def _own_gradient(slot: Slot) -> list[Tensor]:
    """This rank's part of the gradient; nothing if there is none."""
    return [] if slot.grad is None else [local(stored_gradient(slot))]


def _square_sum(param: Tensor, tensors: list[Tensor]) -> Tensor:
    """Of all elements of tensors that stand for a gradient of ``param``."""
    # vector_norm makes no squares of its own to sum
    squares = [torch.linalg.vector_norm(tensor, dtype=_wide(tensor)).square() for tensor in tensors]
    return (
        sum(squares[1:], start=squares[0])
        if squares
        else torch.zeros((), dtype=_wide(param), device=local(param).device)
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _no_square(param: Tensor) -> Tensor:
    """Of a gradient that is missing here, and may be there on other ranks."""
    return _square_sum(param, [])


def _norm(slots: list[Slot], squares: list[Tensor]) -> Tensor:
    return torch.stack(sum_over_shards([slot.param for slot in slots], squares)).sum().sqrt()


def _factor(norm: Tensor, max_norm: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _check(model: nn.Module, optimizer: MatrixOptimizer, accumulation_steps: Any, max_norm: Any, clip: str) -> None:
    if not isinstance(optimizer, MatrixOptimizer):
        raise ValueError(
            f"attach_to_backward got a {type(optimizer).__name__}; expected an optimizer of this package, "
            "e.g. optim.create('dct_adamw', model, lr=...)"
        )
    bare_model(model)
    if is_replicated(model):
        raise ValueError(_REPLICATED)
    check_whole({"accumulation_steps": accumulation_steps}, "accumulation_steps", 1)
    if max_norm is not None and (not is_number(max_norm) or max_norm <= 0):
        raise ValueError(f"max_norm={max_norm!r}; expected a number > 0, or None")
    if clip not in ("global", "parameter"):
        raise ValueError(f"clip={clip!r}; expected 'global' or 'parameter'")
    if optimizer.in_backward is not None:
        raise ValueError("the optimizer is attached to a backward pass already; detach() that handle first")
    reshard(model)  # after an evaluation FSDP2 shows whole parameters, whose gradients are not reduced
    optimizer.ensure_state()
    own = set(model.parameters())
    for slot in optimizer.slots():
        if slot.param not in own:
            raise ValueError(
                f"{slot.name!r} of the optimizer is no parameter of the model; shard the model first, then build the "
                "optimizer, then attach it"
            )
