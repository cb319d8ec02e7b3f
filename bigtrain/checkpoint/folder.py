"""The checkpoints/ folder of a run: which checkpoints are there, which count, which go.

``step-00000100/`` holds the tensors, state.json (step, place in the data, config, versions) and the tokenizer, so it
can be carried elsewhere. It counts only with the file COMMITTED in it, written last. It is built as
``.step-00000100.partial/`` and renamed. Nothing here knows tensors or ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

from bigtrain.config.errors import UserError

COMMITTED = "COMMITTED"
STATE = "state.json"
FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")


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
    if step_of(path) is not None:
        if not path.is_dir():
            raise UserError(f"checkpoint {path}: there is no such folder")
        if not (path / COMMITTED).is_file():
            raise UserError(f"checkpoint {path}: it was never committed (no {COMMITTED} in it); use an older one")
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise UserError(f"checkpoint {path}: no committed checkpoint (step-NNNNNNNN/{COMMITTED}) in there")
    return found


def commit(root: Path, step: int, state: dict[str, Any], files: dict[str, bytes] | None = None) -> Path:
    """Make the finished partial folder of `step` count: state, rename, COMMITTED, each made durable before the next.

    `files`: by name, what else goes into the folder."""
    partial, final = partial_of(root, step), path_of(root, step)
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
    for name, content in (files or {}).items():
        (partial / name).write_bytes(content)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():  # left by a run that was killed between the rename and COMMITTED
        shutil.rmtree(final)
    partial.rename(final)
    _sync(root)
    (final / COMMITTED).touch()
    _sync(final / COMMITTED)
    _sync(final)
    return final


def state_of(folder: Path) -> dict[str, Any]:
    """The JSON beside the tensors. Raises UserError where it is missing, damaged or of another format."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: {STATE} cannot be read ({error})") from error
    found = cast("dict[str, Any]", state if isinstance(state, dict) else {})
    if found.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder}: {STATE} is of another format; this version reads format {FORMAT}")
    return found


def prune(root: Path, keep: int) -> None:
    """Delete all but the `keep` newest committed checkpoints, and folders that were never finished."""
    for old in committed(root)[: -max(keep, 1)]:
        (old / COMMITTED).unlink()  # from here on it does not count
        shutil.rmtree(old)
    for partial in root.glob(".step-*.partial"):
        shutil.rmtree(partial)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
