"""Documents -> tokens in the spool. The records are read in this process and tokenised, in batches, in many."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtrain.data import readers, sides
from bigtrain.data.progress import bar
from bigtrain.data.readers import Drop, Drops, Position, Record
from bigtrain.data.spool import ROW_DTYPE, Spool
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.workers import Workers

BATCH_BYTES, BATCH_RECORDS = 1 << 20, 1000
PART_CHARACTERS, MAX_PART_CHARACTERS = 1 << 14, 1 << 18
"""A long document is tokenised in parts: as a whole, sentencepiece takes over 100 bytes of memory a character, and
2.6 times as long for 6 MB."""
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=\S)")


@dataclass(frozen=True)
class Recipe:
    """What a process needs besides the documents."""

    field: str
    tokenizer: str
    """Path of the folder with its files."""
    fingerprint: str
    dtype: str
    """Of the tokens."""


@dataclass(frozen=True)
class Batch:
    records: list[Record]
    recipe: Recipe


@dataclass(frozen=True)
class Tokenized:
    content: list[bytes]
    rows: np.ndarray
    """ROW_DTYPE."""
    dropped: Drops
    bytes_read: int
    end: Position


def tokenize_all(
    files: Sequence[str], recipe: Recipe, spool: Spool, workers: Workers, *, total_bytes: int, progress: bool
) -> None:
    """Bring the spool to the end of the files. `total_bytes` is the size of the files."""
    if spool.position == Position(len(files), 0):
        return
    with bar("tokenising", total_bytes, in_bytes=True, shown=progress) as advance:
        advance(spool.bytes_read)
        scratch = Path(recipe.tokenizer)
        records = readers.read_records(files, recipe.field, start=spool.position, scratch=scratch)
        batches = (Batch(part, recipe) for part in _batches(records))
        for part in workers.map(_tokenize, batches, bytes_of=lambda batch: _size(batch.records)):
            spool.append(part.content, part.rows, part.dropped, end=part.end, bytes_read=part.bytes_read)
            advance(part.bytes_read)
    spool.append([], np.zeros(0, ROW_DTYPE), Drops(), end=Position(len(files), 0), bytes_read=0)
    spool.commit()


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _size([record])
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(records: Iterable[Record]) -> int:
    return sum(len(record.raw) for record in records if isinstance(record.raw, bytes))


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """The fingerprint keeps the cache honest where a path is used again."""
    return Tokenizer.load(path)


def _tokenize(batch: Batch) -> Tokenized:
    """Runs in a worker. Uses up the records of the batch: a long document is in memory once or twice, not for good."""
    recipe = batch.recipe
    tokenizer = _tokenizer(recipe.tokenizer, recipe.fingerprint)
    content: list[bytes] = []
    rows: list[tuple[int, int, int, int]] = []
    dropped = Drops()
    at, bytes_read, end = 0, sum(record.num_bytes for record in batch.records), batch.records[-1].end
    batch.records.reverse()
    while batch.records:
        record = batch.records.pop()
        source = record.source
        try:
            text = readers.text_of(record, recipe.field)
        except Drop as reason:
            dropped.add(str(reason), source)
            continue
        del record
        tokens, text_bytes, number = _encode(tokenizer, text, recipe.dtype)
        metadata = json.dumps({"source": source, "text_bytes": text_bytes}).encode()
        num_bytes = sum(map(len, tokens))
        rows.append((at, num_bytes // np.dtype(recipe.dtype).itemsize, len(metadata), number))
        content += [*tokens, metadata]
        at += num_bytes + len(metadata)
    return Tokenized(content, np.array(rows, ROW_DTYPE), dropped, bytes_read, end)


def _encode(tokenizer: Tokenizer, text: str, dtype: str) -> tuple[list[bytes], int, int]:
    """The tokens of a document, as bytes in parts; the size of its text in UTF-8; the hash of its text."""
    digest, text_bytes = sides.new_digest(), 0
    blocks = [np.array([tokenizer.bos_id], dtype).tobytes()]
    for number, part in enumerate(_parts(text, tokenizer)):
        encoded = part.encode()
        digest.update(encoded)
        text_bytes += len(encoded)
        ids = tokenizer.encode_part(part) if number else tokenizer.encode_batch([part])[0]
        blocks.append(ids.astype(dtype).tobytes())
    blocks.append(np.array([tokenizer.eos_id], dtype).tobytes())
    return blocks, text_bytes, sides.number_of(digest)


def _parts(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The text in parts of some PART_CHARACTERS, cut before a space between a letter or digit and a word: no token of a
    usual vocabulary reaches over that place, so the tokens are those of the text as a whole. Where there is none for
    MAX_PART_CHARACTERS it is cut behind a line or anywhere; the text is the same in any case. A tokenizer that adds a
    space to what it encodes can take parts of the first kind only."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = len(text) if tokenizer.adds_a_space else start + MAX_PART_CHARACTERS
        place = _BETWEEN_WORDS.search(text, start + PART_CHARACTERS, stop)
        if not place and tokenizer.adds_a_space:
            break
        end = place.start() if place else _end_of_line(text, start + PART_CHARACTERS, stop)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:] if start else text


def _end_of_line(text: str, first: int, stop: int) -> int:
    return text.rfind("\n", first, stop) + 1 or stop
