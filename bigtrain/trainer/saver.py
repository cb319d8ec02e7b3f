"""What of a run goes into a checkpoint, when, and how it comes back.

A save copies what this rank owns to host memory, which is all that training waits for; a thread writes the copy,
agrees with the other ranks' threads over a process group of their own, and commits. The next save waits for it, and so
does the end of the run. A save that fails leaves the checkpoints before it as they were, and training goes on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

import bigtrain
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.checkpoint.manifest import DamagedCheckpoint
from bigtrain.checkpoint.slices import Fragment
from bigtrain.checkpoint.snapshot import Snapshot, room_on_host
from bigtrain.config import frozen
from bigtrain.config.derive import collective_timeout_s
from bigtrain.config.errors import UserError
from bigtrain.config.same_run import difference
from bigtrain.config.schema import Config
from bigtrain.data.order import Cursor
from bigtrain.distributed.host_memory import free_host_bytes
from bigtrain.engine import state as engine_state
from bigtrain.engine.engine import Engine
from bigtrain.telemetry.goodput import Clock
from bigtrain.trainer import peers
from bigtrain.trainer.anomaly import Guard
from bigtrain.trainer.pace import Cost
from bigtrain.trainer.watchdog import Watchdog

PACKAGES = ("torch", "deepspeed", "megatron-core")
LAST_SAVE_S = 10.0
"""Seconds that a save under way may still take when its rank fails."""
SHARE_OF_FREE_MEMORY = 0.5
"""Of the host's, that a copy may take: on a CPU Adam's moments are still to come, on any machine activations."""
ORIGIN = ("init_from", "imported")
"""Keys of state.json: where the run's first weights came from, and what an import of them wrote down."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    seconds: float
    """From the call until it was durable, or had failed."""
    stall_s: float
    """Of these, that training waited for."""
    num_bytes: int = 0
    """That all ranks wrote; known on rank 0."""
    error: str = ""
    """Why it failed; empty where it did not."""


@dataclass(frozen=True)
class Fallback:
    """A damaged checkpoint that was passed over."""

    folder: Path
    """Where it is now."""
    reason: str


class Saver:
    """Saves to RUN/checkpoints and loads from there."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        tokenizer: Mapping[str, bytes],
        guard: Guard | None = None,
        clock: Clock | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """`tokenizer`: its files by name, kept in every checkpoint, as is what `guard` knows. `clock` and `watchdog`
        are told when training waits, and what for. Collective."""
        self._config, self._files = config, dict(tokenizer)
        self._guard = guard or Guard(config.anomaly)
        self._clock, self._watchdog = clock or Clock(time.time()), watchdog or Watchdog()
        self.root = run_dir / "checkpoints"
        self.fallbacks: list[Fallback] = []
        self._carried: dict[str, Any] = {}
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Outcome] | None = None
        self._finished: list[Outcome] = []
        self.last: Outcome | None = None
        """How the last save ended; None before the first has."""
        self._is_async = config.checkpoint.async_
        # the thread's collectives must not mix with those of the step
        timeout = timedelta(seconds=collective_timeout_s(config.watchdog))
        is_async = config.checkpoint.async_
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint") if is_async else None
        self._group = cast("dist.ProcessGroup | None", group)

    @property
    def cost(self) -> Cost | None:
        """Of the last save; None while none has ended or one goes on."""
        if self.last is None or (self._pending is not None and not self._pending.done()):
            return None
        return Cost(self.last.stall_s, self.last.seconds)

    def reserve(self, engine: Engine) -> str:
        """Take the host memory of checkpoint.async now: no save is to fail for want of it later. Where a rank has not
        enough, all saves are written while training waits. Returns what to tell the user. Collective."""
        if not self._is_async:
            return ""
        fragments = engine_state.fragments(engine)
        needed, free = room_on_host(fragments), free_host_bytes()
        fits = needed <= SHARE_OF_FREE_MEMORY * free
        if fits:
            try:
                self._snapshot.reserve(fragments)
            except RuntimeError:  # torch's: it could not allocate, or not pin
                fits = False
        short: list[str] = [""] * dist.get_world_size()
        mine = "" if fits else f"{needed / 1e9:,.1f} GB for it, {free / 1e9:,.1f} GB are free"
        dist.all_gather_object(short, mine)
        without = [f"rank {rank} would take {why}" for rank, why in enumerate(short) if why]
        if not without:
            return ""
        self._is_async, self._snapshot = False, Snapshot()
        return (
            f"warning: checkpoint.async: too little host memory for a copy: {without[0]}. Training waits for its saves"
        )

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` is, once it is saved."""
        return folders.path_of(self.root, step)

    def save(self, engine: Engine, step: int, cursor: Cursor, loss: float | None = None) -> None:
        """Save the run at `step`; `finished` and `wait` tell how it went. Collective.

        Waits for the save before it. `loss`: held-out, where it was measured at this step."""
        with self._clock.part("save_stall"):
            self._save(engine, step, cursor, loss)

    def _save(self, engine: Engine, step: int, cursor: Cursor, loss: float | None) -> None:
        begin = time.perf_counter()
        self._join()
        state, fragments = self._state(engine, step, cursor, loss), engine_state.fragments(engine)
        if not self._is_async:
            outcome = self._write(step, fragments, state, begin, None)
            self._end(replace(outcome, stall_s=outcome.seconds))
            return
        copies = self._snapshot.take(fragments)
        stall_s = time.perf_counter() - begin
        self._pending = self._thread.submit(self._write, step, copies, state, begin, stall_s)

    def finished(self) -> list[Outcome]:
        """How the saves went that have ended since it was last asked. Never waits."""
        if self._pending is not None and self._pending.done():
            self._join()
        found, self._finished = self._finished, []
        return found

    def wait(self) -> list[Outcome]:
        """As `finished`, once no save is under way any more."""
        with self._clock.part("save_stall"):
            self._join()
        return self.finished()

    def close(self) -> list[Outcome]:
        """As `finished`, on the way out of a rank that failed: a save under way has LAST_SAVE_S to become durable, if
        the other ranks can still do their part. Not collective, and raises nothing."""
        if self._pending is not None:
            futures.wait([self._pending], LAST_SAVE_S)
        return self.finished()

    def load(self, engine: Engine, candidates: Sequence[Path]) -> tuple[int, Cursor]:
        """Fill `engine` from the first of `candidates` that is whole; returns its step and its place in the data.
        Collective. What is damaged is put aside, if it is of this run, and noted in `fallbacks`.

        Raises UserError where none is whole, or one is of another model or format."""
        for number, folder in enumerate(candidates):
            try:
                return self._load(engine, folder)
            except DamagedCheckpoint as error:
                if number == len(candidates) - 1:
                    raise UserError(f"{error}. There is no older one that is whole.") from error
                self.fallbacks.append(Fallback(self._set_aside(folder), str(error)))
        raise ValueError("no checkpoint to load was named")

    def load_weights(
        self, engine: Engine, read: Callable[[list[Fragment]], object], *, origin: Mapping[str, Any] | None = None
    ) -> None:
        """Fill only the weights of a fresh `engine`, by `read` (`OpenModel.read`). Its step, moments and data stay its
        own, and its checkpoints say where the weights came from (`origin`: keys of ORIGIN). Collective.

        Raises UserError where they are of another model."""
        every = engine_state.fragments(engine)
        read([replace(each, tensors={"weight": each.tensors["weight"]}) for each in every])
        engine_state.after_load(engine, adam_step=0)
        self._carried = dict(origin or {})

    def _load(self, engine: Engine, folder: Path) -> tuple[int, Cursor]:
        state = store.load(folder, engine_state.fragments(engine), lambda state: self._check_fits(folder, state))
        engine_state.after_load(engine, adam_step=state["adam_step"])
        engine.steps_taken = state["step"]
        engine.loss_scale = replace(engine.loss_scale, **state["loss_scale"])
        self._guard.restore(state.get("anomaly", {}))
        self._carried = {name: state[name] for name in ORIGIN if name in state}
        return state["step"], Cursor.from_dict(state["cursor"])

    def _check_fits(self, folder: Path, state: dict[str, Any]) -> None:
        """Raise UserError where the checkpoint is of another model or optimizer, though its tensors may fit."""
        if found := difference(self._config, state.get("config", {})):
            key, saved, wanted = found
            raise UserError(
                f"checkpoint {folder}: it is of another run: {key} is {saved} there, {wanted} here. Set {key}={saved}"
            )

    def _set_aside(self, folder: Path) -> Path:
        """Collective: rank 0 renames it. One of another run is left as it is."""
        aside: list[Path | None] = [folder]
        if dist.get_rank() == 0 and folder.parent == self.root:
            with contextlib.suppress(OSError):  # a disk that cannot be written: it stays where it is
                aside[0] = folders.set_aside(folder)
        dist.broadcast_object_list(aside)
        return aside[0] or folder

    def _state(self, engine: Engine, step: int, cursor: Cursor, loss: float | None) -> dict[str, Any]:
        """What goes into state.json. Collective."""
        config = frozen.as_dict(self._config)  # set-up lines and the like do not travel with a checkpoint
        return {
            "format": folders.FORMAT,
            "step": step,
            "loss": loss if loss is None or math.isfinite(loss) else None,
            "adam_step": engine_state.adam_step(engine),
            "loss_scale": {"value": engine.loss_scale.value, "good_steps": engine.loss_scale.good_steps},
            "anomaly": self._guard.to_dict(),
            "cursor": peers.whole(cursor, engine.runtime).to_dict(),
            "config": {name: value for name, value in config.items() if name not in ("cluster", "tracker")},
            "versions": {"bigtrain": bigtrain.__version__, **{name: version(name) for name in PACKAGES}},
            **self._carried,
        }

    def _write(
        self, step: int, fragments: list[Fragment], state: dict[str, Any], begin: float, stall_s: float | None
    ) -> Outcome:
        """Write and commit, on the thread or, without `stall_s`, on the loop's. Collective over its group."""
        wanted = self._config.checkpoint
        keep = folders.Keep(wanted.keep, wanted.keep_every, wanted.keep_best)
        num_bytes, error = 0, ""
        try:
            with self._watchdog.phase("save"):
                saved = store.save(self.root, step, fragments, state, keep=keep, files=self._files, group=self._group)
            num_bytes = saved.num_bytes if saved else 0
        except store.SaveError as raised:
            error = str(raised)
        except Exception as raised:  # whatever it is, it may not end the training of one rank alone
            error = f"the checkpoint of step {step} was not saved: {type(raised).__name__}: {raised}"
        return Outcome(step, time.perf_counter() - begin, stall_s or 0.0, num_bytes, error)

    def _join(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self._watchdog.phase("save", is_measured=False):
                self._end(pending.result())

    def _end(self, outcome: Outcome) -> None:
        self.last = outcome
        self._finished.append(outcome)


def checkpoints_to_resume(config: Config, run_dir: Path) -> list[Path]:
    """The run's own checkpoints, the newest first, so that a job which is started again by itself loses nothing;
    without any, what `checkpoint.resume` names. Raises UserError for a path without a checkpoint.

    Collective: rank 0 looks, since a shared disk may show its folders to other machines later."""
    found: list[Sequence[Path] | str] = [[]]
    if dist.get_rank() == 0:
        try:
            found[0] = folders.committed(run_dir / "checkpoints")[::-1]
            if not found[0] and config.checkpoint.resume not in ("auto", "never"):
                found[0] = folders.candidates(Path(config.checkpoint.resume))
        except UserError as error:
            found[0] = str(error)
        except OSError as error:
            found[0] = f"{run_dir / 'checkpoints'}: it cannot be read: {error.strerror}"
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return list(found[0])
