"""The model's parameters as they are now, where something changed them after the optimizer was built.

    replaced    ``fully_shard``, ``to_empty``, ``load_state_dict(assign=True)`` or a new layer put another tensor under
                the parameter's name: the optimizer takes that one
    changed     ``model.to(...)`` or ``resize_token_embeddings`` kept the parameter and exchanged its data: its state
                was allocated for another shape, dtype or device

``optim.param_groups`` remembers the models it was given; an optimizer looks its parameters up in them once, when it is
built. Only modules are remembered, and weakly. Tensors must not be: ``torch.utils.swap_tensors``, by which ``to_empty``
moves a sharded parameter, refuses one with weak references.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lowrank_train.optim.arguments.caller import warn_at_the_caller
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.parameters.watch import LeftOut, Steps, Watch
from lowrank_train.optim.parameters.wrappers import WRAPPERS, plain_name
from lowrank_train.optim.shards.layout import is_distributed, local
from lowrank_train.optim.shards.placements import layout_key, reshard

__all__ = ["PresentParameters", "check_gradients", "is_updated", "remember", "updated_too_early"]

_models: list[weakref.ref[nn.Module]] = []
_followers: weakref.WeakSet[PresentParameters] = weakref.WeakSet()


def remember(model: nn.Module) -> None:
    """Let optimizers find the parameters of a model in it."""
    _models[:] = [known for known in _models if known() is not None and known() is not model]
    _models.append(weakref.ref(model))


class _Place(NamedTuple):
    """Where a parameter was found: by its path from the model, and in the module that owned it."""

    model: weakref.ref[nn.Module]
    owner: weakref.ref[nn.Module]
    path: tuple[str, ...]
    key: str

    def parameter(self) -> Tensor | None:
        """Return what lies there now, if anything does."""
        _, owner = self.steps()
        return None if owner is None else owner._parameters.get(self.key)

    def steps(self) -> tuple[Steps, nn.Module | None]:
        """Return the way from the model to the module that owns the parameter now, and that module."""
        steps: Steps = []
        module = self.model()
        parts = list(self.path)
        while module is not None and (parts or self.key not in module._parameters):
            part = parts.pop(0) if parts and parts[0] in module._modules else _wrapper(module)
            child = None if part is None else module._modules[part]
            if part is not None and child is not None:
                steps.append((module, part, child))
            module = child
        if module is None or module._parameters[self.key] is None:
            return [], self.owner()
        return steps, module


class PresentParameters:
    """Follow the parameters of one optimizer."""

    def __init__(self) -> None:
        _followers.add(self)
        self._watch, self._left_out = Watch(), LeftOut()
        self._places: dict[Tensor, tuple[_Place, ...]] = {}
        self._allocated_for: dict[Tensor, tuple[object, ...]] = {}

    # -------------------------------------------------------------------------------------------------------- replaced

    def learn(self, params: Iterable[Tensor]) -> None:
        """Find the parameters among the remembered models; what is not found there has no place."""
        wanted = {param for param in params if param not in self._places}
        if not wanted:
            return
        self._watch.forget()
        found: dict[Tensor, list[_Place]] = {param: [] for param in wanted}
        for known in reversed(_models):
            model = known()
            if model is None or not wanted:
                continue
            before = len(wanted)
            for name, module in model.named_modules(remove_duplicate=False):
                for key, param in module._parameters.items():
                    if param is not None and param in wanted:
                        path = tuple(name.split(".")) if name else ()
                        found[param].append(_Place(known, weakref.ref(module), path, key))
            wanted = {param for param in wanted if not found[param]}
            if len(wanted) < before:
                self._left_out.offer({name: param for name, _, _, param in _parameters(model)})
        self._places.update({param: tuple(places) for param, places in found.items()})

    def replacements(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Return old parameter -> the one that has its place in the model now, where that is another."""
        self.learn(params)
        replaced = self._elsewhere(params)
        if any(not is_distributed(new) for new in replaced.values()):
            for model in self._living_models(replaced):
                reshard(model)  # after an evaluation FSDP2 shows whole parameters, which it frees again
            replaced = self._elsewhere(params)
        return replaced

    def accept(self, replaced: Mapping[Tensor, Tensor], params: Iterable[Tensor]) -> None:
        """Follow the new parameters from now on, and only ``params``: the memory of others could not be freed."""
        self._watch.forget()
        for old, new in replaced.items():
            self._places[new] = self._places.pop(old)
        kept = set(params)
        self._places = {param: places for param, places in self._places.items() if param in kept}
        self._allocated_for = {param: key for param, key in self._allocated_for.items() if param in kept}

    def _elsewhere(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        own, replaced = set(params), {}
        for param in params:
            present = [place.parameter() for place in self._places[param]]
            if not present or any(other is param for other in present):
                continue
            new = next((other for other in present if other is not None), None)
            # a whole tensor in the place of a sharded one is FSDP2's, gathered; another one of ours: the two were tied
            gathered = new is not None and is_distributed(param) and not is_distributed(new)
            if new is None or gathered or new in own or new.requires_grad != param.requires_grad:
                continue
            replaced[param] = new
        return replaced

    def _living_models(self, params: Iterable[Tensor]) -> list[nn.Module]:
        models: dict[int, nn.Module] = {}
        for param in params:
            for place in self._places.get(param, ()):
                model = place.model()
                if model is not None:
                    models[id(model)] = model
        return list(models.values())

    # ------------------------------------------------------------------------------------------------------ undisturbed

    def is_undisturbed(self, params: Sequence[Tensor]) -> bool:
        """Return whether all is as it was at the last ``note``; False may also mean that it is not known."""
        return self._watch.is_undisturbed(params)

    def note(self, params: Sequence[Tensor]) -> None:
        """Remember that these parameters are the model's, and have the state that fits them."""
        found, names, are_held = [], set(), True
        for param in params:
            held = None
            for place in self._places.get(param, ()):
                names.add(plain_name(".".join((*place.path, place.key))))
                steps, owner = place.steps()
                if owner is not None and owner._parameters.get(place.key) is param:
                    held = held or (steps, owner, place.key, param)
                else:
                    are_held = are_held and owner is None
            if held is not None:
                found.append(held)
        self._left_out.find(map(_parameters, self._living_models(params)), params, names)
        if are_held:  # what is not in its place is looked for at every step
            self._watch.note(params, [self._allocated_for.setdefault(p, layout_key(p)) for p in params], found)

    def left_out(self) -> list[str]:
        """Return names of parameters that take gradients and that no optimizer of this package has, each once."""
        found = self._left_out.with_gradients()
        return [name for name, param in found.items() if not any(param in other._places for other in _followers)]

    # --------------------------------------------------------------------------------------------------------- changed

    def allocated(self, param: Tensor) -> None:
        """Note that state was allocated for the parameter as it is now."""
        self._allocated_for[param] = layout_key(param)

    def change(self, param: Tensor) -> str | None:
        """Return how a parameter differs from the one its state was allocated for, None if it does not.

        A parameter that was never noted (of a copied or unpickled optimizer) is taken as it is.
        """
        now = layout_key(param)
        before = self._allocated_for.setdefault(param, now)
        if now == before:
            return None
        names = ("shape", "dtype", "device", "placements")
        return ", ".join(f"{name} {a} (was {b})" for name, a, b in zip(names, now, before, strict=True) if a != b)

    # ------------------------------------------------------------------------------------------------------------ lost

    def lost(self, params: Sequence[Tensor]) -> bool:
        """Return whether nothing of these parameters takes a gradient because the model has others by now.

        True only if no parameter has a gradient, no module holds one of them, and parameters of the same shapes
        elsewhere have gradients. All living modules are searched for that, until one is found that holds a parameter.
        """
        if any(param.grad is not None or self._is_held(param) for param in params):
            return False
        if not params or not all(isinstance(param, nn.Parameter) for param in params):
            return False  # bare tensors never were in a module
        own, shapes = set(params), set()
        for module in _living_modules():
            for key, other in module._parameters.items():
                if other is not None and other in own:
                    reference = weakref.ref(module)
                    self._places[other] = (_Place(reference, reference, (), key),)
                    return False
                if other is not None and other.grad is not None:
                    shapes.add(tuple(other.shape))
        return {tuple(param.shape) for param in params if param.requires_grad} <= shapes

    def _is_held(self, param: Tensor) -> bool:
        return any(place.parameter() is param for place in self._places.get(param, ()))


def _wrapper(module: nn.Module) -> str | None:
    """Return what torch.compile or activation checkpointing calls the module that it is put around."""
    return next((part for part in WRAPPERS if part in module._modules), None)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter: its full name without wrappers, the module that owns it, its name there."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, param in module._parameters.items():
            if param is not None:
                yield plain_name(f"{path}.{key}" if path else key), module, key, param


def _living_modules() -> Iterator[nn.Module]:
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module) and "_parameters" in each.__dict__:
            yield each


def updated_too_early(name: str | None, change: str | None) -> str:
    """Return the error for a parameter that was replaced, or changed, after it had been updated."""
    if change is None:
        which = "" if name is None else f" ({name!r} first)"
        return (
            f"the parameters of this optimizer{which} were replaced after it had made updates, so its state belongs to "
            "tensors that no longer exist; shard the model first, or before the first step()"
        )
    return (
        f"{name!r} has another {change} than when its state was allocated, and it has been updated since; resize, move "
        "or convert the model before the first step(), or build a new optimizer"
    )


def check_gradients(slots: Sequence[Slot], present: PresentParameters, *, are_kept: bool) -> None:
    """Raise RuntimeError for a gradient that does not fit its parameter, or if all of them are elsewhere.

    ``are_kept``: whether gradients wait for ``step``; updates inside backward free them.
    """
    has_gradients = False
    for slot in slots:
        param, gradient = slot.param, slot.param.grad
        if gradient is None:
            continue
        has_gradients = True
        if gradient.shape != param.shape or gradient.device != param.device:
            raise RuntimeError(
                f"the gradient of {slot.name!r} has shape {tuple(gradient.shape)} on {gradient.device}, the parameter "
                f"{tuple(param.shape)} on {param.device}: it was resized or moved after backward(); call "
                "zero_grad() and run backward() again"
            )
    left_out = present.left_out()
    if left_out:
        _tell_of(left_out, is_lost=are_kept and not has_gradients and not any(is_updated(s.state) for s in slots))
    if not has_gradients and present.lost([slot.param for slot in slots]):
        raise RuntimeError(
            f"no parameter of this optimizer has a gradient ({slots[0].name!r}, ...) and no module holds one of them, "
            "while a model with parameters of the same shapes has gradients: fully_shard, to_empty or another call "
            "replaced them after the optimizer was built. Build the optimizer after that call, or pass it "
            "optim.param_groups(model), by which step() finds the new ones"
        )


def is_updated(state: Mapping[str, Tensor]) -> bool:
    """Return whether a parameter with this state has been updated; a read of the device."""
    return "step" in state and not state["step"].is_meta and bool((local(state["step"]) > 0).any())


def _tell_of(left_out: Sequence[str], *, is_lost: bool) -> None:
    """Warn of parameters that nothing updates; raise RuntimeError if nothing is updated at all."""
    others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    told = (
        f"{left_out[0]!r}{others} of the model have gradients, and this optimizer does not update them: they were "
        "frozen, tied or not there when it was built"
    )
    if is_lost:
        raise RuntimeError(
            f"{told}. No parameter that it does update has a gradient; build the optimizer when the model is complete"
        )
    warn_at_the_caller(
        f"{told}; call optimizer.add_param_group for them, or build it when the model is complete and unfrozen"
    )
