"""The checkpoints/ folder of a run: which checkpoints are there, which count, which go.

``step-00000100/`` holds the tensors, state.json (step, place in the data, config, versions), the tokenizer and
manifest.json (hashes of all that), so it can be carried elsewhere. It counts only with the file COMMITTED in it,
written last. It is built as ``.step-00000100.partial/`` and renamed; then the link ``latest`` is turned to it, and only
then do older ones go. One that was found damaged is put aside as ``damaged-step-00000100/``. Nothing here knows tensors
or ranks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bigtrain.checkpoint.manifest import (
    COMMITTED,
    INDEX,
    MANIFEST,
    DamagedCheckpoint,
    File,
    Manifest,
    Tensor,
    file_of,
    hash_of,
)
from bigtrain.config.errors import UserError

STATE = "state.json"
LATEST = "latest"
HF_SETTINGS = "config.json"
"""What a Hugging Face folder has, and no checkpoint of ours."""
FORMAT = 3
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"\.step-\d{8,}\.partial")


def path_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def partial_of(root: Path, step: int) -> Path:
    return root / f".step-{step:08d}.partial"


def step_of(folder: Path) -> int | None:
    """Steps of a checkpoint by its folder's name; None for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if step_of(p) is not None and (p / COMMITTED).is_file()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def newest(root: Path) -> Path | None:
    """The newest committed checkpoint."""
    return next(reversed(committed(root)), None)


def resolve(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint's folder, a run's folder or its checkpoints/ (then the newest).

    Raises UserError where there is none, or where it was never committed."""
    return candidates(path)[0]


def candidates(path: Path) -> list[Path]:
    """As `resolve`, and behind it the older ones that would do where a run was named and its newest is damaged."""
    path = followed(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: there is no such folder")
    is_one = step_of(path) is not None or is_checkpoint(path)
    if is_one and (path / COMMITTED).is_file():
        return [path]
    found = committed(path / "checkpoints") or committed(path)
    if found:
        return found[::-1]
    if is_hugging_face(path):
        make = f"python tools/checkpoint.py import-hf {path} CKPT"
        raise UserError(f"checkpoint {path}: it is a Hugging Face folder. Make a checkpoint of it: {make}")
    if is_one:
        raise UserError(f"checkpoint {path}: it was never committed (no {COMMITTED} in it); use an older one")
    raise UserError(f"checkpoint {path}: no committed checkpoint (step-NNNNNNNN/{COMMITTED}) in there")


def followed(path: Path) -> Path:
    """What the link `latest` means; any other path as it is."""
    if path.name == LATEST and path.is_symlink():
        return path.parent / path.readlink() if path.exists() else path.parent  # killed as it was turned
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder, of any name, is or was a checkpoint of ours: also one that does not count, or lost files."""
    return any((path / name).is_file() for name in (STATE, MANIFEST, INDEX))


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is a model as Transformers keeps it."""
    return (path / HF_SETTINGS).is_file() and not (path / STATE).is_file()


def prepare(root: Path, step: int, size_bytes: int) -> Path:
    """An empty partial folder for `step`; what killed saves and deletions left is deleted.

    Raises OSError where the disk has no room for `size_bytes`: nothing is written then."""
    for left in list(root.iterdir()) if root.is_dir() else ():
        is_ours = _PARTIAL.fullmatch(left.name) or (step_of(left) is not None and not (left / COMMITTED).exists())
        if is_ours and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
    partial = partial_of(root, step)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(root).free
    if free < size_bytes:
        partial.rmdir()
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint of step {step} takes {size_bytes / 1e9:.3g} GB, {root} has {free / 1e9:.3g} GB free",
        )
    return partial


def drop_partial(root: Path, step: int) -> None:
    """Delete what a save that failed has written. For the rank that commits."""
    shutil.rmtree(partial_of(root, step), ignore_errors=True)
    if not (path_of(root, step) / COMMITTED).exists():
        shutil.rmtree(path_of(root, step), ignore_errors=True)


def commit(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    written: Mapping[str, File] | None = None,
) -> Path:
    """Make the finished partial folder of `step` count, each act durable before the next: state and manifest, the
    rename, COMMITTED, `latest`.

    `files`: by name, what else goes into the folder. `tensors` and `written`: what was written there, durable already;
    files that `written` does not name are hashed here."""
    partial, final = partial_of(root, step), path_of(root, step)
    _write(partial / STATE, (json.dumps(state, indent=1) + "\n").encode())
    for name, content in (files or {}).items():
        _write(partial / name, content)
    known = dict(written or {})
    for file in partial.iterdir():
        if file.name not in known:
            sync(file)
            known[file.name] = file_of(file)
    manifest = Manifest(dict(tensors or {}), known).to_json()
    _write(partial / MANIFEST, manifest)
    sync(partial)
    if final.exists():  # of a run that went back behind this step
        _delete(final)
    partial.rename(final)
    sync(root)
    marker = final / f".{COMMITTED}.partial"  # on a full disk it would be there, and empty
    _write(marker, f"{hash_of(manifest)}\n".encode())
    marker.rename(final / COMMITTED)
    sync(final)
    with contextlib.suppress(OSError):  # it counts already, and not every file system has links
        _turn_latest(root, final)
    return final


def _delete(folder: Path) -> None:
    """From the first act on it does not count."""
    (folder / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _turn_latest(root: Path, target: Path) -> None:
    link = root / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.rename(root / LATEST)
    sync(root)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is deleted; returns where it is now."""
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (folder.with_name(f"damaged-{folder.name}{suffix}") for suffix in suffixes)
    aside = next(name for name in names if not name.exists())
    older = [path for path in committed(folder.parent) if path != folder]
    with contextlib.suppress(OSError):
        if older:
            _turn_latest(folder.parent, older[-1])
        else:
            (folder.parent / LATEST).unlink(missing_ok=True)
    folder.rename(aside)
    sync(folder.parent)
    return aside


def state_of(folder: Path) -> dict[str, Any]:
    """The JSON beside the tensors. Raises UserError where it is missing, damaged or of another format."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {STATE} cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"checkpoint {folder}: {STATE} cannot be read ({error.strerror})") from error
    found = cast("dict[str, Any]", state if isinstance(state, dict) else {})
    if found.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder}: {STATE} is of another format; this version reads format {FORMAT}")
    return found


@dataclass(frozen=True)
class Keep:
    """Which committed checkpoints are kept; 0 for none of a kind."""

    newest: int = 2
    every: int = 0
    """Those whose step is a multiple of this."""
    best: int = 0
    """Those with the lowest held-out loss, of those that were evaluated at their step."""


def superseded(checkpoints: Iterable[tuple[int, float | None]], keep: Keep) -> set[int]:
    """Steps of the checkpoints that go. `checkpoints`: step and held-out loss; the newest always stays."""
    there = sorted(checkpoints, key=lambda each: each[0])
    by_loss = sorted((loss, -step) for step, loss in there if loss is not None and math.isfinite(loss))
    kept = {step for step, _ in there[-max(keep.newest, 1) :]}
    kept |= {step for step, _ in there if keep.every and step % keep.every == 0}
    kept |= {-step for _, step in by_loss[: keep.best]}
    return {step for step, _ in there} - kept


def prune(root: Path, keep: Keep) -> None:
    """Delete the committed checkpoints that are superseded. What cannot be deleted now is left to the next save."""
    with contextlib.suppress(OSError):
        for step in superseded([(step_of(path) or 0, loss_of(path)) for path in committed(root)], keep):
            _delete(path_of(root, step))


def loss_of(folder: Path) -> float | None:
    """The held-out loss that a checkpoint notes; None where it was not evaluated at its step, or cannot be read."""
    try:
        loss = state_of(folder).get("loss")
    except UserError:
        return None
    return float(loss) if isinstance(loss, int | float) else None


def _write(path: Path, content: bytes) -> None:
    """Write a file, durable on return."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
