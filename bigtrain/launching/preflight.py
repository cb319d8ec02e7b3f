"""What the disks and this machine say about a config, before any rank starts. Reads only; no torch."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from bigtrain import config as configs
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest
from bigtrain.config import keys, locations
from bigtrain.config.check import Problem, get
from bigtrain.config.errors import UserError
from bigtrain.config.frozen import FILE
from bigtrain.config.same_run import difference
from bigtrain.config.schema import Config
from bigtrain.launching import init_from, machine, time_limit
from bigtrain.launching.slurm import SUBMISSION
from bigtrain.launching.slurm_script import slurm_folder
from bigtrain.launching.wandb_key import has_wandb_key

UNCHANGING = [
    "run.dir",
    "dry_run",
    "data.num_workers",
    "data.on_change",
    "data.cache.",
    "data.remote.",
    "data.ledger",
    "parallel.gather",
    "train.recompute",
    "train.stop_after",
    "cluster.",
    "watchdog.",
    "anomaly.",
    "tracker.",
    "checkpoint.",
    "eval.",
]
"""Keys (and groups, with a dot) that may differ when a run goes on: they change where and how often, not what."""


def preflight(config: Config, *, prepared: bool) -> list[Problem]:
    """Every problem that can be seen from here. `prepared`: data.prepare has run, or is not asked for."""
    return [
        *_run_folder(config),
        *_resume(config),
        *init_from.problems(config),
        *_login(config),
        *time_limit.problems(config),
        *(_device(config) if config.cluster.kind == "local" else ()),
        *(_prepared_data(config) if prepared else _inputs(config)),
    ]


def has_begun(run_dir: Path) -> bool:
    """Whether a run has left anything that belongs to its config: a step, a checkpoint, a job in the queue. One that
    failed before its first step has not, so its config may be corrected under the same name."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or (checkpoints.is_dir() and next(checkpoints.iterdir(), None) is not None)
        or any(slurm_folder(run_dir).glob(f"*{SUBMISSION}"))
    )


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every key that would make another run. A constant learning rate may go on for longer."""
    changed: list[tuple[str, Any, Any]] = []
    for key in keys.all_keys():
        before, now = get(old, key.path), get(new, key.path)
        if before == now or any(
            key.path == name or (name[-1] == "." and key.path.startswith(name)) for name in UNCHANGING
        ):
            continue
        longer = key.path == "train.num_steps" and now > before and new.schedule.name == "constant"
        mixture = key.path == "data.train" and new.data.on_change == "accept"
        if not longer and not mixture:
            changed.append((key.path, before, now))
    return changed


def _run_folder(config: Config) -> Iterator[Problem]:
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        yield Problem("run.dir", folder, "is a file", "Choose another run.dir or run.name")
    if not (folder / FILE).is_file() or not has_begun(folder):
        return
    changed = differences(configs.load(folder), config)
    if changed:
        listed = "; ".join(f"{key} is {before} there, {now} now" for key, before, now in changed)
        yield Problem(
            "run.dir",
            folder,
            f"holds a run of another config: {listed}",
            "Set run.name to another name, or keep the old values",
        )


def _resume(config: Config) -> Iterator[Problem]:
    resume, run_dir = config.checkpoint.resume, Path(config.run.dir)
    own = folders.committed(run_dir / "checkpoints")
    named = Path(resume).resolve()
    is_older_own = named in [path.resolve() for path in own[:-1]]
    if own and (resume == "never" or is_older_own):
        message = f"the run's folder has checkpoints up to {own[-1].name}, which starting elsewhere would overwrite"
        yield Problem("checkpoint.resume", resume, message, "Choose another run.name, or move those away")
    if resume in ("auto", "never") or own or "://" in resume:
        return
    try:
        found, *older = folders.candidates(Path(resume))
        state = folders.state_of(found)
    except UserError as error:
        message = str(error).removeprefix(f"checkpoint {resume}: ").rstrip(".")
        yield Problem("checkpoint.resume", resume, message, "Write auto, never or the folder of a checkpoint")
        return
    wrong = None if older else manifest.problems(found)  # of a run the ranks take an older one
    if state.get("weights_only"):
        message = "it has weights only, and no place in the data"
        yield Problem("checkpoint.resume", resume, message, "Set checkpoint.init_from instead")
    elif wrong and wrong.damage:
        message = f"it is not what was saved: {'; '.join(wrong.damage)}"
        yield Problem("checkpoint.resume", resume, message, "Put the file back, or name another checkpoint")
    elif wrong and wrong.unknown:
        message = f"it cannot be checked: {wrong.unknown}"
        yield Problem("checkpoint.resume", resume, message, "Make it readable, or name another checkpoint")
    elif changed := difference(config, state.get("config", {})):
        key, saved, wanted = changed
        message = f"it is of another run: {key} is {saved} there, {wanted} here"
        yield Problem("checkpoint.resume", resume, message, f"Set {key}={saved}")


def _login(config: Config) -> Iterator[Problem]:
    """W&B asks for a key only once the ranks run, and a run without one leaves nothing to upload later."""
    tracker = config.tracker
    if tracker.kind == "wandb" and tracker.mode == "online" and not has_wandb_key():
        yield Problem(
            "tracker.mode",
            tracker.mode,
            "there is no W&B key for it, neither in WANDB_API_KEY nor in ~/.netrc",
            "Run wandb login, or set tracker.mode=offline and upload later with wandb sync",
        )


def _device(config: Config) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.device == "cpu":
        return
    if machine.torch_is_cpu_build():
        message = "the installed torch is a build without CUDA"
        yield Problem(
            "cluster.device", cluster.device, message, "Install a CUDA build of torch, or set cluster.device=cpu"
        )
        return
    found = machine.count_gpus()
    if found < cluster.procs_per_node or not found:
        fix = f"Set cluster.procs_per_node={found}" if found else "Set cluster.device=cpu"
        message = f"this machine shows {found} GPUs, and every rank needs one"
        yield Problem("cluster.procs_per_node", cluster.procs_per_node, message, fix)


def _inputs(config: Config) -> Iterator[Problem]:
    """Before data.prepare runs: its inputs, and whatever it will not make."""
    out = Path(config.data.prepare.out)
    for key, path in _shards(config):
        if not Path(path).is_relative_to(out) and not _names_tars(path):
            yield from _missing(key, path)
    if config.tokenizer.kind == "file":
        yield from _missing_tokenizer(config)
    if _is_prepared(config):
        return
    for pattern in config.data.prepare.inputs:
        if "://" not in pattern and next(glob.iglob(pattern, recursive=True), None) is None:
            message = "no file matches"
            yield Problem("data.prepare.inputs", pattern, message, "Name files of text, or a pattern in quotes")


def _is_prepared(config: Config) -> bool:
    paths = [config.tokenizer.path, *(path for _, path in _shards(config))]
    return all(locations.is_remote(path) or Path(path).exists() for path in paths)


def _prepared_data(config: Config) -> Iterator[Problem]:
    """The folders of shards and the tokenizer are there, and go with the model and the lanes."""
    yield from _missing_tokenizer(config)
    lanes, rows = config.data.num_lanes, config.model.vocab_size
    num_pieces = 0
    for key, path in _shards(config):
        if _names_tars(path):
            continue  # its names are looked up where it is opened
        yield from _missing(key, path)
        index = totals_of(path)
        num_pieces = max(num_pieces, index.get("vocab_size", 0))
        documents = index.get("num_documents", lanes)
        if key.startswith("data.train") and documents < lanes:
            message = f"{path} has {documents} documents, too few: each lane needs one"
            yield Problem("data.num_lanes", lanes, message, "Give it more text, or lower data.num_lanes")
    if num_pieces > rows:
        message = f"the tokenizer of the data has {num_pieces} pieces"
        yield Problem("model.vocab_size", rows, message, f"Set model.vocab_size={num_pieces} or more")


def _shards(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every folder of shards on this file system."""
    for split, sources in (("train", config.data.train), ("valid", config.data.valid)):
        for number, source in enumerate(sources):
            if not locations.is_remote(source.path):
                yield f"data.{split}.{number}.path", locations.local(source.path)


def _names_tars(path: str) -> bool:
    """Whether this is raw text: a name of tars, or a folder of them without an index."""
    folder = Path(path)
    in_folder = folder.is_dir() and not (folder / "index.json").exists() and any(folder.glob("*.tar"))
    return path.endswith(".tar") or in_folder


def _missing_tokenizer(config: Config) -> Iterator[Problem]:
    path = config.tokenizer.path
    if init_from.will_copy_tokenizer(config):
        return
    if not locations.is_remote(path) and not Path(path).exists():
        fix = "Train one with tools/tokenizer.py train, or name another"
        yield Problem("tokenizer.path", path, "no such file", fix)


def _missing(key: str, path: str) -> Iterator[Problem]:
    if not Path(path).is_dir():
        fix = "Build it with tools/shards.py build, or let the launch do it: data=text data.prepare.inputs=[FOLDER]"
        yield Problem(key, path, "no such folder", fix)
    elif not (Path(path) / "index.json").is_file():
        yield Problem(key, path, "it has no index.json, so it is no finished folder of shards", "Build it again")


def totals_of(path: str) -> dict[str, int]:
    """The totals of a folder of shards; empty where they cannot be read, which the reader of the data reports."""
    try:
        values: Any = json.loads((Path(path) / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in cast(dict[str, Any], values).items() if isinstance(value, int)}
