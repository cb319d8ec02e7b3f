"""The spool -> shards: the held-out split, the shuffle, and tars written in many processes.

Every number here follows from the rows of the spool, the seed and the options, so a build that was killed plans the
same shards again. A shard gets its name when it is whole, and a line in a journal; those are not written again.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bigtrain.data import shard_format, sides
from bigtrain.data.journal import Journal, sync
from bigtrain.data.progress import bar
from bigtrain.data.shard_format import DOCUMENT_DTYPE, INDEX, PROMPTED_DTYPE, Index, Shard
from bigtrain.data.sides import Census
from bigtrain.data.spool import Spool
from bigtrain.data.tokenizer import Tokenizer, digests_of
from bigtrain.data.workers import Workers


@dataclass(frozen=True)
class ShardPlan:
    """Which documents go into one tar."""

    split: str
    number: int
    first: int
    """Document of the split, in the order of the shuffle."""
    stop: int

    @property
    def tar(self) -> str:
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class Split:
    name: str
    order: np.ndarray
    """int64[documents]: which row of the spool each document of the split is."""
    plans: list[ShardPlan]


def plan(spool: Spool, *, held_out: float, seed: int, shard_tokens: int, num_lanes: int) -> list[Split]:
    """What to write. Raises UserError where the documents of a split are too few."""
    rows = spool.rows()
    is_held_out = sides.held_out(rows["hash"], held_out)
    num_valid = int(np.count_nonzero(is_held_out))
    Census(len(rows) - num_valid, num_valid, spool.dropped).check(held_out, num_lanes=num_lanes)
    members = {"train": np.flatnonzero(~is_held_out)}
    if held_out:
        members["valid"] = np.flatnonzero(is_held_out)
    splits: list[Split] = []
    for name, documents in members.items():
        order = _shuffled(documents, seed)
        splits.append(Split(name, order, list(_plan_shards(name, rows["num_tokens"][order], shard_tokens))))
    return splits


def _shuffled(documents: np.ndarray, seed: int) -> np.ndarray:
    """In an order that depends on the seed and the number of documents only. Raw draws, because numpy promises to keep
    those of a bit generator, and not what `permutation` makes of them."""
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(documents))
    return documents[np.argsort(draws, kind="stable")]


def _plan_shards(split: str, num_tokens: np.ndarray, shard_tokens: int) -> Iterator[ShardPlan]:
    """Documents whose first tokens lie in the same `shard_tokens` of the split are in the same shard."""
    before = np.cumsum(num_tokens, dtype=np.int64)
    before -= num_tokens
    before //= shard_tokens
    firsts = [0, *(np.flatnonzero(np.diff(before)) + 1).tolist(), len(before)] if len(before) else []
    for number, (first, stop) in enumerate(itertools.pairwise(firsts)):
        yield ShardPlan(split, number, first, stop)


class Written:
    """The shards that are whole, and which of them an earlier build wrote."""

    def __init__(self, out: Path, journal: Path) -> None:
        self._out, self._journal = out, Journal(journal)
        self._shards = {
            (entry["split"], entry["shard"]["file"]): Shard(**entry["shard"]) for entry in self._journal.entries
        }

    @property
    def number(self) -> int:
        return len(self._shards)

    def get(self, wanted: ShardPlan) -> Shard | None:
        shard = self._shards.get((wanted.split, wanted.tar))
        if shard is None:
            return None
        files = (self._out / wanted.split / name for name in (shard.file, shard.documents_file))
        return shard if all(file.exists() for file in files) else None

    def add(self, split: str, shard: Shard) -> None:
        self._journal.append({"split": split, "shard": dataclasses.asdict(shard)})
        self._shards[split, shard.file] = shard

    def close(self) -> None:
        self._journal.close()


def write_shards(
    splits: list[Split], spool: Spool, dtype: str, out: Path, written: Written, workers: Workers, progress: bool
) -> None:
    """Write every shard that is not there yet into OUT/SPLIT, and note it in `written`."""
    todo: list[tuple[Split, ShardPlan]] = []
    for split in splits:
        (out / split.name).mkdir(parents=True, exist_ok=True)
        for torn in (out / split.name).glob(".*"):
            torn.unlink(missing_ok=True)
        todo += [(split, plan) for plan in split.plans if written.get(plan) is None]
    rows = spool.rows()
    jobs = (
        _Job(spool.path, out / split.name / plan.tar, plan.first, rows[split.order[plan.first : plan.stop]], dtype)
        for split, plan in todo
    )
    with bar("writing shards", spool.num_documents, shown=progress) as advance:
        advance(spool.num_documents - sum(plan.stop - plan.first for _, plan in todo))
        for (split, _), shard in zip(todo, workers.map(_write_shard, jobs), strict=True):
            written.add(split.name, shard)
            advance(shard.num_documents)


@dataclass(frozen=True)
class _Job:
    spool: Path
    tar: Path
    first_document: int
    rows: np.ndarray
    """spool.ROW_DTYPE, in the order of the tar."""
    dtype: str


def _write_shard(job: _Job) -> Shard:
    """Runs in a worker: write one tar and its index, and read the tar back for it."""
    documents_file = job.tar.with_suffix(".idx.npy")
    # Names of its own: a worker of a killed build may still be writing the same shard.
    aside = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in (job.tar, documents_file)}
    with aside[job.tar].open("wb") as file:
        _write_tar(job, file)
    samples = (row for _, row in shard_format.scan_tar(aside[job.tar], job.dtype))
    documents = np.fromiter(samples, PROMPTED_DTYPE, len(job.rows))
    if not documents["prompt_tokens"].any():  # as versions that know no prompts write and read it
        documents = documents[[*(DOCUMENT_DTYPE.names or ())]].astype(DOCUMENT_DTYPE)
    with aside[documents_file].open("wb") as file:
        np.save(file, documents, allow_pickle=False)
    for path, content in aside.items():
        sync(content)
        os.replace(content, path)
    sync(job.tar.parent)
    return Shard(
        file=job.tar.name,
        documents_file=documents_file.name,
        num_documents=len(documents),
        num_tokens=int(documents["num_tokens"].sum(dtype=np.int64)),
        text_bytes=int(documents["text_bytes"].sum(dtype=np.int64)),
        size_bytes=job.tar.stat().st_size,
        sha256=shard_format.sha256_of(job.tar),
        documents_sha256=shard_format.sha256_of(documents_file),
    )


def _write_tar(job: _Job, file: BinaryIO) -> None:
    from webdataset.writer import TarWriter  # imports torch: seconds, and only here

    width = np.dtype(job.dtype).itemsize
    # No time, user or host in the tar: the same data give the same bytes.
    writer = TarWriter(file, user="", group="", mtime=0, encoder=False)
    with job.spool.open("rb") as spool:
        # Documents lie anywhere in the spool: reading ahead would read it many times over.
        os.posix_fadvise(spool.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for number, row in enumerate(job.rows, start=job.first_document):
            spool.seek(int(row["tokens_at"]))
            tokens = spool.read(int(row["num_tokens"]) * width)
            metadata = spool.read(int(row["metadata_bytes"]))
            key = f"{number:09d}-{int(row['hash']):016x}"
            npy = _npy_header(int(row["num_tokens"]), job.dtype) + tokens
            writer.write({"__key__": key, "json": metadata, "tokens.npy": npy})
            writer.tarstream.members = []  # tarfile would remember them all  # pyright: ignore
    writer.close()


def _npy_header(num_tokens: int, dtype: str) -> bytes:
    """Of a .npy file with so many tokens."""
    header = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def write_index(
    split: Split,
    written: Written,
    folder: Path,
    tokenizer: Tokenizer,
    dtype: str,
    *,
    made: dict[str, Any],
    dropped: dict[str, int],
) -> Index:
    """Write the files of the tokenizer and, last, index.json of a split whose shards are in the folder."""
    tokenizer_files = tokenizer.save(folder)
    found = [shard for plan in split.plans if (shard := written.get(plan))]
    index = Index(
        num_documents=sum(shard.num_documents for shard in found),
        num_tokens=sum(shard.num_tokens for shard in found),
        text_bytes=sum(shard.text_bytes for shard in found),
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer.fingerprint,
        tokenizer_files=digests_of(tokenizer.files),
        made={"split": split.name, **made},
        dropped=dropped,
        shards=tuple(found),
    )
    (folder / INDEX).write_text(index.to_json(), encoding="utf-8")
    for path in (*tokenizer_files, folder / INDEX, folder):
        sync(path)
    return index
