"""What of a run goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import bigtrain
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.order import Cursor
from bigtrain.engine import state as engine_state
from bigtrain.engine.engine import Engine
from bigtrain.trainer import peers

PACKAGES = ("torch", "deepspeed", "megatron-core")
ORIGIN = ("init_from", "imported")
"""Keys of state.json: where the run's first weights came from, and what an import of them wrote down."""


class Saver:
    """Saves to RUN/checkpoints and loads from there."""

    def __init__(self, config: Config, run_dir: Path, tokenizer: Mapping[str, bytes]) -> None:
        """`tokenizer`: its files by name, kept in every checkpoint."""
        self._config, self._files = config, dict(tokenizer)
        self._origin: dict[str, Any] = {}
        """What every save says of where the weights came from."""
        self.root = run_dir / "checkpoints"

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` is, once it is saved."""
        return folders.path_of(self.root, step)

    def save(self, engine: Engine, step: int, cursor: Cursor) -> float:
        """Write the checkpoint of `step`, durable on return; returns the seconds that it took. Collective."""
        begin = time.perf_counter()
        config = dataclasses.asdict(self._config)  # set-up lines and the like do not travel with a checkpoint
        state = {
            "format": folders.FORMAT,
            "step": step,
            "adam_step": engine_state.adam_step(engine),
            "loss_scale": {"value": engine.loss_scale.value, "good_steps": engine.loss_scale.good_steps},
            "cursor": peers.whole(cursor, engine.runtime).to_dict(),
            "config": {name: value for name, value in config.items() if name not in ("cluster", "tracker")},
            **self._origin,
            "versions": {"bigtrain": bigtrain.__version__, **{name: version(name) for name in PACKAGES}},
        }
        fragments = engine_state.fragments(engine)
        store.save(self.root, step, fragments, state, keep=self._config.checkpoint.keep, files=self._files)
        return time.perf_counter() - begin

    def load(self, engine: Engine, folder: Path) -> tuple[int, Cursor]:
        """Fill `engine` from a checkpoint; returns its step and its place in the data. Collective.

        Raises UserError where it is of another model or format."""
        state = store.load(folder, engine_state.fragments(engine))
        self._origin = {key: state[key] for key in ORIGIN if key in state}
        engine_state.after_load(engine, adam_step=state["adam_step"])
        engine.steps_taken = state["step"]
        engine.loss_scale = dataclasses.replace(engine.loss_scale, **state["loss_scale"])
        return state["step"], Cursor.from_dict(state["cursor"])

    def load_weights(
        self, engine: Engine, read: Callable[[list[Fragment]], object], *, origin: Mapping[str, Any] | None = None
    ) -> None:
        """Fill only the weights of `engine`, by `read` (`OpenModel.read`): a run starts from them, at step 0, and its
        checkpoints say so (`origin`: keys of ORIGIN). Collective.

        Raises UserError where they are of another model."""
        every = engine_state.fragments(engine)
        read([dataclasses.replace(each, tensors={"weight": each.tensors["weight"]}) for each in every])
        engine_state.after_load(engine, adam_step=0)
        self._origin = dict(origin or {})


def checkpoint_to_resume(config: Config, run_dir: Path) -> Path | None:
    """The run's own newest checkpoint, so that a job which is started again by itself loses nothing; without one, what
    `checkpoint.resume` names. Raises UserError for a path without a checkpoint.

    Collective: rank 0 looks, since a shared disk may show its folders to other machines later."""
    found: list[Path | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = folders.newest(run_dir / "checkpoints")
            if found[0] is None and config.checkpoint.resume not in ("auto", "never"):
                found[0] = folders.resolve(Path(config.checkpoint.resume))
        except UserError as error:
            found[0] = str(error)
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return found[0]
