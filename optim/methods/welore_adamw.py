"""WeLore as an optimizer: low-rank Adam whose ranks are chosen from the weights, once, when it is built.

    s_l,i = score(singular values of W_l)
    r_l   = #{i : s_l,i >= t},   t the smallest with sum_l cost_l(r_l) <= budget
    every matrix: Adam on r_l leading directions of its gradients (``optim.low_rank.engine``)

cost_l(r) is the bytes of state at rank r. A matrix that would need as much as with all its directions gets all of them,
in the basis ``identity``: that is AdamW. ``optim.spectral.weight_ranks`` chooses.

Each matrix is alone in a parameter group, whose settings ``rank`` and ``basis`` say what was chosen.
``optim.param_groups(model, rules=optim.ranks_from_weights(model))`` gives the same ranks to any low-rank optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.surroundings import undisturbed
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.state_dict import matched
from lowrank_train.optim.low_rank.engine import LowRankOptimizer, Parts
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.spectral.weight_ranks import choose_ranks, has_values, rank_settings, whole_rank

__all__ = ["WeLoreAdamW"]


class WeLoreAdamW(LowRankOptimizer):
    """Low-rank AdamW with a rank for every matrix, chosen from its singular values under one budget of bytes.

    Source: Jaiswal et al. (arXiv 2407.11239), WeLore, for the ranks; Zhao et al. (arXiv 2403.03507) for the update.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``, with the weights they start
            from.
        lr: learning rate of all groups; matrices move by ``lr * scale``. Float or tensor.
        rank: the budget is the bytes that this rank of every matrix takes: that of other methods, at equal bytes. None:
            a quarter of each matrix's smaller side.
        budget_bytes: of the state of all matrices together, over all ranks; instead of what ``rank`` takes.
        score: what a singular value is worth, a name of ``optim.spectral.ranks.SCORES``. The control, ``uniform``,
            reads no weights and gives every matrix the same share of its ``rank``.
        multiple: ranks are multiples of it, or the whole smaller side.
        floor: the least rank.
        ranks: of every matrix by name, instead of a choice: what ``optimizer.ranks`` of another run says.
        scale: factor of the update of matrices.

    Raises:
        ValueError: at construction, for groups without roles, settings out of range, weights that are not finite,
            ``ranks`` of other matrices, and a budget below the least ranks.
        RuntimeError: at the first use, if it was built on parameters without values (on meta) and ``ranks`` was not
            given: there were no weights to choose from.

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype, 4 r bytes of ages, 8 bytes of
    counters; of one with all directions 2 m n elements, 8 n bytes of integers and the counters.

    A stack of matrices has one rank, from the root mean square of their singular values. Matrices of a group that is
    added later share the bytes that ``rank`` of them takes.

    ``load_state_dict`` takes over the ranks of what it loads. The trainer of this project chooses them again from the
    weights that the run started from, never from trained ones, and refuses a checkpoint of others. With
    torch.distributed.checkpoint alone, build the optimizer with ``ranks=`` what ``optimizer.ranks`` was.

    ``predicted_state_bytes`` reads no weights. Without ``ranks`` it returns the bytes of uniform ranks within the
    budget: for a budget by ``rank``, with ``multiple=1``, an upper bound; otherwise an estimate below the budget.

    We differ from WeLore: it is the optimizer that is low-rank and not the weight; the budget is in bytes, where WeLore
    has thresholds by name of the model; every matrix is trained, those of high rank by AdamW.
    """

    published = Published(
        paper="Jaiswal et al., arXiv 2407.11239", when="each matrix should have its own rank; not shown to help"
    )
    parts = Parts(basis="subspace", residual="drop", moments="rotate")

    _is_being_made = False  # of the class, because torch's copies and pickles drop attributes

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        budget_bytes: int | None = None,
        score: str = "energy",
        multiple: int = 1,
        floor: int = 1,
        ranks: Mapping[str, int] | None = None,
        refresh_interval: int = 200,
        scale: float = 1.0,
        basis: str = "subspace",
        residual: str = "drop",
        moments: str = "rotate",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        settings = arguments(locals())
        del settings["ranks"]
        self._is_being_made = True
        super().__init__(params, settings)
        self._is_being_made = False
        slots = list(self._matrices())
        if ranks is None:
            self._choose(slots, budget_bytes)
        else:
            self._give({slot.name: rank_settings(slot, ranks[slot.name]) for slot in _named(ranks, slots)})

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each matrix or stack, by name."""
        return {slot.name: slot.group["rank"] for slot in self._matrices()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, one for each matrix of it; raises ValueError for settings that do not fit."""
        before = len(self.param_groups)
        try:
            for group in _one_by_one(param_group):
                super().add_param_group(group)
            if not self._is_being_made:
                new = self.param_groups[before:]
                self._choose([slot for slot in self._matrices() if any(slot.group is group for group in new)], None)
        except Exception:
            for group in self.param_groups[before:]:
                for param in group["params"]:
                    self.state.pop(param, None)
            del self.param_groups[before:]
            raise

    def told(self, slot: Slot) -> str:
        """Return what updates a parameter; of a matrix that keeps all its directions that this is AdamW."""
        told = super().told(slot)
        return f"{told} in all directions, which is AdamW" if _is_whole(slot, slot.group) else told

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` with the ranks it was written with; nothing changes unless all of it fits.

        Raises ValueError as other optimizers do, and for state of earlier versions, which changed ranks while training.
        """
        if any("model_step" in state for state in state_dict["state"].values()):
            raise ValueError(
                "the checkpoint was written by an earlier version of WeLoreAdamW, which chose ranks while training; "
                "its state cannot be continued: load the weights alone, and begin with a new optimizer"
            )
        self.ensure_state()
        saved_groups = state_dict["param_groups"]
        _, sources = matched(self.param_groups, saved_groups)
        saved = {id(group): saved_groups[i] for group, (i, *_) in zip(self.param_groups, sources, strict=True)}
        slots = list(self._matrices())
        kept = [(slot, dict(slot.state), dict(slot.group)) for slot in slots]
        try:
            self._give({slot.name: _saved_settings(slot, saved[id(slot.group)]) for slot in slots})
            super().load_state_dict(state_dict)
        except Exception:
            for slot, state, group in kept:
                slot.group.update(group)
                slot.state.clear()
                slot.state.update(state)
            raise

    def _follow_model(self, *, if_updated: Literal["refuse", "leave"] = "refuse") -> None:
        super()._follow_model(if_updated=if_updated)
        for slot in self._matrices():
            if slot.group.get("rank_is_provisional") and has_values(slot.param):
                raise RuntimeError(
                    f"{slot.name!r} had no values (it was on meta) when WeLoreAdamW was built, which chooses ranks "
                    "from the weights; build it when the model has its weights, or give ranks= or score='uniform'"
                )

    def _matrices(self) -> Iterator[Slot]:
        return (slot for slot in self.slots() if slot.group["role"] in self.updates)

    @undisturbed()
    @torch.no_grad()
    def _choose(self, slots: list[Slot], budget_bytes: int | None) -> None:
        """Choose the ranks of matrices from their weights."""
        if not slots:
            return
        score, multiple, floor = (self.defaults[key] for key in ("score", "multiple", "floor"))
        ranks = choose_ranks(slots, budget_bytes=budget_bytes, score=score, multiple=multiple, floor=floor)
        is_provisional = score != "uniform" and not all(has_values(slot.param) for slot in slots)
        self._give({slot.name: rank_settings(slot, rank) for slot, rank in zip(slots, ranks, strict=True)})
        for slot in slots if is_provisional else ():
            slot.group["rank_is_provisional"] = True

    @undisturbed()
    def _give(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Give matrices their ranks, and zeros for state where that changes its sizes."""
        for slot in self._matrices():
            if slot.name not in settings:
                continue
            basis = self.defaults["basis"] if _is_whole(slot, slot.group) else slot.group["basis"]
            new = {"basis": basis, **settings[slot.name]}
            slot.group.pop("rank_is_provisional", None)
            if any(slot.group[key] != value for key, value in new.items()):
                slot.group.update(new)
                self._allocate(slot.name, slot.param, slot.group)


def _one_by_one(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a group for each matrix of a group; other groups as they are."""
    if not isinstance(group, dict) or group.get("role") != "matrix" or isinstance(group["params"], Tensor | set):
        yield group
        return
    members = list(group["params"])
    beside = [key for key in ("modules", "param_names") if key in group]
    for i, member in enumerate(members):
        yield {**group, "params": [member], **{key: [group[key][i]] for key in beside}}


def _is_whole(slot: Slot, group: Mapping[str, Any]) -> bool:
    """Return whether a group gives a matrix all its directions."""
    is_matrix = slot.group["role"] == "matrix"
    return is_matrix and group.get("basis") == "identity" and group.get("rank") == whole_rank(slot)


def _saved_settings(slot: Slot, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a saved group says of the rank of a matrix."""
    if saved.get("rank") is None:
        return {"rank": slot.group["rank"], "basis": slot.group["basis"]}
    return {"rank": saved["rank"], **({"basis": "identity"} if _is_whole(slot, saved) else {})}


def _named(ranks: Mapping[str, int], slots: Sequence[Slot]) -> Sequence[Slot]:
    """Return the matrices; raises ValueError unless ``ranks`` has a number for each of them and for nothing else."""
    names = [slot.name for slot in slots]
    for name, rank in ranks.items():
        if name not in names:
            raise ValueError(f"ranks has an entry for {name!r}, which is no matrix; they are like {names[:3]}")
        if rank is None:
            raise ValueError(f"rank=None for {name!r}; expected a whole number")
    missing = next((name for name in names if name not in ranks), None)
    if missing is not None:
        raise ValueError(f"ranks has no entry for {missing!r}; expected one for every matrix, as optimizer.ranks has")
    return slots
