"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from bigtrain.config.schema import ScheduleConfig


def share_of_peak(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `num_steps`, as a share of the peak.

    The warm-up reaches the peak in its last step; the decay reaches `min_ratio` in the last step of all."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, num_steps - round(config.decay_fraction * num_steps))
    done = min(max(step + 1 - start, 0) / max(num_steps - start, 1), 1.0)
    rest = 0.5 * (1.0 + math.cos(math.pi * done)) if config.name == "cosine" else 1.0 - done
    return config.min_ratio + (1.0 - config.min_ratio) * rest
