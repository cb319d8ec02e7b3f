"""Does a shard folder hold what its index says? Every byte is read."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data import shard_format, shards
from bigtrain.data.progress import bar
from bigtrain.data.shard_format import INDEX
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import fingerprint_of


def splits_of(place: str) -> list[str]:
    """The data sets at a place: itself, or the train/ and valid/ in it. Raises UserError where there is none."""
    if shards.is_there(place):
        return [place]
    inside = [f"{place.rstrip('/')}/{name}" for name in ("train", "valid")]
    if not (found := [split for split in inside if shards.is_there(split)]):
        Dataset.open(place)  # which raises
    return found


def verify(path: Path, *, progress: bool = True) -> list[str]:
    """What is wrong with the data set at `path`, one line each with the shard and the sample; empty: nothing."""
    try:
        dataset = Dataset.open(path, check_sizes=False)
    except UserError as error:
        return [str(error)]
    problems = list(_check_totals(dataset))
    problems += _check_tokenizer(dataset)
    total = sum(shard.size_bytes for shard in dataset.index.shards)
    with bar(f"verifying {path}", total, in_bytes=True, shown=progress) as advance:
        for number in range(len(dataset.index.shards)):
            problems += _check_shard(dataset, number)
            advance(dataset.index.shards[number].size_bytes)
    return problems


def _check_tokenizer(dataset: Dataset) -> Iterator[str]:
    if fingerprint_of(dataset.index.tokenizer_files) != dataset.index.tokenizer:
        yield f"{dataset.path / INDEX}: its tokenizer_files are not those of the tokenizer {dataset.index.tokenizer}"
    for name, digest in dataset.index.tokenizer_files.items():
        try:
            if shard_format.sha256_of(dataset.path / name) != digest:
                yield f"{dataset.path / name}: not the tokenizer that made the shards"
        except OSError as error:
            yield f"{dataset.path / name}: {error.strerror}"


def _check_totals(dataset: Dataset) -> Iterator[str]:
    index = dataset.index
    for name in ("num_documents", "num_tokens", "text_bytes"):
        total = sum(getattr(shard, name) for shard in index.shards)
        if getattr(index, name) != total:
            yield f"{dataset.path / INDEX}: {name} is {getattr(index, name)}, the shards have {total}"


def _check_shard(dataset: Dataset, number: int) -> list[str]:
    shard, rows = dataset.index.shards[number], dataset.documents_of_shard(number)
    tar, documents_file = dataset.path / shard.file, dataset.path / shard.documents_file
    problems: list[str] = []
    if shard_format.sha256_of(documents_file) != shard.documents_sha256:
        problems.append(f"{documents_file}: sha256 differs from the index")
    for name in ("num_tokens", "text_bytes"):
        if (total := int(rows[name].sum(dtype=np.int64))) != getattr(shard, name):
            problems.append(f"{documents_file}: {name} is {total}, the index says {getattr(shard, name)}")
    if not tar.exists():
        return [*problems, f"{tar}: missing"]
    if shard_format.sha256_of(tar) != shard.sha256:
        problems.append(f"{tar}: sha256 differs from the index")
    data = np.memmap(tar, np.uint8, "r") if tar.stat().st_size else np.zeros(0, np.uint8)
    for row, values in enumerate(rows):
        if why := _wrong_tokens(dataset, data, values):
            problems.append(f"{tar}: sample {_name(tar, values, row)}: {why}")
    problems += _check_tar(tar, rows, dataset.index.dtype)
    return problems


def _wrong_tokens(dataset: Dataset, data: np.ndarray, row: np.void) -> str | None:
    index = dataset.index
    start = int(row["tokens_at"])
    stop = start + int(row["num_tokens"]) * np.dtype(index.dtype).itemsize
    if stop > len(data):
        return f"its tokens end at byte {stop} of {len(data)}"
    raw = data[start:stop]
    tokens = raw.view(index.dtype)
    if zlib.crc32(raw.tobytes()) != int(row["crc32"]):
        return "its tokens are not those that were written (crc32 differs)"
    if int(tokens.max()) >= index.vocab_size:
        return f"token {int(tokens.max())} is not below the vocabulary's {index.vocab_size}"
    if tokens[0] != index.bos_id or tokens[-1] != index.eos_id:
        return f"it is not between the tokens {index.bos_id} and {index.eos_id}"
    return None


def _check_tar(tar: Path, rows: np.ndarray, dtype: str) -> Iterator[str]:
    """Read the tar as any tar program does, and compare each sample with the index."""
    count = 0
    try:
        for key, found in shard_format.scan_tar(tar, dtype):
            listed = tuple(rows[count].tolist()) if count < len(rows) else found
            if found != listed + (0,) * (len(found) - len(listed)):
                yield f"{tar}: sample {key}: the tar and the index differ: {found}, {listed}"
            count += 1
    except (tarfile.TarError, ValueError, OSError) as error:
        yield f"{tar}: after {count} samples: {error}"
        return
    if count != len(rows):
        yield f"{tar}: {count} samples can be read, the index has {len(rows)}"


def _name(tar: Path, values: np.void, row: int) -> str:
    try:
        return shard_format.read_metadata(tar, int(values["sample"]))[0]
    except (tarfile.TarError, ValueError, OSError):
        return f"number {row}"
