"""Files that outlive a kill: a journal of JSON lines, and small files that are written in one step."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """Each line is whole and on the disk, or it and all behind it are not there: opening cuts off what a kill tore."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = list(_whole_lines(path))
        self.entries: list[Entry] = [json.loads(line[9:]) for line in lines]
        """Those that were there when the file was opened."""
        self._file = path.open("ab")
        self._file.truncate(sum(map(len, lines)))
        self._ends = [len(line) for line in lines]

    def keep(self, number: int) -> None:
        """The first `number` entries, and no others."""
        del self.entries[number:], self._ends[number:]
        self._file.truncate(sum(self._ends))
        os.fsync(self._file.fileno())

    def append(self, entry: Entry) -> None:
        """The entry is on the disk when this returns."""
        text = json.dumps(entry).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries.append(entry)
        self._ends.append(len(line))

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[bytes]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
                return
            yield line


def sync(path: Path) -> None:
    """A file or folder to the disk, so that a crash after it is renamed leaves no hole under the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file in one step: a reader, or a later start after a kill, sees all of it or the one before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
