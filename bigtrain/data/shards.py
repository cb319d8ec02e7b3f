"""The format on disk: a folder of WebDataset tars of token arrays, with an index that makes them a random-access array.

    FOLDER/index.json             written last: without it the folder is not a data set
    FOLDER/tokenizer.model        the tokenizer that made the tokens, by the name of its kind (`tokenizer.FILES`)
    FOLDER/shard-000000.tar       one sample a document, in shuffled order:
        KEY.json                      {"source": ..., "text_bytes": ...}
        KEY.tokens.npy                [BOS] + ids + [EOS], uint16 or uint32
    FOLDER/shard-000000.idx.npy   one row a document: where its tokens lie in the tar (DOCUMENT_DTYPE)

KEY is the document's number in the folder and the hash of its text. Plain `tar`, numpy and webdataset read all of it;
`Dataset` reads the tokens through a memory map of the tar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data.tokenizer import FILES, Tokenizer, from_files

FORMAT = "bigtrain shards"
VERSION = 1
INDEX = "index.json"
DOCUMENT_DTYPE = np.dtype(
    [
        ("sample", "<u8"),  # offset in the tar of the sample's first header, bytes
        ("tokens_at", "<u8"),  # offset in the tar of the raw tokens, bytes
        ("num_tokens", "<u4"),
        ("text_bytes", "<u4"),
        ("crc32", "<u4"),  # of the raw tokens
    ]
)


@dataclass(frozen=True)
class Shard:
    """One tar, as index.json tells of it."""

    file: str
    documents_file: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    size_bytes: int
    sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class Index:
    """index.json."""

    num_documents: int
    num_tokens: int
    text_bytes: int
    vocab_size: int
    dtype: str
    bos_id: int
    eos_id: int
    tokenizer: str
    """Its fingerprint."""
    tokenizer_files: dict[str, str]
    """sha256 of each of its files, by name."""
    made: dict[str, Any]
    """What it was built from: split, inputs, exclude, field, held_out, seed."""
    dropped: dict[str, int]
    """Documents left out of the whole build (of all splits), by reason."""
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Index:
        """Raises ValueError for what is no index of this version."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError("it is not the index of a shard folder")
        if (version := values.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version}, this program reads version {VERSION}")
        try:
            files = values["tokenizer_files"]
            known = isinstance(files, dict) and files and not files.keys() - set(FILES)
            if not known or {*map(type, files.values())} != {str}:
                raise ValueError(f"its tokenizer_files are {str(files)[:80]!r}, not of {', '.join(FILES)}")
            return Index(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"it lacks or adds a field: {error}") from error


class Dataset:
    """A shard folder, open for reading. Cheap to open: an index and memory maps. Safe to read from many threads."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        self._starts = np.cumsum([0, *(shard.num_documents for shard in index.shards)])
        self._documents = [_load_documents(path / shard.documents_file, shard) for shard in index.shards]
        self._tars: list[np.ndarray | None] = [None] * len(index.shards)

    @staticmethod
    def open(path: str | os.PathLike[str], *, check_sizes: bool = True) -> Dataset:
        """Open the folder. Raises UserError where it is missing, half-built, of another version, or (`check_sizes`)
        has a shard missing or cut short. It does not read the tokens: `verify` does."""
        folder = Path(path)
        try:
            index = Index.from_json((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            inside = [part for part in ("train", "valid") if (folder / part / INDEX).exists()]
            build = "Build it with tools/shards.py build, or name text in data.prepare.inputs."
            hint = f"Did you mean {folder / inside[0]}?" if inside else build
            what = f"it has no {INDEX}" if folder.exists() else "no such folder"
            raise UserError(f"data {folder}: {what}. {hint}") from error
        except (ValueError, OSError) as error:
            raise UserError(f"data {folder}: {INDEX} cannot be read: {error}. Build the folder again.") from error
        for shard in index.shards if check_sizes else ():
            file = folder / shard.file
            size = file.stat().st_size if file.exists() else None
            if size != shard.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"data {folder}: {shard.file} {found}, not {shard.size_bytes} bytes. Build it again.")
        return Dataset(folder, index)

    def __len__(self) -> int:
        """Documents."""
        return self.index.num_documents

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their order in the folder (hex). Not of where the folder lies or what it was made from."""
        parts = [self.index.tokenizer, *(shard.sha256 for shard in self.index.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the folder."""
        try:
            files = {name: (self.path / name).read_bytes() for name in self.index.tokenizer_files}
        except OSError as error:
            raise UserError(f"data {error.filename}: {error.strerror}. Build the folder again.") from error
        return from_files(files, str(self.path))

    def num_tokens_of_documents(self) -> np.ndarray:
        """int64[documents], begin and end of document counted."""
        parts = [documents["num_tokens"] for documents in self._documents]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def shards_of_documents(self) -> np.ndarray:
        """int64[documents]: which shard each is in."""
        return np.repeat(np.arange(len(self.index.shards)), [shard.num_documents for shard in self.index.shards])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as a read-only view of the file (uint16 or uint32)."""
        shard, row = self._row_of(document)
        at, count = int(row["tokens_at"]), int(row["num_tokens"])
        width = np.dtype(self.index.dtype).itemsize
        stop = count if stop is None else min(stop, count)
        return self._tar(shard)[at + start * width : at + max(start, stop) * width].view(self.index.dtype)

    def describe(self, document: int) -> tuple[str, dict[str, Any]]:
        """(key, metadata) of a document: its name in the tar, and {"source": ..., "text_bytes": ...}."""
        shard, row = self._row_of(document)
        return read_metadata(self.path / self.index.shards[shard].file, int(row["sample"]))

    def documents_of_shard(self, shard: int) -> np.ndarray:
        """The index rows (DOCUMENT_DTYPE) of one shard."""
        return self._documents[shard]

    def _row_of(self, document: int) -> tuple[int, Any]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)} in {self.path}")
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        return shard, self._documents[shard][document - self._starts[shard]]

    def _tar(self, shard: int) -> np.ndarray:
        tar = self._tars[shard]
        if tar is None:  # two threads may both map it: harmless
            tar = self._tars[shard] = np.asarray(np.memmap(self.path / self.index.shards[shard].file, np.uint8, "r"))
        return tar


def _load_documents(path: Path, shard: Shard) -> np.ndarray:
    try:
        documents = np.load(path, mmap_mode="r", allow_pickle=False)
        if documents.dtype != DOCUMENT_DTYPE or documents.shape != (shard.num_documents,):
            raise ValueError(f"it holds {documents.shape} rows of {documents.dtype}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data {path.parent}: {path.name} cannot be read: {error}. Build the folder again.") from error
    return np.asarray(documents)


def read_metadata(tar: Path, sample: int) -> tuple[str, dict[str, Any]]:
    """(key, metadata) of the sample whose first header lies at byte `sample` of the tar."""
    with tar.open("rb") as file:
        file.seek(sample)
        with tarfile.open(fileobj=file, mode="r:") as members:
            member = members.next()
            content = members.extractfile(member) if member else None
            if member is None or content is None:
                raise tarfile.ReadError("no member there")
            return member.name.split(".")[0], json.loads(content.read())


def scan_tar(path: Path, dtype: str) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """(key, row of DOCUMENT_DTYPE) of each sample, found by reading the tar itself and nothing else.

    Raises ValueError or tarfile.TarError where a sample is not as the module says, with its key."""
    key, sample, text_bytes = "", 0, 0
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as members:
        for member in members:
            name, _, ending = member.name.partition(".")
            file.seek(member.offset_data)
            raw = file.read(member.size)
            members.members = []  # tarfile would remember them all  # pyright: ignore[reportAttributeAccessIssue]
            if ending == "json":
                key, sample = name, member.offset
                text_bytes = int(_expect(lambda raw=raw: json.loads(raw)["text_bytes"], name))
            elif ending == "tokens.npy" and name == key:
                tokens, header = _expect(lambda raw=raw: _parse_npy(raw, dtype), name)
                yield key, (sample, member.offset_data + header, len(tokens), text_bytes, zlib.crc32(tokens))
            else:
                raise ValueError(f"sample {name}: member {member.name} is not expected there")


def _expect(read: Any, key: str) -> Any:
    try:
        return read()
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"sample {key}: {error}") from error


def _parse_npy(raw: bytes, dtype: str) -> tuple[np.ndarray, int]:
    """The array in a .npy file, and the size of the header before it."""
    stream = io.BytesIO(raw)
    tokens = np.lib.format.read_array(stream, allow_pickle=False)
    if tokens.dtype != np.dtype(dtype) or tokens.ndim != 1:
        raise ValueError(f"it holds {tokens.ndim}-dimensional {tokens.dtype}, not a list of {dtype}")
    return tokens, len(raw) - tokens.nbytes


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_all(paths: Iterable[str], *, what: str, tokenizer: Tokenizer | None = None) -> list[Dataset]:
    """Open shard folders that train one model. Raises UserError where one cannot be opened, holds nothing, or was
    made by another tokenizer than `tokenizer` (or than the first folder). `what` names the setting, as data.train."""
    datasets = [Dataset.open(path) for path in paths]
    if not datasets:
        raise UserError(f"{what} is empty: give it shard folders, [{{path: FOLDER, weight: 1}}], or choose data=stdlib")
    expected, whose = (
        (tokenizer.fingerprint, "tokenizer.path") if tokenizer else (datasets[0].index.tokenizer, str(datasets[0].path))
    )
    for dataset in datasets:
        if not len(dataset):
            raise UserError(f"{what}: {dataset.path} holds no documents")
        if dataset.index.tokenizer != expected:
            raise UserError(
                f"{what}: {dataset.path} was made by the tokenizer {dataset.index.tokenizer}, "
                f"but {whose} is {expected}. Set tokenizer.path={dataset.path}, or build the shards again."
            )
    return datasets
