"""Files, folders, globs and URLs -> documents, in one order.

`find_files` names the files, `read_records` cuts them into raw documents in one process, and `text_of` gives the text
of one in any process, or says why it is dropped. How each kind of file is read: `formats`. What is not on this machine
is downloaded file by file (`inputs`).
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bigtrain.config.errors import UserError
from bigtrain.data import inputs
from bigtrain.data.formats import FORMATS, READ_ERRORS, Drop, format_of, has_fields, pair

DOCUMENTS = (
    "each line of .jsonl and row of .parquet is a document, each file of text is one, and 128 or more above 256 KiB"
)


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
        hint = "; data.prepare.json_field (--field) names the key that holds the text, prompt_field that of a prompt"
        return ", ".join(reasons) + hint * any(name.startswith("no field") for name in self.counts)


class Position(NamedTuple):
    """A place in a list of input files: behind the first `records` documents of file number `file`."""

    file: int = 0
    records: int = 0


START = Position()


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file."""

    source: str
    """The file, as it was named, and where it has many documents ``:`` and the line or row (from 1) of this one."""
    raw: bytes | Drop
    """The document, or why there is none."""
    format: str
    """Key of `FORMATS`."""
    num_bytes: int
    """Bytes of the file that reading this record used up: what a progress bar counts."""
    end: Position
    """Behind this record."""


def find_files(names: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The files of files, folders, globs and URLs, in the order given, each once.

    Folders are searched to the bottom in the order of the names, without hidden files and __pycache__. `exclude` are
    patterns of fnmatch (* matches / too) over the path; a relative one matches at any depth. Raises UserError where
    an input names nothing, or nothing is left.
    """
    found: dict[str, None] = {}
    for name in names:
        files = inputs.find(name) if inputs.is_url(name) else _files_of(name)
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


def read_records(
    files: Sequence[str], field: str, *, start: Position = START, scratch: Path | None = None
) -> Iterator[Record]:
    """Every record of the files from `start` on, in order. URLs are downloaded to a folder in `scratch` (default: the
    system's temporary folder) while they are read. Raises UserError for a file that cannot be read to its end."""
    with closing(inputs.local_paths(files[start.file :], scratch)) as paths:
        for number, (file, path) in enumerate(zip(files[start.file :], paths, strict=True), start.file):
            done = start.records if number == start.file else 0
            source, name = inputs.without_secrets(file), format_of(inputs.without_query(file))
            records = enumerate(FORMATS[name].records(path, field), start=1)
            try:
                for count, (place, raw, num_bytes) in itertools.islice(records, done, None):
                    where = source if place is None else f"{source}:{place}"
                    yield Record(where, raw, name, num_bytes, Position(number, count))
            except READ_ERRORS as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"input {source}: cannot be read: {reason}. Repair it, or leave it out (--exclude)."
                ) from error
            except UserError as error:
                raise UserError(f"input {source}: {error}") from error


def text_of(record: Record, field: str) -> str:
    """The text of a record; never blank. Raises Drop with the reason."""
    if isinstance(record.raw, Drop):
        raise record.raw
    text = FORMATS[record.format].text(record.raw, field)
    if not text or text.isspace():
        raise Drop("empty")
    return text


def pair_of(record: Record, field: str, prompt_field: str) -> tuple[str | None, str]:
    """(prompt, text) of a record; without a `prompt_field` (None, text). The text is never blank. Raises Drop with the
    reason."""
    if not prompt_field:
        return None, text_of(record, field)
    if isinstance(record.raw, Drop):
        raise record.raw
    return pair(record.raw, field, prompt_field)


def check_prompts(files: Sequence[str], prompt_field: str) -> None:
    """Raises UserError where prompts are asked for, and a file has no room for them."""
    other = [file for file in files if not has_fields(format_of(inputs.without_query(file)))] if prompt_field else []
    if other:
        raise UserError(
            f"input {inputs.without_secrets(other[0])}: prompts are read from JSON lines only (.jsonl, .jsonl.gz, "
            f".jsonl.zst), and field {prompt_field!r} is to be one (--prompt-field, data.prepare.prompt_field)."
        )


def total_bytes(files: Sequence[str]) -> int:
    """Size of the files where they lie, in bytes; of URLs that tell no size, nothing."""
    return sum(file.size_bytes for file in inputs.stat(files))
