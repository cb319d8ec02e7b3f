"""How documents lie in a file: one row of `FORMATS` a kind of file, found by the end of its name.

A format is two functions. `records` runs in the one process that reads and only cuts a file into raw pieces; `text`
runs in the many processes that tokenise and turns a raw piece into the document's text, or says why it is dropped.
Neither holds more of a file than one document, or a few MB of a parquet file's column.

Plain text is one document a file, up to 256 KiB. A larger file, such as a whole corpus in one, is cut into documents of
1/128 of the file, at most 64 KiB: after the last blank line of the second half of each, else after its last line end,
space or character. Joined they are the file again. A file that is not UTF-8 somewhere is dropped as a whole. Sizes are
those of the text, so a packed file gives the same documents.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from bigtrain.config.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer line or value is dropped: one without an end must not fill the memory, and a shard counts in 32 bits."""
_LARGE_BYTES = 256 << 10
_MAX_PIECE_BYTES = 64 << 10
_PIECES = 128
_BOUNDARIES = (b"\n\n", b"\n\r\n", b"\n", b" ")
"""Where a large file of text is cut, the best first."""
_SCAN_BYTES = 1 << 20
_PARQUET_BATCH_BYTES, _PARQUET_BATCH_ROWS = 8 << 20, 256
_SURROGATE = re.compile("[\ud800-\udfff]")
READ_ERRORS = (OSError, EOFError, zlib.error, zstd.ZstdError)
"""What `Format.records` raises for a file that cannot be read to its end."""


class Drop(Exception):
    """This document is left out; the message is the reason under which it is counted."""


Piece = tuple[int | None, bytes | Drop, int]
"""Line or row in the file, from 1 (None: the document is the file); the raw document, or why there is none; bytes of
the file that were used up since the piece before: what a progress bar counts."""


@dataclass(frozen=True)
class Format:
    records: Callable[[str, str], Iterator[Piece]]
    """(path, field) -> each document of the file. Raises READ_ERRORS; UserError where the file has no such column."""
    text: Callable[[bytes, str], str]
    """(raw, field) -> the text. Raises Drop."""


# Packed files ------------------------------------------------------------------------------------------------------

_Unpack = Callable[[BinaryIO], Any]


def _gunzip(packed: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=packed)


def _unzstd(packed: BinaryIO) -> Any:
    # Some corpora are packed with `zstd --long=31`: a window of 2 GiB, taken only where a file asks for it.
    return zstd.ZstdFile(packed, options={zstd.DecompressionParameter.window_log_max: 31})


@contextmanager
def _opened(path: str, unpack: _Unpack | None) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The unpacked content to read, and how many bytes of the file have been used up."""
    with open(path, "rb") as packed:
        if unpack is None:
            yield packed, packed.tell
            return
        if not os.path.getsize(path):
            raise EOFError("it is empty, not even the header of a packed file is there")
        with unpack(packed) as file:
            yield file, packed.tell


# JSON lines --------------------------------------------------------------------------------------------------------


def _lines(path: str, field: str, unpack: _Unpack | None = None) -> Iterator[Piece]:
    with _opened(path, unpack) as (file, tell):
        before = 0
        for number in itertools.count(1):
            line = file.readline(MAX_DOCUMENT_BYTES)
            if not line:
                return
            raw = _too_long(file) if len(line) == MAX_DOCUMENT_BYTES and line[-1:] != b"\n" else line
            position = tell()
            yield number, raw, position - before
            before = position


def _too_long(file: BinaryIO) -> Drop:
    """Read on to the end of the line."""
    while (rest := file.readline(_SCAN_BYTES)) and rest[-1:] != b"\n":
        pass
    return Drop(f"longer than {MAX_DOCUMENT_BYTES:,} bytes")


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
    text = value[field]
    if not isinstance(text, str):
        raise Drop(_not_text(field))
    if not text.isascii() and _SURROGATE.search(text):  # JSON can spell half of a pair
        raise Drop("not UTF-8")
    return text


def pair(raw: bytes, field: str, prompt_field: str) -> tuple[str, str]:
    """(prompt, text) of a JSON object. The prompt may be empty. Raises Drop."""
    prompt, text = _json_field(raw, prompt_field), _json_field(raw, field)
    if not text or text.isspace():
        raise Drop(f"field {field!r} is empty")
    return prompt, text


def has_fields(name: str) -> bool:
    """Whether documents of this format are JSON objects, which may have a prompt beside the text."""
    return FORMATS[name].text is _json_field


def _not_text(field: str) -> str:
    return f"field {field!r} is not text"


# Text --------------------------------------------------------------------------------------------------------------


def _text_file(path: str, field: str, unpack: _Unpack | None = None) -> Iterator[Piece]:
    with _opened(path, unpack) as (file, _):
        head = file.read(_LARGE_BYTES + 1)
    if len(head) <= _LARGE_BYTES:
        yield None, head, os.path.getsize(path)
        return
    size = _utf8_bytes(path, unpack)
    if size is None:
        yield None, Drop("not UTF-8"), os.path.getsize(path)
        return
    line, before = 1, 0
    with _opened(path, unpack) as (file, tell):
        for raw in _pieces(file, min(_MAX_PIECE_BYTES, size // _PIECES)):
            position = tell()
            yield line, raw, position - before
            line, before = line + raw.count(b"\n"), position


def _utf8_bytes(path: str, unpack: _Unpack | None) -> int | None:
    """How many bytes of text the file holds; None where they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    with _opened(path, unpack) as (file, _):
        try:
            while block := file.read(_SCAN_BYTES):
                decoder.decode(block)
                size += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return None
    return size


def _pieces(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The text in pieces of at most `limit` bytes."""
    rest = b""
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


def _decoded(raw: bytes, field: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Drop("not UTF-8") from error


# Parquet -----------------------------------------------------------------------------------------------------------


def _rows(path: str, field: str) -> Iterator[Piece]:
    """The values of a column, without copying more of the file into memory than a few MB of them."""
    import pyarrow
    from pyarrow import parquet

    size, row, used = os.path.getsize(path), 0, 0
    try:
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=_SCAN_BYTES, page_checksum_verification=True
        ) as file:
            _check_column(file.schema_arrow, field)
            for group in range(file.num_row_groups):
                rows = _rows_at_once(file.metadata.row_group(group), field)
                for batch in file.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
                    for value in batch.column(field).cast(pyarrow.large_binary()):
                        row += 1
                        position = size * row // file.metadata.num_rows
                        yield row, _raw(value.as_py(), field), position - used
                        used = position
    except pyarrow.ArrowException as error:
        raise OSError(str(error).strip().partition("\n")[0]) from error


def _check_column(schema: Any, field: str) -> None:
    """Raises UserError where the file has no column of text by that name."""
    import pyarrow.types as types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view)
        return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))

    usable = [column.name for column in schema if is_text(column.type)]
    if field in usable:
        return
    what = (
        f"its column {field!r} holds {schema.field(field).type}, not text"
        if field in schema.names
        else (f"it has no column {field!r}")
    )
    columns = f"name one of {usable} with --field (data.prepare.json_field), or leave" if usable else "leave"
    raise UserError(f"{what}; {columns} the file out (--exclude)")


def _rows_at_once(group: Any, field: str) -> int:
    """Rows of a row group that take a few MB, by their mean size: one long document must not bring thousands along."""
    columns = (group.column(number) for number in range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return max(1, min(_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES * group.num_rows // max(size, 1)))


def _raw(value: bytes | None, field: str) -> bytes | Drop:
    if value is None:
        return Drop(_not_text(field))
    return value if len(value) <= MAX_DOCUMENT_BYTES else Drop(f"longer than {MAX_DOCUMENT_BYTES:,} bytes")


FORMATS: dict[str, Format] = {
    ".jsonl": Format(_lines, _json_field),
    ".parquet": Format(_rows, _decoded),
    "text": Format(_text_file, _decoded),
}
for _ending, _unpacking in {".gz": _gunzip, ".zst": _unzstd}.items():
    FORMATS[f".jsonl{_ending}"] = Format(partial(_lines, unpack=_unpacking), _json_field)
    FORMATS[f".json{_ending}"] = FORMATS[f".jsonl{_ending}"]  # as the files of C4 and Dolma are called
    FORMATS[f".txt{_ending}"] = Format(partial(_text_file, unpack=_unpacking), _decoded)


def format_of(path: str) -> str:
    """The row of `FORMATS` that reads this file: by the end of its name, else plain text."""
    return next((ending for ending in FORMATS if path.endswith(ending)), "text")
