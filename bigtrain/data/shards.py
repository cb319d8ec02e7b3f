"""A folder of shards (shard_format.py) as a random-access array of documents. It may be remote: folders.py."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tarfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.faults import BadDocument
from bigtrain.data.folders import Folder, LocalFolder, Places, RemoteFolder, allow_open_files, check_room
from bigtrain.data.remote import MissingError
from bigtrain.data.shard_format import (
    DOCUMENT_DTYPE,
    INDEX,
    PROMPTED_DTYPE,
    Index,
    Shard,
    metadata_at,
    npy_header,
)
from bigtrain.data.tokenizer import FILES, Tokenizer, from_files, read_from

_LARGEST_NPY_HEADER_BYTES = 1024
_LARGEST_TOKENIZER_BYTES = 1 << 28
_FETCHES_AT_A_TIME = 8


class Dataset:
    """A shard folder, open for reading. Cheap to open: an index and memory maps. Safe to read from many threads."""

    has_prompts = False
    """Whether some document begins with a prompt."""

    def __init__(self, folder: Folder, index: Index) -> None:
        self._folder = folder
        self.index = index
        self._dtype = np.dtype(index.dtype)
        self._width = self._dtype.itemsize
        self._starts = [0, *itertools.accumulate(shard.num_documents for shard in index.shards)]
        self._tars: list[np.ndarray | None] = [None] * len(index.shards)
        """Maps of shards on a disk; those of remote ones are the cache's matter."""
        self._is_checked = [bytearray(shard.num_documents) for shard in index.shards]
        with ThreadPoolExecutor(_FETCHES_AT_A_TIME) as pool:  # no thread is started for nothing
            load = pool.map if folder.is_remote else map
            self._documents = list(load(self._load_documents, index.shards))
        self.has_prompts = any(documents.dtype == PROMPTED_DTYPE for documents in self._documents)
        self._places = [(documents["tokens_at"], documents["num_tokens"]) for documents in self._documents]

    @staticmethod
    def open(path: str | os.PathLike[str], *, places: Places | None = None, check_sizes: bool = True) -> Dataset:
        """Open the folder, or the place of one (bigtrain.config.locations), read through the cache of `places`.

        Raises UserError where it is missing, half-built, of another version, or (`check_sizes`, on a disk) has a shard
        missing or cut short. It does not read the tokens: `verify` does; those of a remote shard are checked when it is
        fetched, at its first use."""
        folder = (places or Places()).open(path)
        index = _read_index(folder)
        if isinstance(folder, LocalFolder) and check_sizes:
            _check_sizes(folder.path, index)
        allow_open_files(2 * len(index.shards))
        dataset = Dataset(folder, index)
        if folder.is_remote:
            dataset._tokenizer_files()
        return dataset

    @property
    def name(self) -> str:
        """Where it lies, to show in messages."""
        return self._folder.name

    @property
    def tokenizer_path(self) -> str:
        """What tokenizer.path would be to use its tokenizer."""
        files = self.index.tokenizer_files
        return self.name + (f"/{next(name for name in FILES if name in files)}" if self.is_remote else "")

    @property
    def path(self) -> Path:
        """The folder. Raises ValueError where it is remote."""
        if isinstance(self._folder, LocalFolder):
            return self._folder.path
        raise ValueError(f"{self.name} is no folder on a disk")

    @property
    def is_remote(self) -> bool:
        return self._folder.is_remote

    def __len__(self) -> int:
        """Documents."""
        return self.index.num_documents

    @property
    def size_bytes(self) -> int:
        """Of all tokens."""
        return self.index.num_tokens * self._width

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their order in the folder (hex). Not of where the folder lies or what it was made from."""
        parts = [self.index.tokenizer, *(shard.sha256 for shard in self.index.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the folder."""
        return from_files(self._tokenizer_files(), self.name)

    def num_tokens_of_documents(self) -> np.ndarray:
        """int64[documents], begin and end of document counted."""
        parts = [documents["num_tokens"] for documents in self._documents]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def prompt_tokens(self, document: int) -> int:
        """Of a document: tokens at its begin, BOS counted, that are read and never predicted; 0 of plain text."""
        shard = self.shard_of(document)
        rows = self._documents[shard]
        return int(rows["prompt_tokens"][document - self._starts[shard]]) if rows.dtype == PROMPTED_DTYPE else 0

    @property
    def num_prompt_tokens(self) -> int:
        """Of all documents."""
        prompted = (rows for rows in self._documents if rows.dtype == PROMPTED_DTYPE)
        return sum(int(rows["prompt_tokens"].sum(dtype=np.int64)) for rows in prompted)

    def shards_of_documents(self) -> np.ndarray:
        """int64[documents]: which shard each is in."""
        return np.repeat(np.arange(len(self.index.shards)), [shard.num_documents for shard in self.index.shards])

    def shard_of(self, document: int) -> int:
        """Which shard a document is in."""
        if not 0 <= document < self._starts[-1]:
            raise IndexError(f"document {document} of {len(self)} in {self.name}")
        return bisect_right(self._starts, document) - 1

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as a read-only view of the file (uint16 or uint32). Raises BadDocument
        where they are not those of the index, and UserError where its shard is to be fetched and cannot be."""
        shard = bisect_right(self._starts, document) - 1  # shard_of: this is called for every piece of every batch
        if shard < 0:
            raise IndexError(f"document {document} in {self.name}")
        place = document - self._starts[shard]
        tokens_at, num_tokens = self._places[shard]
        count = num_tokens.item(place)
        end = count if stop is None or stop > count else stop
        if not self._is_checked[shard][place]:
            self._check(shard, place, document)
        at, width, tar = tokens_at.item(place), self._width, self._tars[shard]
        if tar is None:
            tar = self.tar(shard)
        return tar[at + start * width : at + max(start, end) * width].view(self._dtype)

    def file_of(self, document: int) -> str:
        """The shard that a document is in."""
        return self.index.shards[self.shard_of(document)].file

    def describe(self, document: int) -> tuple[str, dict[str, Any]]:
        """(key, metadata) of a document: its name in the tar, and {"source": ..., "text_bytes": ...}."""
        shard = self.shard_of(document)
        row = self._documents[shard][document - self._starts[shard]]
        try:
            return metadata_at(io.BytesIO(self.tar(shard)[int(row["sample"]) : int(row["tokens_at"])].tobytes()))
        except (tarfile.TarError, OSError, ValueError, KeyError) as error:
            place = f"{self.index.shards[shard].file}: document {document} (byte {int(row['sample']):,})"
            raise UserError(f"data {self.name}: {place}: its name cannot be read: {error}.") from error

    def documents_of_shard(self, shard: int) -> np.ndarray:
        """The index rows (DOCUMENT_DTYPE or PROMPTED_DTYPE) of one shard."""
        return self._documents[shard]

    def tar(self, shard: int, cancelled: threading.Event | None = None) -> np.ndarray:
        """The bytes of a tar, uint8[size], read-only; fetched first where it is remote and not in the cache. Raises
        UserError where it cannot be, and remote.Cancelled."""
        tar = self._tars[shard]
        if tar is not None:
            return tar
        about = self.index.shards[shard]
        size, folder = about.size_bytes, self._folder
        if isinstance(folder, RemoteFolder):
            return folder.map(about.file, sha256=about.sha256, max_bytes=size, size_bytes=size, cancelled=cancelled)
        tar = folder.map(about.file, sha256=about.sha256, max_bytes=size, size_bytes=size)
        self._tars[shard] = tar  # two threads may both map it: harmless
        return tar

    def _check(self, shard: int, place: int, document: int) -> None:
        """Once for each document, at its first use: are its tokens there, and those of the index?"""
        row, about = self._documents[shard][place], self.index.shards[shard]
        start, size = int(row["tokens_at"]), int(row["num_tokens"]) * np.dtype(self.index.dtype).itemsize
        reason = ""
        try:
            tokens = self.tar(shard)[start : start + size]
            if len(tokens) < size:
                reason = "the shard is cut short before its end"
            elif zlib.crc32(tokens.data) != int(row["crc32"]):
                reason = "its tokens are damaged: their checksum is not that of the index"
            elif size and int(tokens.view(self.index.dtype).max()) >= self.index.vocab_size:
                reason = f"it has tokens beyond the vocabulary's {self.index.vocab_size}"
        except OSError as error:
            reason = f"the shard cannot be read: {error.strerror or error}"
        if reason:
            raise BadDocument(self.name, about.file, f"{document} (byte {int(row['sample']):,})", reason, size)
        self._is_checked[shard][place] = True

    def _tokenizer_files(self) -> dict[str, bytes]:
        def read(file: str, sha256: str) -> bytes:
            return self._folder.map(file, sha256=sha256, max_bytes=_LARGEST_TOKENIZER_BYTES, hold=False).tobytes()

        try:
            return {file: read(file, sha256) for file, sha256 in self.index.tokenizer_files.items()}
        except OSError as error:
            raise UserError(f"data {error.filename}: {error.strerror}. Build the folder again.") from error

    def _load_documents(self, shard: Shard) -> np.ndarray:
        size = _LARGEST_NPY_HEADER_BYTES + shard.num_documents * PROMPTED_DTYPE.itemsize
        try:
            raw = self._folder.map(shard.documents_file, sha256=shard.documents_sha256, max_bytes=size, hold=False)
            header = io.BytesIO(raw[:_LARGEST_NPY_HEADER_BYTES].tobytes())
            dtype, shape = npy_header(header)
            if dtype not in (DOCUMENT_DTYPE, PROMPTED_DTYPE) or shape != (shard.num_documents,):
                raise ValueError(f"it holds {shape} rows of {dtype}")
            rows = raw[header.tell() :].view(dtype).reshape(shape)
            # The sizes are the order of the data; its sha256 is not read again in each start, its sums are.
            sums = [int(rows[name].sum(dtype=np.int64)) for name in ("num_tokens", "text_bytes")]
            if sums != [shard.num_tokens, shard.text_bytes] or rows["num_tokens"].min(initial=2) < 2:
                raise ValueError(f"its documents have {sums} tokens and bytes, the index says otherwise")
            if dtype == PROMPTED_DTYPE and (rows["prompt_tokens"] >= rows["num_tokens"]).any():
                raise ValueError("a prompt is as long as its document")
            return rows
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"data {self.name}: {shard.documents_file} cannot be read: {error}. Build the folder again."
            ) from error


def _read_index(folder: Folder) -> Index:
    try:
        return Index.from_json(folder.read(INDEX).decode("utf-8"))
    except FileNotFoundError as error:
        assert isinstance(folder, LocalFolder)
        inside = [part for part in ("train", "valid") if (folder.path / part / INDEX).exists()]
        build = "Build it with tools/shards.py build, or name text in data.prepare.inputs."
        hint = f"Did you mean {folder.path / inside[0]}?" if inside else build
        what = f"it has no {INDEX}" if folder.path.exists() else "no such folder"
        raise UserError(f"data {folder.name}: {what}. {hint}") from error
    except MissingError as error:
        raise MissingError(f"{error} A folder of shards has one: is it train/ or valid/ in there?") from error
    except (ValueError, OSError) as error:
        raise UserError(f"data {folder.name}: {INDEX} cannot be read: {error}. Build the folder again.") from error


def _check_sizes(folder: Path, index: Index) -> None:
    for shard in index.shards:
        file = folder / shard.file
        size = file.stat().st_size if file.exists() else None
        if size != shard.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"data {folder}: {shard.file} {found}, not {shard.size_bytes} bytes. Build it again.")


def is_there(place: str) -> bool:
    """Whether a shard folder is at this place. Raises UserError where that cannot be known."""
    folder = Places().open(place)
    if isinstance(folder, LocalFolder):
        return (folder.path / INDEX).exists()
    try:
        return bool(folder.read(INDEX))
    except MissingError:
        return False


def open_all(
    paths: Iterable[str],
    *,
    what: str,
    tokenizer: Tokenizer | None = None,
    places: Places | None = None,
    check_sizes: bool = True,
    by_meaning: bool = False,
) -> list[Dataset]:
    """Open shard folders that train one model. Raises UserError where one cannot be opened, holds nothing, or was
    made by another tokenizer than `tokenizer` (or than the first folder). `what` names the setting, as data.train.
    `by_meaning`: a tokenizer of another file will do whose ids mean the same, as an exported one."""
    places = places or Places()
    datasets = [Dataset.open(path, places=places, check_sizes=check_sizes) for path in paths]
    if not datasets:
        raise UserError(f"{what} is empty: give it shard folders, [{{path: FOLDER, weight: 1}}], or choose data=stdlib")
    expected, whose = (
        (tokenizer.fingerprint, "tokenizer.path") if tokenizer else (datasets[0].index.tokenizer, datasets[0].name)
    )
    for dataset in datasets:
        if not len(dataset):
            raise UserError(f"{what}: {dataset.name} holds no documents")
        if dataset.index.tokenizer != expected and not (
            by_meaning and tokenizer and tokenizer.means_the_same(dataset.tokenizer)
        ):
            raise UserError(
                f"{what}: {dataset.name} was made by the tokenizer {dataset.index.tokenizer}, "
                f"but {whose} is {expected}. Build the shards again with that one, or give the run "
                f"tokenizer.path={dataset.tokenizer_path}."
            )
    allow_open_files(sum(2 * len(dataset.index.shards) for dataset in datasets))
    remote = [dataset for dataset in datasets if dataset.is_remote]
    in_use = sum(dataset.documents_of_shard(n).nbytes for dataset in remote for n in range(len(dataset.index.shards)))
    check_room(places.cache, [[shard.size_bytes for shard in each.index.shards] for each in remote], in_use)
    return datasets


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of a run, of which tokenizer.path may be in a remote shard folder. Raises UserError where it is
    missing or unfit."""
    path = config.tokenizer.path
    if not locations.is_remote(path):
        return Tokenizer.load(path)
    places, (folder, file) = Places.of(config.data), locations.split_file(path)

    def read(name: str) -> bytes:
        try:
            return places.read_file(f"{folder}/{name}")
        except MissingError as error:
            if name == file:
                raise
            raise FileNotFoundError(name) from error

    return read_from(read, file, locations.shown(path))
