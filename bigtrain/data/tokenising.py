"""Documents -> tokens in the spool. The records are read in this process and tokenised, in batches, in many."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtrain.data import encoding, readers, sides
from bigtrain.data.progress import bar
from bigtrain.data.readers import Drop, Drops, Position, Record
from bigtrain.data.spool import ROW_DTYPE, Spool
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.workers import Workers

BATCH_BYTES, BATCH_RECORDS = 1 << 20, 1000


@dataclass(frozen=True)
class Recipe:
    """What a process needs besides the documents."""

    field: str
    prompt_field: str
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
            prompt, text = readers.pair_of(record, recipe.field, recipe.prompt_field)
        except Drop as reason:
            dropped.add(str(reason), source)
            continue
        del record
        tokens, text_bytes, prompt_tokens, number = _encode(tokenizer, prompt, text, recipe.dtype)
        of_prompt = {} if prompt is None else {"prompt_tokens": prompt_tokens}
        metadata = json.dumps({"source": source, "text_bytes": text_bytes, **of_prompt}).encode()
        num_bytes = sum(map(len, tokens))
        rows.append((at, num_bytes // np.dtype(recipe.dtype).itemsize, len(metadata), number))
        content += [*tokens, metadata]
        at += num_bytes + len(metadata)
    return Tokenized(content, np.array(rows, ROW_DTYPE), dropped, bytes_read, end)


def _encode(tokenizer: Tokenizer, prompt: str | None, text: str, dtype: str) -> tuple[list[bytes], int, int, int]:
    """The tokens of a document, as bytes in parts; the size of its text in UTF-8, prompt and all; how many tokens are
    its prompt, BOS counted; the hash of its text, prompt and all."""
    digest, text_bytes, prompt_tokens = sides.new_digest(), 0, 1
    blocks = [np.array([tokenizer.bos_id], dtype).tobytes()]
    for is_prompt, whole in ((True, prompt or ""), (False, text)):
        for part, ids in encoding.encode_parts(tokenizer, whole, dtype, goes_on=not is_prompt and bool(prompt)):
            encoded = part.encode()
            digest.update(encoded)
            text_bytes += len(encoded)
            prompt_tokens += len(ids) * is_prompt
            blocks.append(ids.tobytes())
    blocks.append(np.array([tokenizer.eos_id], dtype).tobytes())
    return blocks, text_bytes, prompt_tokens, sides.number_of(digest)
