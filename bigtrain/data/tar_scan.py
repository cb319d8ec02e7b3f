"""What is in a WebDataset tar of text: where each sample's text lies. It reads headers only, and extracts nothing.

Members in a row whose names agree up to the first dot of the last part are a sample, as in webdataset. Its text is its
`.txt`, or else its `.json`. A sample that has no text in it, or cannot be trusted, stands there with the reason, so
that the numbers of the others do not depend on what is done about it. What is lost behind damage is one more of them.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TEXT, JSON = "txt", "json"
_BLOCK = 512
_LEAVES_ITS_FOLDER = re.compile(r"^/|(^|/)\.\.(/|$)")
# All that tarfile raises on bytes that are no tar; the last three where a header holds nonsense.
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Sample:
    """One document."""

    key: str
    start: int
    """Of its text in the tar, bytes."""
    size: int
    """Of its text, or of what is lost with it, bytes."""
    kind: str
    """TEXT or JSON; "" where it is bad."""
    reason: str = ""
    """Why it is bad."""


def scan(raw: np.ndarray) -> list[Sample]:
    """The samples of a tar, uint8[size], in its order. Never raises for what is in it."""
    samples: list[Sample] = []
    members: list[Sample] = []
    for member in _members(raw):
        if members and member.key != members[0].key:
            samples.append(_joined(members))
            members = []
        members.append(member)
    return [*samples, _joined(members)] if members else samples


def _joined(members: list[Sample]) -> Sample:
    """The members of one sample as one: its text, or why there is none."""
    for kind in (TEXT, JSON):
        for member in members:
            if member.kind == kind and not member.reason:
                return member
    bad = next((member for member in members if member.reason), None)
    return bad or Sample(members[0].key, 0, 0, "", "it has neither .txt nor .json")


def _members(raw: np.ndarray) -> Iterator[Sample]:
    """Each file in the tar as if it were a sample, and at the end what is lost."""
    end, is_cut = 0, False
    try:
        with tarfile.open(fileobj=_File(raw), mode="r:") as tar:
            while (member := tar.next()) is not None:
                if tar.offset <= end:
                    raise tarfile.ReadError("it goes back")  # older versions of tarfile would read it for ever
                tar.members = []  # it would remember them all  # pyright: ignore[reportAttributeAccessIssue]
                end = tar.offset
                is_cut = member.isreg() and member.offset_data + member.size > len(raw)
                if not member.isdir():
                    yield _member(member, len(raw))
    except _TAR_ERRORS:
        pass  # what is left is told below
    if not len(raw):
        yield _lost(raw, 0, "the tar is empty: it has not even an end")
    elif end < len(raw) and raw[end:].any():
        yield _lost(raw, end, "the tar is damaged here, and what follows cannot be read")
    elif end >= len(raw) and not is_cut:
        yield _lost(raw, len(raw), "the tar is cut short: its end is missing")


def _lost(raw: np.ndarray, start: int, reason: str) -> Sample:
    return Sample(f"(from byte {start:,} on)", start, len(raw) - start, "", reason)


def _member(member: tarfile.TarInfo, tar_size: int) -> Sample:
    key, ending = _key(member.name)
    start, size = member.offset_data, member.size
    if _LEAVES_ITS_FOLDER.search(member.name):
        return Sample(key, start, size, "", "its name leaves its folder")
    if not member.isreg() or member.issparse():
        return Sample(key, start, 0, "", "it is a link, a device or a sparse file")
    if start + size > tar_size:
        return Sample(key, start, max(0, tar_size - start), "", "the tar is cut short in it")
    return Sample(key, start, size, ending if ending in (TEXT, JSON) else "")


def _key(name: str) -> tuple[str, str]:
    """(key, ending) of a name as webdataset cuts it: at the first dot of its last part."""
    name = name.encode("utf-8", "backslashreplace").decode()
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


class _File(io.RawIOBase):
    """An array as a file, without a copy."""

    def __init__(self, raw: np.ndarray) -> None:
        self._raw, self._at = raw, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._raw)}[whence]
        if base + offset < 0:
            raise ValueError(f"a seek to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = len(self._raw) if size is None or size < 0 else min(self._at + size, len(self._raw))
        found = self._raw[self._at : stop].tobytes()
        self._at += len(found)
        return found
