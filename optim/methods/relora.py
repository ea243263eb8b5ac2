"""ReLoRA: low-rank factors beside frozen weights, added to them now and then and begun anew.

    h = W x + s B A x          W (out, in) frozen, A (r, in), B (out, r), s = alpha / r

    every step                 A, B <- AdamW(dL/dA, dL/dB), rate lr_t;  everything else but W: AdamW, rate lr
    every restart_every steps  W <- W + s B A;  A ~ U(-1/sqrt(in), 1/sqrt(in));  B <- 0;  moments of A and B, age <- 0
    lr_t = lr min(1, (t + 1) / warmup_steps),  t steps after a restart;  lr before the first

A restart does not change h. A is random and B zero after it: with both zero, dL/dA = s B^T G and dL/dB = s G A^T vanish
(G the gradient of the sum W + s B A) and the layer would never train again.

Sharded over rows, a step communicates nothing; a restart sums the rows of each A, for every rank to multiply with its
rows of B. What A becomes follows from seed, layer and restart alone: each rank draws all of it and keeps its rows, and
nothing but ``step`` need be saved to resume between two restarts.

Source: Lialin, Muckatira, Shivagunde, Rumshisky, "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv
2307.05695), section 3; as ReLoRA*, without its warm start, the baseline of Zhao et al. (arXiv 2405.15481), appendix.

We differ:
  * moments become zero, all of them, and the bias corrections begin anew; the paper prunes most of the moments by size,
    its code 99.9 % of them at random;
  * the warm-up multiplies whatever schedule there is, for A and B only; the paper's "jagged" schedule is everyone's;
  * the code can begin with A and B both zero; here A is always drawn;
  * W + s B A is summed in float32 or wider and rounded once;
  * no full-rank phase before: continue from a dense model for that.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.arguments.hyperparameters import check_whole
from lowrank_train.optim.arguments.torch_arguments import is_number
from lowrank_train.optim.core.common_updates import ADAMW
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments
from lowrank_train.optim.core.update import Group, Traffic, Update
from lowrank_train.optim.parameters.slot import Slot
from lowrank_train.optim.shards.collectives import sum_over_shards, take_rows
from lowrank_train.optim.shards.layout import StateTensor, local, row_range
from lowrank_train.optim.shards.workspace import MatrixShape, Workspace

__all__ = ["ReLoRA", "drawn_factor", "merged_weight"]

_FACTOR = re.compile(r"(?P<layer>(?:.*\.)?)lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
_SHARED = ("restart_every", "alpha", "seed")


@dataclass(frozen=True)
class _Adapter:
    """One A, its B and the weight they are added to; on this rank the rows of its shards."""

    name: str
    a: Slot
    b: Slot
    base: Slot


class FactorUpdate(Update):
    """AdamW on A and B, at the rate of the warm-up and with an age that restarts."""

    takes = "moments as stored"
    works_between_steps = True
    structural_settings = _SHARED
    interval_setting = "restart_every"

    def state(self, name: str, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Return AdamW's state, with its count of updates as ``age``, and the clock of the schedule."""
        _check(group)
        layout = ADAMW.state(name, param, group)
        return {"age": layout.pop("step"), "step": StateTensor((), torch.float32, "host"), **layout}

    def step(self, slots: list[Slot]) -> None:
        """Update factors, those of one group and clock together."""
        members: dict[tuple[int, int], list[Slot]] = {}
        for slot in slots:
            members.setdefault((id(slot.group), _clock(slot)), []).append(slot)
        for own in members.values():
            ADAMW.step_group(own, lr=_rate(own[0]), clock="age")

    def sent(self, shape: Sequence[int], dtype: torch.dtype, group: Group, world_size: int, dim: int) -> Traffic:
        """Return the bytes of all of A at a restart, in float32 or wider."""
        size = torch.promote_types(dtype, torch.float32).itemsize
        return Traffic(refresh_bytes=math.prod(shape) * size if group["role"] == "lora_a" else 0)

    def workspace(self, matrices: Sequence[MatrixShape]) -> Workspace:
        """Return what AdamW needs."""
        return ADAMW.workspace(matrices)


class ReLoRA(MatrixOptimizer):
    """ReLoRA: AdamW on low-rank adapters, merged into the frozen weights and drawn anew, and on everything else.

    Source: Lialin et al., arXiv 2307.05695; ReLoRA* of Zhao et al., arXiv 2405.15481. We differ: moments are reset to
    exactly zero; only A and B warm up again; A is never zero (the module's docstring says more).

    Args:
        params: a model with adapters (``lowrank_train.layers.lora.add_adapters``), or groups that
            ``optim.param_groups`` made of it; before or after ``fully_shard``. Factors are known by their names:
            ``....lora_A.<adapter>.weight``, ``....lora_B.<adapter>.weight`` and ``....base_layer.weight``.
        restart_every: steps between two restarts.
        warmup_steps: steps over which the rate of A and B rises after a restart.
        alpha: the layers' own, what is added is alpha / r times B A; None: r, so that it is B A. Given a model, it is
            compared with its layers; given groups, nobody can.
        seed: of the draws of A.
        weight_decay: decoupled, per unit of ``lr``; of the factors, it acts on A and B and not on W.

    Raises:
        ValueError: at construction, for a model without adapters, incomplete ones, an ``alpha`` that is not the
            layers', and values out of range; at the latest in the first step, for layers sharded along dimension 1.

    State: of A and B two moments, an age and a step count; of the frozen weights nothing; of the rest that of AdamW.
    Communication when sharded: nothing in a step; a sum of (r, in) numbers per layer at a restart.
    """

    published = Published(
        paper="Lialin et al., arXiv 2307.05695", when="adapters are trained, and should add up to more than their rank"
    )
    updates: ClassVar = dict.fromkeys(("lora_a", "lora_b"), FactorUpdate())

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        restart_every: int = 200,
        warmup_steps: int = 20,
        alpha: float | None = None,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = arguments(locals())
        _check(settings)
        super().__init__(param_groups(params) if isinstance(params, nn.Module) else params, settings)
        adapters = self._adapters()
        if not adapters:
            raise ValueError(
                "the model has no layers with adapters, so ReLoRA has nothing to restart; convert it first: "
                "lowrank_train.layers.lora.add_adapters(model, rank=...)"
            )
        if isinstance(params, nn.Module):
            _check_scale(params, adapters)

    def state_allocated(self, slots: list[Slot]) -> None:
        """Check adapters that were sharded after the optimizer was built."""
        self._adapters()

    def end_step(self) -> None:
        """Advance the clock; restart the adapters whose interval ends."""
        factors = [slot for slot in self.slots() if slot.group["role"] in self.updates]
        for slot in factors:
            slot.state["step"] += 1
        if any(_is_due(slot) for slot in factors):
            for index, adapter in enumerate(self._adapters()):
                if _is_due(adapter.a):
                    _restart(adapter, index)

    def end_bytes(self, world_size: int) -> int:
        """Return W + B A of the largest layer, in float32 or wider, at a restart."""
        weights = [adapter.base.param for adapter in self._adapters()]
        return max(w.numel() // world_size * torch.promote_types(w.dtype, torch.float32).itemsize for w in weights)

    def figures(self) -> dict[str, float]:
        """Return how many restarts there have been, and the share of the rate that A and B get at the next step."""
        slot = self._adapters()[0].a
        return {"restarts": _clock(slot) // slot.group["restart_every"], "warmup": _warmup(slot)}

    def _adapters(self) -> list[_Adapter]:
        """In the order of their A. Raises ValueError for an A or B without its fellows."""
        slots = {slot.name: slot for slot in self.slots()}
        adapters = []
        for name, slot in slots.items():
            if slot.group["role"] not in self.updates:
                continue
            found = _FACTOR.fullmatch(name)
            if found is None or (found["side"] == "A") != (slot.group["role"] == "lora_a"):
                raise ValueError(
                    f"{name!r} has role {slot.group['role']!r}; expected a name ending in .lora_A.<adapter>.weight for "
                    "lora_a, in .lora_B.<adapter>.weight for lora_b, as peft makes them: pass optim.param_groups(model)"
                )
            layer, adapter = found["layer"], found["adapter"]
            names = [f"{layer}lora_{side}.{adapter}.weight" for side in "AB"] + [f"{layer}base_layer.weight"]
            missing = next((other for other in names if other not in slots), None)
            if missing is not None:
                raise ValueError(
                    f"{name!r} came without {missing!r}; expected both factors and the frozen weight they are added "
                    "to: pass optim.param_groups(model), after lowrank_train.layers.lora.add_adapters(model)"
                )
            if found["side"] == "A":
                own = _Adapter(layer.removesuffix("."), *(slots[other] for other in names))
                _check_together(own)
                adapters.append(own)
        return adapters


def drawn_factor(shape: tuple[int, int], *, seed: int, index: int, restart: int) -> Tensor:
    """Return A (r, in) of adapter ``index`` after some restarts: float64 on the CPU, U(-1/sqrt(in), 1/sqrt(in)).

    LoRA's own initial values, Kaiming's with a = sqrt(5).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{index}/{restart}".encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def merged_weight(
    weight: Tensor,  # (m, in), rows of the frozen weight
    a: Tensor,  # (r, in), whole
    b: Tensor,  # (m, r), the same rows as of the weight
    scale: float,
) -> Tensor:
    """Return W + scale B A (m, in), summed in float32 or wider and rounded to the type of W once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale).to(weight.dtype)


def _restart(adapter: _Adapter, index: int) -> None:
    """Add B A to W, then B = 0, a new A, and nothing remembered of the old ones. A collective where A is sharded."""
    a, b, weight = adapter.a.param, local(adapter.b.param), local(adapter.base.param)
    rank, settings = a.shape[0], adapter.a.group
    # in float32 or wider, which every backend can sum; one term of the sum is not zero, so it is exact
    own = local(a).to(torch.promote_types(a.dtype, torch.float32))
    (whole,) = sum_over_shards([a], [take_rows(a, own, torch.arange(rank))])
    assert row_range(adapter.b.param) == row_range(adapter.base.param)
    weight.copy_(merged_weight(weight, whole, b, _scale(settings["alpha"], rank)))
    b.zero_()
    restart = _clock(adapter.a) // settings["restart_every"]
    drawn = drawn_factor((rank, a.shape[1]), seed=settings["seed"], index=index, restart=restart)
    rows = row_range(a)
    local(a).copy_(drawn[rows.start : rows.stop])
    for slot in (adapter.a, adapter.b):
        for key, value in slot.state.items():
            if key.startswith("exp_avg") or key == "age":  # in few bits their scales too: a code of 0 is not always 0
                local(value).zero_()


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _clock(slot: Slot) -> int:
    """Steps since the start; in CPU memory, so that reading it waits for nothing."""
    return int(slot.state["step"])


def _is_due(slot: Slot) -> bool:
    return _clock(slot) % int(slot.group["restart_every"]) == 0


def _warmup(slot: Slot) -> float:
    restarts, since = divmod(_clock(slot), slot.group["restart_every"])
    return min(1.0, (since + 1) / max(1, slot.group["warmup_steps"])) if restarts else 1.0


def _rate(slot: Slot) -> float | Tensor:
    factor = _warmup(slot)
    return slot.group["lr"] if factor == 1 else slot.group["lr"] * factor


def _check(values: dict[str, Any]) -> None:
    for key, least in (("restart_every", 1), ("warmup_steps", 0), ("seed", 0)):
        check_whole(values, key, least)
    alpha = values["alpha"]
    if alpha is not None and not (is_number(alpha) and 0 < alpha < math.inf):
        raise ValueError(f"alpha={alpha!r}; expected a number > 0, or None for the rank")


def _check_together(adapter: _Adapter) -> None:
    """A layer's A and B, which are in different groups, restart together, and every rank has whole rows."""
    for key in _SHARED:
        a, b = adapter.a.group[key], adapter.b.group[key]
        if a != b:
            raise ValueError(f"{adapter.name!r} has {key}={a!r} for A and {b!r} for B; expected the same for both")
    for slot in (adapter.a, adapter.b, adapter.base):
        row_range(slot.param)  # raises


def _check_scale(model: nn.Module, adapters: Sequence[_Adapter]) -> None:
    """What is added at a restart must be what the layer computes with."""
    for adapter in adapters:
        found = _FACTOR.fullmatch(adapter.a.name)
        assert found is not None
        scaling = getattr(model.get_submodule(adapter.name), "scaling", None)
        rank, alpha = adapter.a.param.shape[0], adapter.a.group["alpha"]
        if isinstance(scaling, dict) and not math.isclose(scaling[found["adapter"]], _scale(alpha, rank)):
            real = scaling[found["adapter"]]
            raise ValueError(
                f"alpha={alpha!r} scales B A by {_scale(alpha, rank):g}, and the layer {adapter.name!r} by {real:g}; "
                f"expected the same, or a restart would change the model: give alpha={real * rank:g}"
            )
