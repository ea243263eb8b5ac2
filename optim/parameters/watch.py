"""What a step asks of a model every time: whether it is as it was, and whether something trains that nobody updates.

Both are answered from lists made once, because a search by names would cost a small model a twentieth of its step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

__all__ = ["LeftOut", "Steps", "Watch"]

Steps = list[tuple[nn.Module, str, nn.Module]]
"""From a model down to the owner of a parameter: module, name of its child, child."""


class Watch:
    """The modules and parameters of an optimizer as they were found, to be compared with what they are."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._layouts: list[tuple[object, ...]] = []
        self._edges: list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = []
        self._leaves: list[tuple[weakref.ref[nn.Module], str, Tensor]] = []

    def forget(self) -> None:
        """Let the next comparison fail."""
        self._params, self._layouts, self._edges, self._leaves = [], [], [], []

    def note(
        self,
        params: Sequence[Tensor],
        layouts: Sequence[tuple[object, ...]],
        found: Iterable[tuple[Steps, nn.Module, str, Tensor]],
    ) -> None:
        """Remember what is to be compared.

        Args:
            params: of the optimizer, in its order.
            layouts: of each, shape, dtype, device and placements.
            found: those that lie in modules: the steps to the owner, the owner, the name there, the parameter.
        """
        edges: dict[tuple[int, str], tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = {}
        self._leaves = []
        for steps, owner, key, param in found:
            for module, name, child in steps:
                edges.setdefault((id(module), name), (weakref.ref(module), name, weakref.ref(child)))
            self._leaves.append((weakref.ref(owner), key, param))
        self._edges = list(edges.values())
        self._params, self._layouts = list(params), list(layouts)

    def is_undisturbed(self, params: Sequence[Tensor]) -> bool:
        """Return whether nothing was replaced and nothing changed its shape, dtype, device or placements."""
        if not params or len(params) != len(self._params):
            return False
        for param, known, (shape, dtype, device, placements) in zip(params, self._params, self._layouts, strict=True):
            if param is not known or param.dtype is not dtype or param.shape != shape or param.device != device:
                return False
            if placements is not None and getattr(param, "placements", None) != placements:
                return False
        for module, name, child in self._edges:
            parent = module()
            if parent is None or parent._modules.get(name) is not child():
                return False
        for module, name, param in self._leaves:
            owner = module()
            if owner is None or owner._parameters.get(name) is not param:
                return False
        return True


class LeftOut:
    """Parameters of the optimizer's models that were frozen, or not there, when it was built."""

    def __init__(self) -> None:
        self._offered: set[str] = set()
        self._told: set[str] = set()
        self._idle: list[tuple[weakref.ref[nn.Module], str, str]] = []

    def offer(self, named: Mapping[str, Tensor]) -> None:
        """Note which parameters of a model could be trained when the optimizer was built; it has them by choice."""
        self._offered.update(name for name, param in named.items() if param.requires_grad)

    def find(
        self, models: Iterable[Iterable[tuple[str, nn.Module, str, Tensor]]], own: Iterable[Tensor], names: set[str]
    ) -> None:
        """List what the optimizer does not update, though nobody chose that when it was built.

        Args:
            models: of each, every parameter: its full name, its owner, its key there.
            own: what the optimizer updates.
            names: where that was found; what lies there now, and is not of ``own``, was tied to it.
        """
        known, self._idle = set(own), []
        for parameters in models:
            for name, owner, key, param in parameters:
                if param not in known and (name not in self._offered or name in names) and name not in self._told:
                    known.add(param)
                    self._idle.append((weakref.ref(owner), key, name))

    def with_gradients(self) -> dict[str, Tensor]:
        """Return those that have a gradient now, by name; each is told of once."""
        found: dict[str, Tensor] = {}
        for module, key, name in self._idle:
            owner = module()
            param = None if owner is None else owner._parameters.get(key)
            if param is not None and param.grad is not None and param.requires_grad:
                found[name] = param
        if found:
            self._told.update(found)
            self._idle = [idle for idle in self._idle if idle[2] not in found]
        return found
