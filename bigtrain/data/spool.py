"""Tokens of documents on disk, in the order of the inputs, written so that a kill at any moment loses seconds at most.

    spool       of each document its tokens, then its metadata in JSON
    documents   a row of numbers a document (ROW_DTYPE): where in the spool it lies
    commits     a journal: how much of both counts, and which place in the inputs it reaches

A commit brings spool and documents to the disk and then adds its line. What lies behind the last line is cut off when
the folder is opened again, so reading goes on at that place as if nothing had happened.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bigtrain.data.journal import Entry, Journal, sync
from bigtrain.data.readers import Drops, Position

ROW_DTYPE = np.dtype(
    [
        ("tokens_at", "<u8"),  # offset in the spool, bytes; the metadata follow the tokens
        ("num_tokens", "<u4"),
        ("metadata_bytes", "<u4"),
        ("hash", "<u8"),  # of the text
    ]
)
COMMIT_BYTES, COMMIT_S = 64 << 20, 5.0
"""A commit is due after so much of the spool, or so much time."""


class Spool:
    """Open for appending behind the last commit that counts."""

    def __init__(self, folder: Path, *, unchanged_files: int) -> None:
        """`unchanged_files`: how many input files, from the first, are those of the earlier build. Commits that reach
        beyond them do not count."""
        self.path, self._rows_path = folder / "spool", folder / "documents"
        self._content = self.path.open("ab")
        self._rows = self._rows_path.open("ab")
        self._commits = Journal(folder / "commits")
        entries = self._commits.entries
        kept = next((n for n in range(len(entries), 0, -1) if self._counts(entries[n - 1], unchanged_files)), 0)
        self._commits.keep(kept)
        last = entries[kept - 1] if kept else _NOTHING
        self.position = Position(*last["position"])
        """In the inputs, behind the last document."""
        self.num_documents: int = last["documents"]
        self.bytes_read: int = last["bytes_read"]
        """Of the input files."""
        self.dropped = Drops(Counter(last["dropped"]), dict(last["examples"]))
        self._size: int = last["spool_bytes"]
        self._content.truncate(self._size)
        self._rows.truncate(self.num_documents * ROW_DTYPE.itemsize)
        sync(folder)
        self._committed_size, self._committed_at = self._size, time.monotonic()

    @property
    def has_commits(self) -> bool:
        """Whether there is something for a later build to go on with."""
        return bool(self._commits.entries)

    def append(
        self, content: Iterable[bytes], rows: np.ndarray, dropped: Drops, *, end: Position, bytes_read: int
    ) -> None:
        """Add documents (`rows`: ROW_DTYPE, with tokens_at counted in `content`) and what was left out among them, up
        to `end` in the inputs, `bytes_read` bytes behind the ones before."""
        rows["tokens_at"] += np.uint64(self._size)
        for part in content:
            self._content.write(part)
            self._size += len(part)
        self._rows.write(rows.tobytes())
        self.num_documents += len(rows)
        self.dropped.update(dropped)
        self.position, self.bytes_read = end, self.bytes_read + bytes_read
        if self._size - self._committed_size >= COMMIT_BYTES or time.monotonic() - self._committed_at >= COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """All that was appended is on the disk when this returns."""
        for file in (self._content, self._rows):
            file.flush()
            os.fsync(file.fileno())
        self._commits.append(
            {
                "position": list(self.position),
                "documents": self.num_documents,
                "spool_bytes": self._size,
                "bytes_read": self.bytes_read,
                "dropped": dict(self.dropped.counts),
                "examples": self.dropped.examples,
            }
        )
        self._committed_size, self._committed_at = self._size, time.monotonic()

    def close(self) -> None:
        for file in (self._content, self._rows, self._commits):
            file.close()

    def rows(self) -> np.ndarray:
        """ROW_DTYPE[documents], mapped from the disk; after a commit."""
        return np.memmap(self._rows_path, ROW_DTYPE, "r") if self.num_documents else np.zeros(0, ROW_DTYPE)

    def _counts(self, commit: Entry, unchanged_files: int) -> bool:
        """Whether its inputs are the same still, and its data lie on the disk."""
        position = Position(*commit["position"])
        return (
            (position.file < unchanged_files or position == (unchanged_files, 0))
            and self.path.stat().st_size >= commit["spool_bytes"]
            and self._rows_path.stat().st_size >= commit["documents"] * ROW_DTYPE.itemsize
        )


_NOTHING: Entry = {
    "position": [0, 0],
    "documents": 0,
    "spool_bytes": 0,
    "bytes_read": 0,
    "dropped": {},
    "examples": {},
}
