"""Files of text -> documents.

A format is two functions. `records` runs in the one process that reads and only cuts the file into raw pieces; `text`
runs in the many processes that tokenise and turns a raw piece into the document's text, or says why it is dropped. A
new format is one more row in `FORMATS`.

Plain text is one document a file, up to 256 KiB. A larger file, such as a whole corpus in one, is cut into documents of
1/128 of the file, at most 64 KiB: after the last blank line of the second half of each, else after its last line end,
space or character. Joined they are the file again. A file that is not UTF-8 somewhere is dropped as a whole.
"""

from __future__ import annotations

import codecs
import fnmatch
import glob
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.config.errors import UserError

_LARGE_BYTES = 256 << 10
_MAX_PIECE_BYTES = 64 << 10
_PIECES = 128
_BOUNDARIES = (b"\n\n", b"\n\r\n", b"\n", b" ")
"""Where a large file of text is cut, the best first."""
DOCUMENTS = "each line of .jsonl is a document, each file of text is one, and 128 or more above 256 KiB"


class Drop(Exception):
    """This document is left out; the message is the reason under which it is counted."""


@dataclass
class Drops:
    """What was left out: how often for each reason, and the first example."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, source)

    def update(self, later: Drops) -> None:
        """Add those of later documents."""
        self.counts.update(later.counts)
        self.examples = later.examples | self.examples

    def __str__(self) -> str:
        """``2 empty (such as a.txt), 1 not UTF-8 (such as b.txt)``, and what helps."""
        if not self.counts:
            return "none"
        reasons = [f"{self.counts[name]:,} {name} (such as {self.examples[name]})" for name in sorted(self.counts)]
        hint = "; data.prepare.json_field (--field) names the key that holds the text"
        return ", ".join(reasons) + hint * any(name.startswith("no field") for name in self.counts)


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file."""

    source: str
    """The file, as it was named, and where it has many documents ``:`` and the line that this one begins on."""
    raw: bytes
    format: str
    """Key of `FORMATS`."""
    num_bytes: int
    """Bytes of the file that reading this record used up: what a progress bar counts."""


@dataclass(frozen=True)
class Format:
    records: Callable[[str], Iterator[tuple[str, bytes, int]]]
    """path -> (source, raw, bytes of the file used up) for each document."""
    text: Callable[[bytes, str], str]
    """(raw, field) -> the text. Raises Drop."""


def _text_file(path: str) -> Iterator[tuple[str, bytes, int]]:
    size = os.path.getsize(path)
    if size <= _LARGE_BYTES:
        yield path, Path(path).read_bytes(), size
    elif (bad := _first_undecodable(path)) is not None:
        yield path, bad, size
    else:
        line = 1
        for raw in _pieces(path, min(_MAX_PIECE_BYTES, size // _PIECES)):
            yield f"{path}:{line}", raw, len(raw)
            line += raw.count(b"\n")


def _first_undecodable(path: str) -> bytes | None:
    """Bytes of the file that are not UTF-8; None where all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return error.object
    return None


def _pieces(path: str, limit: int) -> Iterator[bytes]:
    """The file in pieces of at most `limit` bytes."""
    rest = b""
    with open(path, "rb") as file:
        while block := rest + file.read(limit - len(rest)):
            end = len(block) if len(block) < limit else _end_of_piece(block)
            yield block[:end]
            rest = block[end:]


def _end_of_piece(block: bytes) -> int:
    for boundary in _BOUNDARIES:
        place = block.rfind(boundary, len(block) // 2)
        if place >= 0:
            return place + len(boundary)
    end = len(block) - 1
    while block[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield f"{path}:{number}", line, len(line)


def _gzip_lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    with open(path, "rb") as packed, gzip.open(packed, "rb") as file:
        position = 0
        for number, line in enumerate(file, start=1):
            position, before = packed.tell(), position
            yield f"{path}:{number}", line, position - before


def _plain_text(raw: bytes, field: str) -> str:
    return _decoded(raw)


def _json_field(raw: bytes, field: str) -> str:
    line = _decoded(raw)
    if not line.strip():
        raise Drop("empty")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Drop("not JSON") from error
    if not isinstance(value, dict) or field not in value:
        raise Drop(f"no field {field!r}")
    if not isinstance(value[field], str):
        raise Drop(f"field {field!r} is not text")
    return value[field]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Drop("not UTF-8") from error


FORMATS: dict[str, Format] = {
    ".jsonl": Format(_lines, _json_field),
    ".jsonl.gz": Format(_gzip_lines, _json_field),
    "text": Format(_text_file, _plain_text),
}


def format_of(path: str) -> str:
    """The row of `FORMATS` that reads this file: by the end of its name, else plain text."""
    return next((ending for ending in FORMATS if path.endswith(ending)), "text")


def find_files(inputs: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The files that `inputs` (files, folders, globs with ``**``) name, each once, in a fixed order.

    A folder gives every file below it outside hidden folders and __pycache__. A file whose path matches a pattern of
    `exclude` is left out: ``*`` matches ``/`` too, and a relative pattern matches at any depth. Raises UserError for an
    input that names nothing, and where nothing is left.
    """
    found: dict[str, None] = {}
    for name in inputs:
        files = _files_of(os.path.expanduser(name))
        if not files:
            raise UserError(f"input {name!r}: no such file or folder, and no file matches it as a pattern")
        found.update(dict.fromkeys(files))
    kept = [path for path in found if not any(_matches(path, pattern) for pattern in exclude)]
    if not kept:
        raise UserError(f"no input is left: {len(found)} files found, all excluded by {list(exclude)}")
    return kept


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{pattern}")


def _files_of(name: str) -> list[str]:
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        return sorted(_walk(name))
    return sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def read_records(files: Iterable[str]) -> Iterator[Record]:
    """Every record of the files, in order. Raises UserError for a file that cannot be read to its end."""
    for path in files:
        name = format_of(path)
        try:
            for source, raw, num_bytes in FORMATS[name].records(path):
                yield Record(source, raw, name, num_bytes)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"input {path}: cannot be read: {reason}. Repair it, or leave it out.") from error


def text_of(record: Record, field: str) -> str:
    """The text of a record; never blank. Raises Drop with the reason."""
    text = FORMATS[record.format].text(record.raw, field)
    if not text or text.isspace():
        raise Drop("empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise Drop("not UTF-8") from error
    return text


def total_bytes(files: Iterable[str]) -> int:
    """Size of the files on disk, in bytes."""
    return sum(os.path.getsize(path) for path in files)
