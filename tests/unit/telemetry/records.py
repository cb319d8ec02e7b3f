"""Runs to test with: a config without W&B, and a recorder that has recorded a few steps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from bigtrain.config import Config
from bigtrain.config.schema import RunConfig, TrackerConfig
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.recorder import Recorder


def config_of(name: str = "a run", *, tracker: TrackerConfig | None = None) -> Config:
    return dataclasses.replace(Config(), run=RunConfig(name=name), tracker=tracker or TrackerConfig(kind="none"))


def recorder_of(
    run_dir: Path, *, config: Config | None = None, resume_step: int = 0, is_writer: bool = True, num_steps: int = 40
) -> Recorder:
    return Recorder(
        run_dir,
        config or config_of(),
        num_steps=num_steps,
        resume_step=resume_step,
        console=Console(enabled=False),
        is_writer=is_writer,
    )


def record_steps(recorder: Recorder, steps: range, *, offset: float = 0.0) -> None:
    """Train records whose numbers have digits to lose."""
    for step in steps:
        recorder.train(
            step,
            tokens=step * 4096,
            loss=offset + 8.0 / math.sqrt(step),
            lr=1e-3 / 3 * step,
            grad_norm=math.pi / step,
            step_time_s=0.1 + 0.2,
            tokens_per_second=4096 / 0.3,
            mfu=1 / 3,
        )
