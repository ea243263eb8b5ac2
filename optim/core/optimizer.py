"""The frame every optimizer of this package shares.

One object holds all parameters of a model. Each role of parameters has an ``Update`` (``optim.core.update``): those of
the method, and for all other roles AdamW, Riemannian Adam of points, or none for what is frozen. A subclass supplies
the updates of its method and a constructor. It never overrides ``step``.

State is allocated when a parameter group is added, not at the first step: checkpoint code that finds an optimizer
without state calls ``step()`` on zero gradients to make some, and every rank must hold the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_finite
from lowrank_train.optim.arguments.surroundings import eagerly, undisturbed
from lowrank_train.optim.arguments.torch_arguments import FLAGS, accepting_flags, check_flags, make_plain
from lowrank_train.optim.core import coverage
from lowrank_train.optim.core.common_updates import ADAMW, FROZEN, POINTS, update_for
from lowrank_train.optim.core.published import Published, introduce
from lowrank_train.optim.core.state_dict import load
from lowrank_train.optim.core.stepping import parts, step_slots
from lowrank_train.optim.core.update import Update
from lowrank_train.optim.manifolds import points
from lowrank_train.optim.parameters.group_checks import (
    LAYERS,
    SHARED_SETTINGS,
    check_group,
    check_not_flattened,
    named_parameters,
)
from lowrank_train.optim.parameters.present import PresentParameters, check_gradients, is_updated, updated_too_early
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.layout import StateTensor, allocate, first_column, is_distributed, local
from lowrank_train.optim.shards.placements import check_even, check_not_scattered, in_work_layout

__all__ = ["FusedUpdates", "MatrixOptimizer"]


class FusedUpdates(Protocol):
    """Updates fused into backward (``optim.core.backward``), as an optimizer sees them."""

    def finish(self) -> None:
        """Make the updates that could not be made in backward."""

    def check_replaceable(self, replaced: Set[Tensor], changed: Set[Tensor]) -> None:
        """Raise RuntimeError for parameters that cannot be exchanged, or change, any more."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Abstract: updates each parameter by the ``Update`` of its role.

    Every parameter group carries a ``role`` (one of ``ROLES``), as ``optim.param_groups(model)`` makes them, and its
    own copy of each hyperparameter. Hyperparameters ``lr``, ``betas``, ``eps``, ``weight_decay`` mean the same in every
    group; weight decay is decoupled and applied first.
    """

    name: ClassVar[str]  # of the file that defines the class, unless the class has another
    published: ClassVar[Published]

    updates: ClassVar[Mapping[str, Update]] = {}
    """Role -> the update of the method; parameters of all other roles get ``optim.core.common_updates``."""

    needs_roles: ClassVar[bool]
    """Whether the method has an update besides AdamW, so that plain ``model.parameters()`` would not be enough."""

    layers: ClassVar[str | None]
    """What it trains in place of matrices, by the package that converts them (``spectral``); None: matrices."""

    works_between_steps: ClassVar[bool]
    """Whether it reads its state between steps too, which may then be neither offloaded nor converted."""

    maximize = False
    """Whether new groups maximise, unless they say otherwise."""

    in_backward: FusedUpdates | None = None  # of the class, because torch's copies and pickles drop attributes
    _present_parameters: PresentParameters | None = None

    _unlisted: Mapping[str, Any] = {}
    """Defaults of every group that ``defaults`` does not name."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.needs_roles = any(update not in (ADAMW, POINTS, FROZEN) for update in cls.updates.values())
        cls.works_between_steps = any(update.works_between_steps for update in cls.updates.values())
        cls.layers = next((LAYERS[role] for role in cls.updates if role in LAYERS), None)
        introduce(cls, needs_roles=cls.needs_roles)
        if "__init__" in vars(cls):
            cls.__init__ = accepting_flags(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        role = None if self.needs_roles else "vector"
        everywhere = {"role": role, "weight_layout": "out,in", "maximize": self.maximize, **SHARED_SETTINGS}
        # Schedulers that cycle momentum write ``betas`` where ``defaults`` has them, and ``momentum`` only if not.
        self._unlisted = {key: defaults[key] for key in ("betas",) if "momentum" in defaults}
        listed = {key: value for key, value in defaults.items() if key not in self._unlisted}
        self._owners: dict[str, str] = {}
        super().__init__(params, {**everywhere, **listed})
        if self.needs_roles:
            coverage.warn(type(self).__name__, list(self.slots()), self.update_of, self.layers, self._owners)
        del self._owners

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which leaves out what it does not know."""
        return {**super().__getstate__(), "_unlisted": self._unlisted}

    def __repr__(self) -> str:
        """What each role gets, then torch's list of settings."""
        first, rest = super().__repr__().split("\n", 1)
        return f"{first}\n{coverage.summary(list(self.slots()), self.told, self.update_of)}\n{rest}"

    @classmethod
    def update_of(cls, group: Mapping[str, Any]) -> Update:
        """Return the update of the parameters of a group."""
        return cls.updates.get(group["role"]) or update_for(group["role"])

    def told(self, slot: Slot) -> str:
        """Return what updates a parameter, in words."""
        return self.update_of(slot.group).words or type(self).__name__

    @classmethod
    def shard_dim(cls, role: str, shape: Sequence[int], world_size: int) -> int:
        """Return the dimension to shard a parameter along for the least communication; advice, never required."""
        return cls.update_of({"role": role}).shard_dim(shape, world_size)

    # ---------------------------------------------------------------------------------------------------------- step

    @eagerly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the loss of the closure, if any.

        The parameters are the model's at this time: those that ``fully_shard``, ``to_empty`` or a new layer put in the
        place of others are found by their names, and where the model was moved, converted or resized state is allocated
        anew.

        Raises RuntimeError if that happened to a parameter after it had been updated, if a gradient has not its
        parameter's shape and device, and if no parameter has a gradient because the model has others by now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with undisturbed():
            self._follow_model()
            slots = list(self.slots())
            check_gradients(slots, self._present, are_kept=self.in_backward is None)
            if self.in_backward is not None:
                self.in_backward.finish()
            else:
                step_slots(slots, self.update_of)
            self.end_step()
        return loss

    def end_step(self) -> None:
        """Do what a method does now and then to the model as a whole; called when every parameter has been updated."""

    def end_bytes(self, world_size: int) -> int:
        """Return what ``end_step`` needs now and then, with parameters sharded over so many ranks."""
        return 0

    def figures(self) -> dict[str, float]:
        """Return numbers worth a curve while training, by name; only what is on the host, without communication."""
        return {}

    # --------------------------------------------------------------------------------------------------------- state

    def _check_storage(self, group: dict[str, Any]) -> None:
        is_converted = self.update_of(group).takes == "float32" and group["state_dtype"] is not None
        for key in ["offload_state"] * group["offload_state"] + ["state_dtype"] * is_converted:
            if self.works_between_steps:
                raise ValueError(
                    f"{key}={group[key]!r} for parameters with role {group['role']!r}, but {type(self).__name__} works "
                    "on their state between steps too; leave it as it is, or take another optimizer"
                )

    @undisturbed()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and allocate its state; raises ValueError for hyperparameters that do not fit."""
        owners = param_group.pop("modules", ()) if isinstance(param_group, dict) else ()
        completed = points.completed(make_plain(param_group), self.defaults, len(self.param_groups))
        for key, value in self._unlisted.items():
            completed.setdefault(key, value)
        super().add_param_group(completed)
        group = self.param_groups[-1]
        for key, value in self.defaults.items():
            if isinstance(value, Tensor) and group[key] is value:
                group[key] = value.clone()  # a scheduler that writes one group must not write all
        try:
            check_group(group, len(self.param_groups) - 1)
            own = {*self.defaults, *({"amsgrad"} if group["role"] == "points" else ())} - {"maximize"}
            flags = {key: group[key] for key in FLAGS if key in group and key not in own}
            check_flags(flags, f"parameter group {len(self.param_groups) - 1}")
            self._check_storage(group)
            self._present.learn(group["params"])
            for name, param in named_parameters(group):
                self._allocate(name, param, group)
            check_finite(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise
        if hasattr(self, "_owners"):
            self._owners.update(zip(group.get("param_names", ()), owners, strict=False))

    def state_layout(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return the state tensors of one parameter, by global shape."""
        return self.update_of(group).layout(name, param, group)

    def _allocate(self, name: str, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]  # the same object as before: updates fused into backward hold it
        state.clear()
        if self.works_between_steps and group["role"] in {*self.updates, "frozen"}:
            check_not_scattered(name, param, type(self).__name__)
        as_sharded = param
        if self.update_of(group).is_gathered(Slot(name, param, state, group)):
            check_even(name, param)
            as_sharded = in_work_layout(param, param, values=False)
        layout = self.state_layout(name, param, group)
        on_host = group["offload_state"]
        state.update({key: allocate(spec, as_sharded, on_host=on_host) for key, spec in layout.items()})
        self._present.allocated(param)
        for part in parts(Slot(name, as_sharded, {}, group), self.update_of)[:1]:
            if first_column(part.param) is not None and local(part.param).shape[1] % 2:
                width = part.param.shape[1]
                packed = [key for key, spec in layout.items() if spec.layout == "parameter" and spec.shape[-1] != width]
                if packed:
                    raise ValueError(
                        f"state_dtype='4bit' keeps two columns of {packed[0]!r} in a byte, and {name!r}, of shape "
                        f"{tuple(param.shape)}, is sharded into {local(part.param).shape[1]} columns a rank: shard it "
                        "along another dimension, or use '8bit'"
                    )

    def slots(self) -> Iterator[Slot]:
        """Return all parameters with their state, group by group."""
        unnamed = 0
        for group in self.param_groups:
            for name, param in named_parameters(group, unnamed):
                yield Slot(name, param, self.state.get(param, {}), group)  # indexing would make an entry
            unnamed += len(group["params"])

    @property
    def _present(self) -> PresentParameters:
        if self._present_parameters is None:
            self._present_parameters = PresentParameters()
        return self._present_parameters

    def _follow_model(self, *, if_updated: Literal["refuse", "leave"] = "refuse") -> None:
        """Take the model's present parameters (``optim.parameters.present``); allocate state that does not fit anew.

        ``if_updated``: what to do where these parameters have been updated already; "refuse" raises RuntimeError.
        """
        present = self._present
        params = [param for group in self.param_groups for param in group["params"]]
        if len(self.state) == len(params) and present.is_undisturbed(params):
            return
        slots = list(self.slots())
        replaced = present.replacements(params)
        orphans = self.state.keys() - set(params)
        changed = {slot.param: change for slot in slots if slot.state and (change := present.change(slot.param))}
        if not replaced and not orphans and not changed and all(param in self.state for param in params):
            present.note(params)
            return
        updated = [param for param in (*changed, *replaced, *orphans) if is_updated(self.state[param])]
        if updated and if_updated == "leave" and orphans.isdisjoint(updated):
            return
        if updated:
            name = next((slot.name for slot in slots if slot.param is updated[0]), None)
            raise RuntimeError(updated_too_early(name, changed.get(updated[0])))
        if self.in_backward is not None:
            self.in_backward.check_replaceable(replaced.keys() | orphans, changed.keys())
        for group in self.param_groups:
            group["params"][:] = [replaced.get(param, param) for param in group["params"]]
        for param in [*orphans, *replaced]:
            self.state.pop(param, None)
        present.accept(replaced, [param for group in self.param_groups for param in group["params"]])
        anew = [slot for slot in self.slots() if slot.param not in self.state or slot.param in changed]
        for name, param, _, group, *_ in anew:
            check_not_flattened(name, param, group)
            self._allocate(name, param, group)
        self.state_allocated([slot for slot in self.slots() if any(slot.param is new.param for new in anew)])
        present.note([param for group in self.param_groups for param in group["params"]])

    def has_changed(self, param: Tensor) -> bool:
        """Return whether shape, dtype, device or placement of a parameter changed since its state was allocated."""
        return self._present.change(param) is not None

    def state_allocated(self, slots: list[Slot]) -> None:
        """Take note that state was allocated for parameters that a group had before."""

    def defer_state(self) -> None:
        """Free the state, before any update, until ``step()`` needs it or the parameters are sharded.

        For frameworks that build the optimizer first and shard the model then: every rank would hold the state whole
        for that time, and Accelerate copies what it finds to the device. Until then ``state_dict()`` has none.
        """
        self.state.clear()

    @undisturbed()
    def ensure_state(self) -> None:
        """Allocate what is missing or no longer fits, after ``defer_state`` and for parameters that were replaced.

        Raises RuntimeError as ``step`` does.
        """
        self._follow_model()

    @eagerly
    @undisturbed()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch's optimizer does, for the model's present parameters, see ``step``."""
        if self.state:  # deferred state stays deferred
            self._follow_model(if_updated="leave")
        super().zero_grad(set_to_none)

    @undisturbed()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict. Raises RuntimeError if a framework replaced parameters that had been updated."""
        if self.state or any(is_distributed(slot.param) for slot in self.slots()):
            # torch looks every key of the state up among the parameters of the groups
            self._follow_model(if_updated="leave")
            self._wait_for_offloaded()
        for group in self.param_groups:
            make_plain(group)  # a scheduler may have written scalars of numpy
        return super().state_dict()

    def _wait_for_offloaded(self) -> None:
        """State on its way to host memory arrives there; what reads it next may be no stream of the device."""
        if torch.cuda.is_available() and any(group["offload_state"] for group in self.param_groups):
            torch.cuda.synchronize()

    @eagerly
    @undisturbed()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` by the names of parameters (``optim.core.state_dict``); without, by position.

        Settings that it does not name keep their present values. Raises ValueError, before anything is changed, for
        other parameters or shapes, and for state of another rank, basis or method.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if self.state or state_dict["state"]:
            self._follow_model()
            self._wait_for_offloaded()
        load(list(self.slots()), self.param_groups, self.update_of, state_dict, kept=tuple(SHARED_SETTINGS))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
