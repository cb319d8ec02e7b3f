"""The contenders of tools/bench/checkpoint.py: each saves what `State` holds to a folder, or fills it from one.

What a save returns from is on the disk: written by a direct write or fsynced, folders too. Imports come with the first
call; the bench makes that one of a toy state, outside the clock.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_state import PAGE, State, bytes_of

_BLOCK_BYTES = 8 << 20
STEP = 1


def save_raw(state: State, folder: Path) -> None:
    """The bytes as they lie in memory, buffered writes and one fsync."""
    _write(state, folder / f"{state.rank}.raw", 0)


def save_direct(state: State, folder: Path) -> None:
    """The same past the page cache."""
    _write(state, folder / f"{state.rank}.raw", os.O_DIRECT)


def _write(state: State, path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)
    tail = mmap.mmap(-1, PAGE)
    for flat in state.memory:
        view = bytes_of(flat)
        whole = len(view) // PAGE * PAGE
        for at in range(0, whole, _BLOCK_BYTES):
            block = view[at : min(at + _BLOCK_BYTES, whole)]
            if os.write(descriptor, block) != len(block):
                raise OSError(f"{path}: a short write")
        if len(view) > whole:  # each kind begins on a page of the file, for reads past the page cache
            tail[: len(view) - whole] = bytes(view[whole:])
            os.write(descriptor, tail)
    os.fsync(descriptor)
    os.close(descriptor)
    _sync(path.parent)


def save_torch(state: State, folder: Path) -> None:
    path = folder / f"{state.rank}.pt"
    torch.save(state.tensors(), path)
    _sync(path)
    _sync(folder)


def save_safetensors(state: State, folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / f"{state.rank}.safetensors"
    save_file(state.tensors(), path)
    _sync(path)
    _sync(folder)


def save_dcp(state: State, folder: Path) -> None:
    """As it comes: it fsyncs its files."""
    dcp.save(state.distributed(), checkpoint_id=folder, no_dist=state.world == 1)


def save_ours(state: State, folder: Path) -> None:
    from bigtrain.checkpoint import store

    store.save(folder, STEP, state.fragments(), _run_state())


def save_ours_unhashed(state: State, folder: Path) -> None:
    """Without the hashes of the tensors, to tell what they cost: such a checkpoint would not load."""
    from bigtrain.checkpoint import content_hash

    original, content_hash.of_rectangle = content_hash.of_rectangle, lambda *_: 0
    try:
        save_ours(state, folder)
    finally:
        content_hash.of_rectangle = original


def load_raw(state: State, folder: Path) -> None:
    """The bytes, straight into the memory where they are wanted."""
    descriptor, at = os.open(folder / f"{state.rank}.raw", os.O_RDONLY), 0
    for flat in state.memory:
        view, done = bytes_of(flat), 0
        while done < len(view):
            done += os.preadv(descriptor, [view[done : done + _BLOCK_BYTES]], at + done)
        at += -(-len(view) // PAGE) * PAGE
    os.close(descriptor)


def load_torch(state: State, folder: Path) -> None:
    _copy(torch.load(folder / f"{state.rank}.pt", mmap=False, weights_only=True), state)


def load_safetensors(state: State, folder: Path) -> None:
    from safetensors.torch import load_file

    _copy(load_file(folder / f"{state.rank}.safetensors"), state)


def load_dcp(state: State, folder: Path) -> None:
    dcp.load(state.distributed(), checkpoint_id=folder, no_dist=state.world == 1)


def load_ours_by_dcp(state: State, folder: Path) -> None:
    """torch's own reader on our checkpoint."""
    load_dcp(state, _ours_in(folder))


def load_ours(state: State, folder: Path) -> None:
    from bigtrain.checkpoint import store

    store.load(_ours_in(folder), state.fragments())


def load_ours_unchecked(state: State, folder: Path) -> None:
    """Our reader without the hashes."""
    from bigtrain.checkpoint.reader import SafeReader
    from bigtrain.checkpoint.slices import state_dict_of

    wanted = state_dict_of(state.fragments(), only_owned=False)
    dcp.load(wanted, storage_reader=SafeReader(_ours_in(folder)), no_dist=state.world == 1)


class OursInBackground:
    """As bigtrain/trainer/saver.py does it."""

    def __init__(self) -> None:
        from bigtrain.checkpoint.snapshot import Snapshot

        self._snapshot, self._thread = Snapshot(), ThreadPoolExecutor(1, "checkpoint")
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def __call__(self, state: State, folder: Path) -> Future[Any]:
        from bigtrain.checkpoint import store

        copies = self._snapshot.take(state.fragments())
        group = cast("dist.ProcessGroup | None", self._group)
        return self._thread.submit(store.save, folder, STEP, copies, _run_state(), group=group)


class DcpInBackground:
    """dcp.async_save as it comes, or with a stager that keeps its memory for the next save."""

    def __init__(self, *, keeps_memory: bool) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(False, False, False, False)  # the others want a GPU, or another process
        self._stager = DefaultStager(options) if keeps_memory else None

    def __call__(self, state: State, folder: Path) -> Future[Any]:
        single = state.world == 1
        found = dcp.async_save(state.distributed(), checkpoint_id=folder, async_stager=self._stager, no_dist=single)
        if not isinstance(found, Future):
            found.staging_completion.result()
            found = found.upload_completion
        return found


Act = Callable[[State, Path], None]
SAVES: dict[str, tuple[bool, Act]] = {
    "raw": (True, save_raw),
    "direct": (True, save_direct),
    "torch.save": (False, save_torch),
    "safetensors": (False, save_safetensors),
    "dcp": (False, save_dcp),
    "ours": (True, save_ours),
    "ours-unhashed": (True, save_ours_unhashed),
}
"""By name: whether its state is flat, and the save."""
LOADS: dict[str, tuple[bool, str, Act]] = {
    "raw": (True, "raw", load_raw),
    "torch.load": (False, "torch.save", load_torch),
    "safetensors": (False, "safetensors", load_safetensors),
    "dcp": (False, "dcp", load_dcp),
    "dcp-of-ours": (False, "ours", load_ours_by_dcp),
    "ours": (True, "ours", load_ours),
    "ours-unchecked": (True, "ours", load_ours_unchecked),
}
"""By name: whether its state is flat, whose files it reads, and the load."""
ASYNC: dict[str, tuple[bool, Callable[[], Callable[[State, Path], Future[Any]]]]] = {
    "dcp": (False, lambda: DcpInBackground(keeps_memory=False)),
    "dcp-kept": (False, lambda: DcpInBackground(keeps_memory=True)),
    "ours": (True, OursInBackground),
}
"""By name: whether its state is flat, and what starts saves, one after the other."""


def copied(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    for path in [*out.rglob("*"), out]:
        _sync(path)


def resharded(source: Path, out: Path, num_files: int = 0) -> None:
    from bigtrain.checkpoint.reshard import plan, reshard

    reshard(plan(_ours_in(source), num_files=num_files), out)


RESHARDS: dict[str, Callable[[Path, Path], None]] = {
    "copy": copied,
    "ours": resharded,
    "ours-4-files": partial(resharded, num_files=4),
}
PARTS: dict[str, dict[str, Any]] = {"save": SAVES, "load": LOADS, "async": ASYNC, "reshard": RESHARDS}


def _run_state() -> dict[str, Any]:
    from bigtrain.checkpoint import folder

    return {"format": folder.FORMAT, "step": STEP}


def _ours_in(folder: Path) -> Path:
    from bigtrain.checkpoint import folder as folders

    return folders.path_of(folder, STEP)


def _copy(loaded: dict[str, torch.Tensor], state: State) -> None:
    for name, tensor in state.tensors().items():
        tensor.copy_(loaded[name])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
