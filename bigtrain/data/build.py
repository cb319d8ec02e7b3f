"""Text -> a folder with train/ and valid/ shard sets.

1. Read the inputs one after the other, cut them into batches of documents, and tokenise the batches in many processes.
   The tokens go, in the order of the inputs, into a scratch file (the spool): memory holds a row of numbers a document.
2. `sides` tells from the texts which documents are valid/.
3. Each side is shuffled as a whole by `seed`, cut into shards, and the shards are written in parallel.
4. All of it happens in a folder beside the wanted one, which takes its name at the very end, in one step.

The same inputs, tokenizer and options give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data import readers, shards, sides
from bigtrain.data.progress import bar
from bigtrain.data.readers import Drop, Drops, Record
from bigtrain.data.shards import DOCUMENT_DTYPE, INDEX, Index, Shard
from bigtrain.data.sides import Census
from bigtrain.data.tokenizer import Tokenizer, digests_of
from bigtrain.data.workers import Workers

SHARD_TOKENS = 50_000_000
_BATCH_BYTES, _BATCH_RECORDS = 1 << 20, 1000
_SPOOLED_DTYPE = np.dtype(
    [
        ("tokens_at", "<u8"),  # offset in the spool, bytes; the metadata follow the tokens
        ("num_tokens", "<u4"),
        ("metadata_bytes", "<u4"),
        ("hash", "<u8"),  # of the text
    ]
)


@dataclass(frozen=True)
class BuildOptions:
    """What to build from. All of it is kept in index.json."""

    inputs: Sequence[str]
    """Files, folders or globs."""
    exclude: Sequence[str] = ()
    """Patterns of paths to leave out."""
    field: str = "text"
    """Of JSON lines: the key that holds the text."""
    held_out: float = 0.05
    """Share of the documents that goes to valid/."""
    seed: int = 0
    """Of the shuffle."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens after which a new shard begins."""


@dataclass(frozen=True)
class BuildReport:
    """What `build` made: the index of each split, and what was left out."""

    splits: dict[str, Index]
    dropped: Drops

    def lines(self) -> list[str]:
        """What to tell the user."""
        sizes = [
            f"{split}/ {index.num_documents:,} documents, {index.num_tokens:,} tokens, {index.text_bytes / 1e6:,.1f} "
            f"MB of text ({index.text_bytes / index.num_tokens:.2f} bytes a token), {len(index.shards)} shards"
            for split, index in self.splits.items()
        ]
        return [*sizes, f"dropped documents: {self.dropped}"]


def build(
    options: BuildOptions,
    *,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    num_workers: int,
    num_lanes: int = 1,
    progress: bool = True,
) -> BuildReport:
    """Build OUT/train and OUT/valid (no valid/ where held_out is 0). `num_workers` 0 tokenises in this process.

    Raises UserError where OUT has something in it already, an input names nothing, train/ gets fewer documents than
    `num_lanes`, or valid/ none.
    """
    target = Path(out)
    _check(options, target)
    files = readers.find_files(options.inputs, options.exclude)
    aside = target.parent / f".{target.name}.building-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        tokenizer_files = tokenizer.save(aside)
        with Workers(num_workers) as workers:
            spool = _tokenize_all(files, options, tokenizer, aside, workers, progress)
            splits = _split(spool, options, num_lanes)
            report = _write_splits(splits, spool, options, tokenizer, aside, workers, progress)
        for scratch in (spool.path, *tokenizer_files):
            scratch.unlink()
        os.replace(aside, target)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed; out of memory? Try fewer workers.") from error
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _check(options: BuildOptions, target: Path) -> None:
    sides.check_share(options.held_out)
    if options.seed < 0:
        raise UserError(f"seed is {options.seed}: at least 0")
    if options.shard_tokens < 1:
        raise UserError(f"shard_tokens is {options.shard_tokens}: at least 1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is already there. Remove it, or choose another folder.")


# Documents -> tokens in the spool ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Documents to tokenise, with all that a process needs to do it."""

    records: list[Record]
    field: str
    tokenizer: str
    """Path of the folder that it is kept in."""
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.records)


@dataclass(frozen=True)
class _Tokenized:
    """What became of a batch: the bytes of the spool and a row a document. Offsets are from the batch's beginning."""

    content: bytes
    documents: np.ndarray
    dropped: Drops
    num_bytes: int


@dataclass(frozen=True)
class _Spool:
    path: Path
    documents: np.ndarray
    """_SPOOLED_DTYPE, in the order of the inputs."""
    dropped: Drops


def _batches(records: Iterable[Record], make: Callable[[list[Record]], _Batch]) -> Iterator[_Batch]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            yield make(batch)
            batch, size = [], 0
    if batch:
        yield make(batch)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """The fingerprint keeps the cache honest where a path is used again."""
    return Tokenizer.load(path)


def _tokenize(batch: _Batch) -> _Tokenized:
    """Runs in a worker."""
    tokenizer = _tokenizer(batch.tokenizer, batch.fingerprint)
    dtype = token_dtype(tokenizer.vocab_size)
    content = io.BytesIO()
    rows: list[tuple[int, int, int, int]] = []
    dropped = Drops()
    kept: list[tuple[Record, str]] = []
    for record in batch.records:
        try:
            kept.append((record, readers.text_of(record, batch.field)))
        except Drop as reason:
            dropped.add(str(reason), record.source)
    for (record, text), ids in zip(kept, tokenizer.encode_batch([text for _, text in kept]), strict=True):
        encoded = text.encode()
        tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype)
        metadata = json.dumps({"source": record.source, "text_bytes": len(encoded)}).encode()
        rows.append((content.tell(), len(tokens), len(metadata), sides.hash_of(encoded)))
        content.write(tokens.tobytes())
        content.write(metadata)
    return _Tokenized(content.getvalue(), np.array(rows, _SPOOLED_DTYPE), dropped, batch.num_bytes)


def token_dtype(vocab_size: int) -> str:
    """How tokens are stored: two bytes each where the vocabulary fits, else four."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _tokenize_all(
    files: Sequence[str], options: BuildOptions, tokenizer: Tokenizer, aside: Path, workers: Workers, progress: bool
) -> _Spool:
    def batch(records: list[Record]) -> _Batch:
        return _Batch(records, options.field, str(aside), tokenizer.fingerprint)

    parts: list[np.ndarray] = []
    dropped = Drops()
    path, total = aside / "spool", readers.total_bytes(files)
    with path.open("wb") as spool, bar("tokenising", total, in_bytes=True, shown=progress) as advance:
        for part in workers.map(_tokenize, _batches(readers.read_records(files), batch)):
            part.documents["tokens_at"] += np.uint64(spool.tell())
            spool.write(part.content)
            parts.append(part.documents)
            dropped.update(part.dropped)
            advance(part.num_bytes)
    documents = np.concatenate(parts) if parts else np.zeros(0, _SPOOLED_DTYPE)
    return _Spool(path, documents, dropped)


# The spool -> shards -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardPlan:
    """Which documents go into one tar."""

    spool: Path
    folder: Path
    number: int
    first_document: int
    documents: np.ndarray
    dtype: str


def _split(spool: _Spool, options: BuildOptions, num_lanes: int) -> dict[str, np.ndarray]:
    """The documents of each split. Raises UserError where they are too few."""
    held_out = sides.held_out(spool.documents["hash"], options.held_out)
    splits = {"train": spool.documents[~held_out], "valid": spool.documents[held_out]}
    census = Census(len(splits["train"]), len(splits["valid"]), spool.dropped)
    census.check(options.held_out, num_lanes=num_lanes)
    return splits if options.held_out else {"train": splits["train"]}


def _write_splits(
    splits: dict[str, np.ndarray],
    spool: _Spool,
    options: BuildOptions,
    tokenizer: Tokenizer,
    out: Path,
    workers: Workers,
    progress: bool,
) -> BuildReport:
    plans: list[_ShardPlan] = []
    for split, documents in splits.items():
        (out / split).mkdir()
        plans += _plan_shards(spool.path, out / split, _shuffled(documents, options.seed), options, tokenizer)

    written: dict[str, list[Shard]] = {split: [] for split in splits}
    with bar("writing shards", len(spool.documents), shown=progress) as advance:
        for plan, shard in zip(plans, workers.map(_write_shard, plans), strict=True):
            written[plan.folder.name].append(shard)
            advance(shard.num_documents)
    dropped = dict(sorted(spool.dropped.counts.items()))
    indexes = {split: _finish(out / split, written[split], options, tokenizer, dropped) for split in splits}
    return BuildReport(indexes, spool.dropped)


def _shuffled(documents: np.ndarray, seed: int) -> np.ndarray:
    """In an order that depends on the seed and the number of documents only. Raw draws, because numpy promises to keep
    those of a bit generator, and not what `permutation` makes of them."""
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(documents))
    return documents[np.argsort(draws, kind="stable")]


def _plan_shards(
    spool: Path, folder: Path, documents: np.ndarray, options: BuildOptions, tokenizer: Tokenizer
) -> Iterator[_ShardPlan]:
    before = np.cumsum(documents["num_tokens"], dtype=np.int64) - documents["num_tokens"]
    _, firsts = np.unique(before // options.shard_tokens, return_index=True)
    for number, (first, stop) in enumerate(zip(firsts, [*firsts[1:], len(documents)], strict=True)):
        dtype = token_dtype(tokenizer.vocab_size)
        yield _ShardPlan(spool, folder, number, int(first), documents[first:stop], dtype)


def _write_shard(plan: _ShardPlan) -> Shard:
    """Runs in a worker: write one tar and its index, and read the tar back for it."""
    from webdataset.writer import TarWriter  # imports torch: seconds, and only here

    tar = plan.folder / f"shard-{plan.number:06d}.tar"
    spool = np.memmap(plan.spool, np.uint8, "r")
    width = np.dtype(plan.dtype).itemsize
    with tar.open("wb") as file:
        # No time, user or host in the tar: the same data give the same bytes.
        writer = TarWriter(file, user="", group="", mtime=0, encoder=False)
        for number, row in enumerate(plan.documents, start=plan.first_document):
            start, size = int(row["tokens_at"]), int(row["num_tokens"]) * width
            raw = spool[start : start + size + int(row["metadata_bytes"])]
            npy = io.BytesIO()
            np.lib.format.write_array(npy, raw[:size].view(plan.dtype), version=(1, 0), allow_pickle=False)
            key = f"{number:09d}-{int(row['hash']):016x}"
            writer.write({"__key__": key, "json": raw[size:].tobytes(), "tokens.npy": npy.getvalue()})
        writer.close()
    documents = np.array([row for _, row in shards.scan_tar(tar, plan.dtype)], DOCUMENT_DTYPE)
    documents_file = tar.with_suffix(".idx.npy")
    np.save(documents_file, documents, allow_pickle=False)
    for path in (tar, documents_file):
        _sync(path)
    return Shard(
        file=tar.name,
        documents_file=documents_file.name,
        num_documents=len(documents),
        num_tokens=int(documents["num_tokens"].sum(dtype=np.int64)),
        text_bytes=int(documents["text_bytes"].sum(dtype=np.int64)),
        size_bytes=tar.stat().st_size,
        sha256=shards.sha256_of(tar),
        documents_sha256=shards.sha256_of(documents_file),
    )


def _finish(
    folder: Path, written: list[Shard], options: BuildOptions, tokenizer: Tokenizer, dropped: dict[str, int]
) -> Index:
    """Write the tokenizer's files and, last, index.json."""
    tokenizer_files = tokenizer.save(folder)
    made: dict[str, Any] = {"split": folder.name, **dataclasses.asdict(options)}
    made["inputs"], made["exclude"] = list(options.inputs), list(options.exclude)
    index = Index(
        num_documents=sum(shard.num_documents for shard in written),
        num_tokens=sum(shard.num_tokens for shard in written),
        text_bytes=sum(shard.text_bytes for shard in written),
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer.fingerprint,
        tokenizer_files=digests_of(tokenizer.files),
        made=made,
        dropped=dropped,
        shards=tuple(written),
    )
    (folder / INDEX).write_text(index.to_json(), encoding="utf-8")
    for path in (*tokenizer_files, folder / INDEX, folder):
        _sync(path)
    return index


def _sync(path: Path) -> None:
    """To the disk, so that a crash after the renaming leaves no hole under the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
