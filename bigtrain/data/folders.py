"""The files of a shard folder as arrays of bytes, wherever the folder lies: on a disk, or remote behind a cache."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.locations import Location
from bigtrain.config.schema import DataConfig
from bigtrain.data import remote
from bigtrain.data.cache import Cache
from bigtrain.data.remote import Expected, Policy

_FILES_OF_THE_REST = 512
_MANY_FILES = 1 << 20
_LARGEST_UNHASHED_BYTES = 1 << 30
_CACHE_GB = 100.0
_SHARDS_AT_A_TIME = 4


class Folder(Protocol):
    """A shard folder."""

    name: str
    """To show in messages; holds no secret."""
    is_remote: bool

    def read(self, file: str) -> bytes:
        """A small file whose content is not known before. Raises OSError or UserError."""
        ...

    def map(
        self, file: str, *, sha256: str | None, max_bytes: int, size_bytes: int | None = None, hold: bool = True
    ) -> np.ndarray:
        """A file with this content (None: whatever is there), uint8[size], read-only. `hold`: it will be asked for
        again soon.

        Remote files are checked against the sha256 when they are fetched, those on a disk by `verify` only. Raises
        OSError or UserError."""
        ...


class LocalFolder:
    """On a disk of this machine."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def map(
        self, file: str, *, sha256: str | None, max_bytes: int, size_bytes: int | None = None, hold: bool = True
    ) -> np.ndarray:
        path = self.path / file
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)


class RemoteFolder:
    """Behind a cache."""

    is_remote = True

    def __init__(self, location: Location, cache: Cache, policy: Policy) -> None:
        self.name = location.name
        self.cache = cache
        self._location, self._policy = location, policy

    def read(self, file: str) -> bytes:
        return remote.read(self._location, file, Expected(_LARGEST_UNHASHED_BYTES), policy=self._policy)

    def map(
        self,
        file: str,
        *,
        sha256: str | None,
        max_bytes: int,
        size_bytes: int | None = None,
        hold: bool = True,
        reserve_bytes: int | None = None,
        cancelled: threading.Event | None = None,
    ) -> np.ndarray:
        """`reserve_bytes`: what the cache makes room for, where that is less than `max_bytes`."""
        expected = Expected(max_bytes, size_bytes, sha256)
        # A file without a known hash is kept by its place: what is there is taken not to change.
        place = hashlib.sha256(f"{self._location.text}\n{file}".encode()).hexdigest()
        return self.cache.map(
            sha256 or place,
            lambda out: remote.fetch(self._location, file, out, expected, policy=self._policy, cancelled=cancelled),
            reserve_bytes=min(reserve_bytes, self.cache.max_bytes // 4) if reserve_bytes else max_bytes,
            size_bytes=size_bytes,
            hold=hold,
        )


class Places:
    """How remote folders of a run are read: the cache that they share, and how patient a fetch is."""

    def __init__(self, cache: Cache | None = None, policy: Policy | None = None) -> None:
        """Without `cache` the one in the user's cache folder."""
        self.cache = cache or Cache(default_cache_dir(), max_bytes=int(_CACHE_GB * 1e9))
        self.policy = policy or Policy()

    @staticmethod
    def of(data: DataConfig) -> Places:
        folder = Path(data.cache.dir) if data.cache.dir else default_cache_dir()
        cache = Cache(folder, max_bytes=int(data.cache.max_gb * 1e9))
        return Places(cache, Policy(timeout_s=data.remote.timeout_s, retries=data.remote.retries))

    def open(self, path: str | os.PathLike[str]) -> Folder:
        """Raises UserError where `path` is no place."""
        text = os.fspath(path)
        try:
            location = locations.parse(text)
        except ValueError as error:
            raise UserError(f"data {locations.shown(text)}: {error}.") from None
        if location.is_remote:
            return RemoteFolder(location, self.cache, self.policy)
        return LocalFolder(Path(location.text))

    def read_file(self, path: str) -> bytes:
        """A remote file, FOLDER/NAME. Raises UserError."""
        folder, name = locations.split_file(path)
        try:
            return self.open(folder).read(locations.check_file(name))
        except ValueError as error:
            raise UserError(f"{locations.shown(path)}: {error}.") from None


def default_cache_dir() -> Path:
    """bigtrain/ in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bigtrain"


def allow_open_files(number: int) -> None:
    """Make sure that this process can hold `number` memory-mapped files: each map keeps its file open, and the usual
    limit is 1024. Raises this process's limit where that is near. Raises UserError where the system does not let it."""
    soft, hard = (_MANY_FILES if limit == resource.RLIM_INFINITY else limit for limit in _open_files_limits())
    if number > soft // 4:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MANY_FILES)), _open_files_limits()[1]))
    if number + _FILES_OF_THE_REST > hard:
        raise UserError(
            f"the data are {number} files, and a process may have {hard} open here (ulimit -Hn). Raise that, or build "
            "fewer and larger shards (tools/shards.py build --shard-tokens)."
        )


def _open_files_limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def check_room(cache: Cache, sizes: Sequence[Sequence[int]], fixed_bytes: int) -> None:
    """Raises UserError where the cache cannot hold what a run reads at a time: a few shards of each source, beside
    `fixed_bytes` that are in use all the time. `sizes`: bytes of the shards of each source."""
    needed = fixed_bytes + sum(min(sum(each), _SHARDS_AT_A_TIME * max(each, default=0)) for each in sizes)
    if needed > cache.max_bytes:
        raise UserError(
            f"data.cache.max_gb={cache.max_bytes / 1e9:g} is too small for these shards: a run reads a few of each "
            f"source at a time. Set it to {math.ceil(needed / 1e8) / 10:g} or more."
        )
