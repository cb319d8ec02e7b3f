"""What of a run goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path

import bigtrain
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.config.schema import Config
from bigtrain.data.order import Cursor
from bigtrain.engine import state as engine_state
from bigtrain.engine.engine import Engine

PACKAGES = ("torch", "deepspeed", "megatron-core")


class Saver:
    """Saves to RUN/checkpoints and loads from there."""

    def __init__(self, config: Config, run_dir: Path, tokenizer: bytes) -> None:
        """`tokenizer`: the model file, kept in every checkpoint."""
        self._config, self._files = config, {folders.TOKENIZER: tokenizer}
        self.root = run_dir / "checkpoints"

    def save(self, engine: Engine, step: int, cursor: Cursor) -> float:
        """Write the checkpoint of `step`, durable on return; returns the seconds that it took. Collective."""
        begin = time.perf_counter()
        state = {
            "format": folders.FORMAT,
            "step": step,
            "cursor": cursor.to_dict(),
            "config": dataclasses.asdict(self._config),
            "versions": {"bigtrain": bigtrain.__version__, **{name: version(name) for name in PACKAGES}},
        }
        fragments = engine_state.fragments(engine)
        store.save(self.root, step, fragments, state, keep=self._config.checkpoint.keep, files=self._files)
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
    folder = folders.newest(run_dir / "checkpoints") if resume == "auto" else folders.resolve(Path(resume))
    if folder is not None:
        folders.state_of(folder)  # raises where it is of another format
    return folder
