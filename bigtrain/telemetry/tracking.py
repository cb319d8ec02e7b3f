"""Weights & Biases: the same records as metrics.jsonl, for those who watch many runs.

Offline by default: RUN/wandb/ gets files that ``wandb sync RUN/wandb/offline-run-*`` uploads later. The run's id
stays in RUN/wandb_id, so that every attempt of a run is one run in W&B. Steps that an attempt lost in a crash and
computed again are there twice (W&B only appends); metrics.jsonl has each once.

W&B is a guest here: whatever goes wrong with it is said once, and training goes on without it.
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from bigtrain.config import frozen, locations
from bigtrain.config.schema import Config

_ID_FILE = "wandb_id"
FINISH_S = 300.0
"""For what W&B's server has not taken yet, at the end of a run; what it takes later is there for ``wandb sync``."""
HURRIED_FINISH_S = 10.0
"""The same where a signal or an error ends it: who sends a signal kills soon, and the other ranks wait."""
_HIDDEN = "(not logged)"
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY_OF_URL = re.compile(r"(://[^\s?]*)\?\S*")


class WandbTracker:
    """A W&B run for the run in `run_dir`. No method raises."""

    def __init__(self, run_dir: Path, config: Config, *, warn: Callable[[str], None]) -> None:
        """Start or go on with the run. `warn` gets one message if W&B fails, here or later."""
        self._warn = warn
        self._run: Any = None
        try:
            self._run = _start(run_dir, config)
        except Exception as error:
            self._give_up(error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record of metrics.jsonl: train and eval records, and the epochs of the sources. Other events stay
        here."""
        fields = {name: value for name, value in fields_of(record).items() if value is not None}
        if self._run is None or not fields:
            return
        try:
            self._run.log({"step": record["step"], **fields})
        except Exception as error:
            self._give_up(error)

    def close(self, *, failed: bool = False, limit_s: float = FINISH_S) -> None:
        """Finish the W&B run, marked as failed or not, within `limit_s`: without its server W&B tries for hours. A
        second call does nothing."""
        run, self._run = self._run, None
        if run is None:
            return
        finishing = threading.Thread(target=self._finish, args=(run, failed), name="W&B finish", daemon=True)
        finishing.start()
        finishing.join(limit_s)
        if finishing.is_alive():
            self._warn(f"warning: W&B did not finish in {limit_s:g} s; `wandb sync` sends what its server did not take")

    def _finish(self, run: Any, failed: bool) -> None:
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._warn(f"warning: W&B stopped, training goes on without it: {reason}")


def fields_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's fields by the names that they get in W&B: ``train/loss``, ``eval/loss``, and for an evaluation set
    ``eval/NAME/loss``, for a source ``epochs/NAME``."""
    if record["kind"] == "event":
        epochs: Mapping[str, float] = record["epochs"] if record["name"] == "epochs" else {}
        return {f"epochs/{name}": epochs[source] for source, name in locations.short_names(epochs).items()}
    prefix = f"{record['kind']}/{record['set']}" if record.get("set") else record["kind"]
    return {f"{prefix}/{name}": value for name, value in record.items() if name not in ("kind", "step", "set")}


def without_secrets(config: Config) -> dict[str, Any]:
    """The config as it may leave the machine. Shell lines and sbatch options, where people put tokens, are left out,
    as are user names, passwords and queries (signatures) in URLs."""
    values = frozen.as_dict(config)
    for name in ("setup", "sbatch"):
        if values["cluster"][name]:
            values["cluster"][name] = _HIDDEN
    return _mask(values)


def _start(run_dir: Path, config: Config) -> Any:
    if config.tracker.mode == "offline":
        # Without this W&B looks up a host of its own for error reports, even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        # Samples of the machine, its metadata and the list of packages: a second of start-up, and nobody's business.
        x_disable_stats=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    run = wandb.init(
        project=config.tracker.project,
        entity=config.tracker.entity,
        name=config.run.name,
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        mode=cast(Any, config.tracker.mode),
        config=without_secrets(config),
        settings=settings,
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _run_id(run_dir: Path) -> str:
    """The id in RUN/wandb_id; a new one where there is none yet."""
    path = run_dir / _ID_FILE
    if path.exists():
        kept = path.read_text().strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", kept):
            return kept
    new = uuid.uuid4().hex[:12]
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(new + "\n")
    os.replace(aside, path)
    return new


def _mask(value: Any) -> Any:
    if isinstance(value, str):
        return _QUERY_OF_URL.sub(r"\1?***", _CREDENTIALS_IN_URL.sub("***", value))
    if isinstance(value, dict):
        return {name: _mask(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_mask(item) for item in value]
    return value
