"""Learning-rate schedules: pure functions of the step, as factors of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from lowrank_train.config.schema import ScheduleConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(schedule: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """Return the factor for step 0 .. steps - 1: linear warm-up to 1 (never 0 at the first step), then as the schedule
    says.

    cosine: down to ``min_ratio`` at the last step; wsd: 1, then linearly down to ``min_ratio`` over the last
    ``decay_fraction`` of the run (Hu et al. 2024, arXiv 2404.06395); constant: 1.
    """

    def decay(step: int) -> float:
        floor = schedule.min_ratio
        if schedule.name == "constant":
            return 1.0
        if schedule.name == "cosine":
            done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        length = max(1.0, schedule.decay_fraction * steps)
        return 1 - (1 - floor) * min(1.0, max(0.0, (step - (steps - 1 - length)) / length))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (schedule.warmup_steps + 1)) * decay(step)

    return factor
