"""Files of remote shards on this machine, shared by all ranks and jobs that name the same folder.

    FOLDER/SHA256                  a whole file, named by its content
    FOLDER/SHA256.BYTES.part       one that is being fetched, and the bytes that are kept free for it
    FOLDER/.lock                   held while files are removed

The content is the name, so nothing is ever out of date, and two places with the same shard share one copy. Whoever
fetches a file holds a lock (flock) on its .part; others wait for it. The .part takes its final name only when every
byte is checked and on the disk: a crash at any moment leaves nothing, or a .part that the next one who wants the file
goes on with.

A file that is memory-mapped is locked through the map itself, so the lock ends with the map, or with its process. When
space is needed, the files that were used least recently go, but not those in use: their space would not come free.
Where all others are in use, the limit is exceeded by what is needed now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtrain.config.errors import UserError

_POLL_S, _TELL_AFTER_S = 0.05, 60.0
_HELD_MAPS = 16
_HELD_SHARE = 0.25
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"[0-9a-f]{64}(?:\.(\d+)\.part)?")
_log = logging.getLogger(__name__)

Fill = Callable[[io.FileIO], None]
"""Completes a file that is open for reading and writing, or raises; what is in it already is its beginning."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    size_bytes: int
    used: float
    """When, in seconds since the epoch."""


class Cache:
    """A folder of files with a limit on their bytes. Safe to use from many threads, processes and jobs."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """The folder is made when it is needed first."""
        self.folder, self.max_bytes = folder, max_bytes
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        """Maps of the files used last, so that using them again costs nothing."""
        self._fetched: set[str] = set()
        self._guard = threading.Lock()

    def map(self, sha256: str, fill: Fill, *, reserve_bytes: int, size_bytes: int | None, hold: bool) -> np.ndarray:
        """The file with this content, as uint8[size], read-only; where it is not there, `fill` fetches it.

        `reserve_bytes`: at least its size. `hold`: keep it mapped for the next time. Raises UserError where the folder
        cannot be used, and whatever `fill` raises."""
        with self._guard:
            held = self._held.get(sha256)
            if held is not None:
                self._held.move_to_end(sha256)
                return held
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._map_or_fetch(sha256, fill, reserve_bytes, size_bytes)
        except OSError as error:
            raise UserError(
                f"data.cache.dir={self.folder}: {error.strerror or error}. Set data.cache.dir to a folder on a disk of "
                "this machine with space."
            ) from error
        if hold:
            self._hold(sha256, found)
        return found

    def _hold(self, name: str, found: np.ndarray) -> None:
        """Keep the newest maps: not many, and not so much that it could not be removed where space is needed."""
        with self._guard:
            self._held[name] = found
            size = sum(len(each) for each in self._held.values())
            while len(self._held) > 1 and (len(self._held) > _HELD_MAPS or size > self.max_bytes * _HELD_SHARE):
                dropped, gone = self._held.popitem(last=False)
                size -= len(gone)
                self._touch([dropped])

    def _map_or_fetch(self, name: str, fill: Fill, reserve_bytes: int, size_bytes: int | None) -> np.ndarray:
        final, part = self.folder / name, self.folder / f"{name}.{reserve_bytes}.part"
        tell_at = time.monotonic() + _TELL_AFTER_S
        while True:
            found = _map_file(final, size_bytes)
            if found is not None:
                return found
            with _open(part) as out:
                if not _try_lock(out) or not _is_still(out, part):
                    time.sleep(_POLL_S)  # another fetches it, or has just done so
                    if time.monotonic() > tell_at:
                        tell_at += _TELL_AFTER_S
                        _log.warning("waiting for another process that fetches %s (fuser tells which)", part)
                elif not final.exists():
                    self._warn_of_thrashing(name)
                    self._make_room()
                    self._fill(fill, out, reserve_bytes)
                    os.fsync(out.fileno())
                    os.replace(part, final)
                    self._fetched.add(name)
                    fcntl.flock(out, fcntl.LOCK_SH)
                    return _map_open(out)
                else:
                    part.unlink()

    def _fill(self, fill: Fill, out: io.FileIO, reserve_bytes: int) -> None:
        try:
            fill(out)
        except OSError as error:  # the disk has less room than the limit says
            if error.errno not in _NO_SPACE or not self._free(reserve_bytes):
                raise
            fill(out)

    # Room --------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Remove what was used least recently until all files, with those on their way, are within the limit."""
        with self._guard:
            self._touch(self._held)
        with self._only_one():
            over = sum(entry.size_bytes for entry in self._entries()) - self.max_bytes
            over -= _remove(self._entries(), over)
            if over > 0 and self._let_go():
                _remove(self._entries(), over)

    def _free(self, num_bytes: int) -> bool:
        """Remove files of so many bytes. Returns whether any went."""
        with self._only_one():
            self._let_go()
            return _remove(self._entries(), num_bytes) > 0

    def _let_go(self) -> bool:
        """Give up this process's maps but the newest. Returns whether there were any."""
        with self._guard:
            dropped = list(self._held)[:-1]
            for name in dropped:
                del self._held[name]
        return bool(dropped)

    def _entries(self) -> list[_Entry]:
        """Least recently used first."""
        found: list[_Entry] = []
        for item in os.scandir(self.folder):
            match = _NAME.fullmatch(item.name)
            with contextlib.suppress(FileNotFoundError):
                if match and item.is_file(follow_symlinks=False):
                    status = item.stat()
                    size = max(status.st_size, int(match[1] or 0))
                    found.append(_Entry(Path(item.path), size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        with _open(self.folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _touch(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # gone, or of another user
                os.utime(self.folder / name)

    def _warn_of_thrashing(self, name: str) -> None:
        if name in self._fetched:
            _log.warning(
                "data.cache.max_gb=%g is too small: a file that was in the cache is fetched again. A step needs more "
                "shards than the cache holds.",
                self.max_bytes / 1e9,
            )


def _remove(entries: list[_Entry], num_bytes: int) -> int:
    """Remove entries that nobody uses, in their order, until so many bytes are free. Returns how many are."""
    freed = 0
    for entry in entries:
        if freed >= num_bytes:
            break
        with contextlib.suppress(OSError), entry.path.open("rb") as file:  # gone, or of another user
            if _try_lock(file):
                entry.path.unlink()
                freed += entry.size_bytes
    return freed


def _map_file(path: Path, size_bytes: int | None) -> np.ndarray | None:
    """The file, locked as in use; None where it is not there."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            if status.st_nlink == 0:  # removed a moment ago
                return None
            if size_bytes is not None and status.st_size != size_bytes:  # cut short by someone else
                path.unlink()
                return None
            with contextlib.suppress(OSError):
                os.utime(path)
            return _map_open(file)
    except FileNotFoundError:
        return None


def _map_open(file: io.FileIO | io.BufferedReader) -> np.ndarray:
    """The map has a descriptor of its own for the same open file, so the file's lock lasts as long as the map."""
    if not os.fstat(file.fileno()).st_size:
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _open(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def _try_lock(file: io.FileIO | io.BufferedReader) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: io.FileIO | io.BufferedReader, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
