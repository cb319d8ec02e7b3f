"""What of a run goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bigtrain
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.order import Cursor
from bigtrain.engine import state as engine_state
from bigtrain.engine.engine import Engine

FORMAT = 1
PACKAGES = ("torch", "deepspeed", "megatron-core")


class Saver:
    """Saves to RUN/checkpoints and loads from there."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config = config
        self.root = run_dir / "checkpoints"

    def save(self, engine: Engine, step: int, cursor: Cursor) -> float:
        """Write the checkpoint of `step`, durable on return; returns the seconds that it took. Collective."""
        begin = time.perf_counter()
        state = {
            "format": FORMAT,
            "step": step,
            "cursor": cursor.to_dict(),
            "model": dataclasses.asdict(self._config.model),
            "versions": {"bigtrain": bigtrain.__version__, **{name: version(name) for name in PACKAGES}},
        }
        store.save(self.root, step, engine_state.fragments(engine), state, keep=self._config.checkpoint.keep)
        return time.perf_counter() - begin

    def load(self, engine: Engine, folder: Path) -> tuple[int, Cursor]:
        """Fill `engine` from a checkpoint; returns its step and its place in the data. Collective.

        Raises UserError where it is of another model or format."""
        state = store.load(folder, engine_state.fragments(engine))
        engine_state.after_load(engine, adam_step=state["step"])
        engine.steps_taken = state["step"]
        return state["step"], Cursor.from_dict(state["cursor"])


def checkpoint_to_resume(config: Config, run_dir: Path) -> Path | None:
    """What `checkpoint.resume` names: auto, never or a path. Raises UserError for a path without a checkpoint."""
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return folders.newest(run_dir / "checkpoints")
    folder = folders.resolve(Path(resume))
    check_format(folder, folders.state_of(folder))
    return folder


def check_format(folder: Path, state: dict[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder}: format {state.get('format')!r}; this version reads format {FORMAT}")
