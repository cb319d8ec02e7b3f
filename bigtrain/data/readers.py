"""Files of text -> documents.

A format is two functions. `records` runs in the one process that reads and only cuts the file into raw pieces; `text`
runs in the many processes that tokenise and turns a raw piece into the document's text, or says why it is dropped. A
new format is one more row in `FORMATS`.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.errors import UserError


class Drop(Exception):
    """This document is left out; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file."""

    source: str
    """The file, as it was named, and for formats with many documents a file ``:`` and the line."""
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


def _whole_file(path: str) -> Iterator[tuple[str, bytes, int]]:
    raw = Path(path).read_bytes()
    yield path, raw, len(raw)


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
    "text": Format(_whole_file, _plain_text),
}


def format_of(path: str) -> str:
    """The row of `FORMATS` that reads this file: by the end of its name, else one document of plain text."""
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
