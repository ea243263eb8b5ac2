"""Loading a state dict: parameters are matched by name, and nothing changes unless everything fits.

torch's own loading matches by position, casts every tensor but ``step`` to the parameter's dtype, and replaces whole
groups. Here each tensor keeps the dtype, shape and placement that the optimizer allocated, and a setting that the
checkpoint does not name keeps its present value.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.core.update import UpdateOf
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.parameters.wrappers import plain_name
from lowrank_train.optim.shards.layout import copy_into

__all__ = ["load", "matched"]

_OURS = frozenset({"params", "param_names", "role", "weight_layout"})
"""Keys of a group that describe the present model, whatever the checkpoint says."""

_TORCH_ONLY = frozenset({"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"})
"""Keys of torch's own groups that choose an implementation; they mean nothing here."""

Saved = dict[str, Tensor]


def load(
    slots: Sequence[Slot],
    groups: Sequence[dict[str, Any]],
    update_of: UpdateOf,
    state_dict: Mapping[str, Any],
    *,
    kept: Sequence[str],
) -> None:
    """Load a state dict into an optimizer whose state is allocated, or hyperparameters alone where there is no state.

    Args:
        slots: all parameters of the optimizer, with their state.
        groups: its parameter groups.
        update_of: what updates the parameters of a group.
        state_dict: what ``state_dict()`` returned, of this package or of ``torch.optim.AdamW``.
        kept: settings of a group that keep their present values.

    Raises:
        ValueError: for names, shapes, state or structural settings that differ.
    """
    saved_groups = state_dict["param_groups"]
    saved_ids, sources = matched(groups, saved_groups)
    retired = {key: value for group in groups for key, value in update_of(group).retired_settings.items()}
    settings = [
        _settings(group, [saved_groups[i] for i in source], (*kept, *retired))
        for group, source in zip(groups, sources, strict=True)
    ]
    _check_retired(retired, saved_groups)
    if state_dict["state"]:
        saved = [_as_tensors(state_dict["state"].get(i, {}), slot) for i, slot in zip(saved_ids, slots, strict=True)]
        objection = next(
            (
                told
                for group, source in zip(groups, sources, strict=True)
                for i in source
                if (told := update_of(group).objection(group, saved_groups[i])) is not None
            ),
            None,
        )
        for slot, state in zip(slots, saved, strict=True):
            _check_state(slot, state)
        if objection is not None:
            raise ValueError(objection)
        for slot, state in zip(slots, saved, strict=True):
            for key, value in state.items():
                copy_into(slot.state[key], value)
            if not state and slot.param.requires_grad:  # torch allocates at the first gradient
                for value in slot.state.values():
                    value.zero_()
    for group, loaded in zip(groups, settings, strict=True):
        group.update(loaded)  # the same objects: updates fused into backward hold them


# ------------------------------------------------------------------------------------------------------------ matching


def matched(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], list[list[int]]]:
    """Return the saved identifier of every parameter, and the saved groups that each group draws from."""
    ids = [i for group in saved_groups for i in group["params"]]
    owner = {i: index for index, group in enumerate(saved_groups) for i in group["params"]}
    names, saved_names = _names(groups), _names(saved_groups)
    if all(isinstance(i, str) for i in ids) and ids:
        # torch.distributed.checkpoint names them so, and has put them in this optimizer's order already
        saved_names = ids if names is not None and set(ids) == set(names) else None
    if names is None or saved_names is None:
        _check_sizes(groups, saved_groups)
        return ids, [[index] for index in range(len(groups))]
    if names != saved_names:
        _check_names(names, saved_names)
        by_name = dict(zip(saved_names, ids, strict=True))
        ids = [by_name[name] for name in names]
    sources, start = [], 0
    for group in groups:
        end = start + len(group["params"])
        sources.append(sorted({owner[i] for i in ids[start:end]}))
        start = end
    return ids, sources


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Names of all parameters without what wrappers put around them; None where there are none."""
    if not all("param_names" in group for group in groups):
        return None
    names = [plain_name(name) for group in groups for name in group["param_names"]]
    if all(name.startswith("module.") for name in names):  # DistributedDataParallel
        names = [name.removeprefix("module.") for name in names]
    return names


def _check_sizes(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has {len(saved_sizes)} parameter groups of {saved_sizes} parameters, and this optimizer "
            f"{len(sizes)} of {sizes}; without names on both sides parameters are matched by position: build it with "
            "the same groups, or save names by building both from named_parameters() or optim.param_groups(model)"
        )


def _check_names(names: Sequence[str], saved_names: Sequence[str]) -> None:
    missing, unexpected = (
        [name for name in a if name not in set(b)] for a, b in ((names, saved_names), (saved_names, names))
    )
    if missing or unexpected:
        told = [
            f"{verb} {len(found)}, such as {found[0]!r}"
            for verb, found in (("lacks", missing), ("has besides", unexpected))
            if found
        ]
        raise ValueError(
            f"the checkpoint holds {len(saved_names)} parameters and this optimizer has {len(names)} in its parameter "
            f"groups; by name the checkpoint {' and '.join(told)}: load it into an optimizer of the same model"
        )
    if len(set(names)) < len(names) or len(saved_names) != len(names):
        twice = next(name for name in (*names, *saved_names) if names.count(name) != 1 or saved_names.count(name) != 1)
        raise ValueError(
            f"the name {twice!r} stands for several parameters, and the checkpoint has them in another order than the "
            "parameter groups of this optimizer; give every parameter its own name"
        )


# ------------------------------------------------------------------------------------------------------------ settings


def _settings(group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]], kept: Sequence[str]) -> dict[str, Any]:
    """Return what a group takes over from the groups of the checkpoint that its parameters were in."""
    ignored = {*_OURS, *_TORCH_ONLY, *kept}
    found = [{key: value for key, value in each.items() if key not in ignored} for each in saved]
    for each in found[1:]:
        for key in group.keys() & (each.keys() | found[0].keys()):
            if not _same(each.get(key), found[0].get(key)):
                raise ValueError(
                    f"one parameter group of this optimizer holds parameters which the checkpoint has with "
                    f"{key}={found[0].get(key)!r} and with {key}={each.get(key)!r}; build it with the same groups"
                )
    for written in saved:
        if not written.get("decoupled_weight_decay", True) and written.get("weight_decay"):
            raise ValueError(
                f"the checkpoint was written by torch's Adam with weight_decay={written['weight_decay']!r}, which "
                "it adds to the gradient; here weight decay is decoupled (AdamW), so training would not continue"
            )
    return copy.deepcopy(found[0]) if found else {}


def _check_retired(retired: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a checkpoint was written with an option that no longer exists."""
    for key, present in retired.items():
        for saved in saved_groups:
            if saved.get(key, present) != present:
                raise ValueError(
                    f"the checkpoint was written with {key}={saved[key]!r}, an option that no longer exists; only "
                    f"{key}={present!r} continues: start a new run from the weights, or finish this one with the "
                    "version that wrote it"
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is not None and b is not None and bool(torch.as_tensor(a).equal(torch.as_tensor(b)))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


# --------------------------------------------------------------------------------------------------------------- state


def _as_tensors(state: Mapping[str, Any], slot: Slot) -> Saved:
    """Return one parameter's saved state as tensors.

    Older versions of torch and some scripts have Python numbers in it. A single count of steps may have another
    shape: a stack of one matrix has (1,), torch has ().
    """
    tensors = {
        key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for key, value in state.items()
    }
    expected = slot.state.get("step")
    if "step" in tensors and expected is not None and tensors["step"].numel() == expected.numel() == 1:
        tensors["step"] = tensors["step"].reshape(expected.shape)
    return tensors


def _check_state(slot: Slot, saved: Mapping[str, Tensor]) -> None:
    """Refuse state that does not fit a parameter; raises ValueError."""
    if not saved:
        untouched = {"step", "exp_avg", "exp_avg_sq"}
        if slot.state.keys() - untouched and slot.param.requires_grad:
            raise ValueError(
                f"the checkpoint has no state of {slot.name!r}, which needs {sorted(slot.state)}: it was written by "
                "another optimizer"
            )
        return
    if saved.keys() != slot.state.keys():
        told = [
            f"{sorted(keys)} {what}"
            for keys, what in (
                (slot.state.keys() - saved.keys(), "missing"),
                (saved.keys() - slot.state.keys(), "more"),
            )
            if keys
        ]
        raise ValueError(
            f"the saved state of {slot.name!r} has {sorted(saved)}; expected {sorted(slot.state)} "
            f"({' and '.join(told)}): it was written by another optimizer or basis, or with other settings of it"
        )
    for key, value in saved.items():
        if tuple(value.shape) != tuple(slot.state[key].shape):
            raise ValueError(
                f"the saved {key!r} of {slot.name!r} has shape {tuple(value.shape)}; expected "
                f"{tuple(slot.state[key].shape)}: it was written with another rank or model; load it with the same"
            )
