"""A file that is written once, from front to back: hashed on the way, past the page cache, durable on close.

A checkpoint is as large as memory and nobody reads it soon. Written through the page cache it pushes out what is read,
is copied once more, and its first fsync waits for all of it. With O_DIRECT the disk takes full blocks from two buffers,
one being filled while the other is written. Where a file system refuses O_DIRECT, the same blocks go the usual way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from bigtrain.checkpoint.manifest import File

BLOCK_BYTES = 8 << 20
_PAGE = mmap.PAGESIZE
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """Takes `write` like a file; `close` returns what was written. Two blocks of memory. Raises OSError."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems make the file before they refuse
            self._fd = os.open(path, flags, 0o666)
        self._blocks = [mmap.mmap(-1, BLOCK_BYTES), mmap.mmap(-1, BLOCK_BYTES)]
        self._filled, self._size = 0, 0
        self._hash = xxhash.xxh3_64()
        self._writer = ThreadPoolExecutor(1, "checkpoint-write")
        self._pending: Future[None] | None = None

    def tell(self) -> int:
        return self._size

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = min(len(view) - done, BLOCK_BYTES - self._filled)
            piece = view[done : done + count]
            self._hash.update(piece)  # a block at a time, so that the disk never waits for long
            self._blocks[0][self._filled : self._filled + count] = piece
            self._filled += count
            done += count
            if self._filled == BLOCK_BYTES:
                self._send(BLOCK_BYTES)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing to do: `close` makes it durable."""

    def close(self) -> File:
        """Write what is left and make it durable."""
        try:
            if self._filled:
                self._send(-(-self._filled // _PAGE) * _PAGE)
            self._wait()
            os.ftruncate(self._fd, self._size)
            os.fsync(self._fd)
        finally:
            self.abandon()
        return File(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Let go of it, finished or not."""
        self._writer.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _send(self, count: int) -> None:
        self._wait()
        self._pending = self._writer.submit(self._put, self._blocks[0], count)
        self._blocks.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _put(self, block: mmap.mmap, count: int) -> None:
        with memoryview(block) as view:
            done = 0
            while done < count:
                try:
                    done += os.write(self._fd, view[done:count])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._is_direct():
                        raise
                    flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                    fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)

    def _is_direct(self) -> bool:
        return bool(_DIRECT) and bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & _DIRECT)
