"""Peak memory of training steps that are really made: CUDA's own count, on a CPU the profiler's of every allocation.

Weights and tokens are random; all else is a run's: FSDP2, loss, accumulation, clipping, optimizer. Unlike the resident
set, allocations are the step's alone; unlike the tracker's, they include what kernels take for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank_train.common.ranks import Ranks, start
from lowrank_train.config.schema import Config
from lowrank_train.models import fsdp
from lowrank_train.models.recompute import checkpoint_layers
from lowrank_train.optim.shards.layout import local
from lowrank_train.plan import Plan

__all__ = ["MeasuredStep", "measure"]

_PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class MeasuredStep:
    """Largest bytes allocated on this rank, weights, gradients and state included."""

    forward: int
    backward: int
    step: int
    """The first refresh is in it, where there is one."""

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase."""
        return {name: getattr(self, name) for name in _PHASES}

    @property
    def peak(self) -> int:
        """The peak of all phases."""
        return max(self.phases.values())


def measure(config: Config, *, steps: int = 2) -> MeasuredStep:
    """Make ``steps`` steps of a configuration, under torchrun with all its ranks.

    Raises:
        UserError: as ``common.ranks.start``; settings that do not fit.
    """
    with start(config.device, config.parallel.shards, config.parallel.replicas) as ranks:
        counted = _on_cuda if ranks.device.type == "cuda" else _on_cpu
        plan = Plan.of(config, world_size=ranks.world_size)
        peaks = counted(lambda phase: _train(plan, ranks, steps, phase), ranks.device)
    return MeasuredStep(**peaks)


def _train(plan: Plan, ranks: Ranks, steps: int, phase: Callable[[str], Any]) -> None:
    config, model = plan.config, plan.shapes(plan.model.config)
    fsdp.shard_model(model, ranks.mesh, plan.optimizer_class, config.precision)
    model.to_empty(device=ranks.device)
    model.tie_weights()
    _fill(model)
    checkpoint_layers(model, config.model)
    model.train()
    optimizer = plan.optimizer(model)
    shape = (config.micro_batch, config.seq_len)
    ids = torch.randint(model.config.vocab_size, shape, device=ranks.device)
    apart = torch.arange(config.seq_len, device=ranks.device).expand(shape) if config.data.separates else None
    if config.fused_backward:
        plan.update_in_backward(model, optimizer)
    for _ in range(steps):
        for _ in range(plan.passes):
            with phase("forward"):
                loss = model.token_loss(ids, ids, config.loss_chunk, apart) / config.tokens_per_step
            with phase("backward"):
                loss.backward()
            del loss
        with phase("step"):
            if config.clip is not None and not config.fused_backward:
                clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            local(tensor).normal_(std=0.02) if tensor.ndim > 1 else local(tensor).fill_(1.0)
        else:
            local(tensor).zero_()


def _on_cuda(work: Callable[[Callable[[str], Any]], None], device: torch.device) -> dict[str, int]:
    peaks = dict.fromkeys(_PHASES, 0)
    before = torch.cuda.memory_allocated(device)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(device)
        yield
        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before)

    work(phase)
    return peaks


def _on_cpu(work: Callable[[Callable[[str], Any]], None], device: torch.device) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work(lambda name: record_function(f"phase/{name}"))
    assert profiler.profiler is not None
    spans: list[tuple[str, int, int]] = []
    allocations: list[tuple[int, int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name.startswith("phase/"):
            spans.append((event.name.removeprefix("phase/"), event.start_time_ns, event.end_time_ns))
        elif event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            allocations.append((event.start_time_ns, fields.alloc_size, fields.total_allocated))
    allocations.sort()
    before = allocations[0][2] - allocations[0][1]
    return {
        name: max(
            total - before
            for phase, start, end in spans
            if phase == name
            for moment, _, total in allocations
            if start <= moment <= end
        )
        for name in _PHASES
    }
