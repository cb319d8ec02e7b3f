"""The format on disk: a folder of WebDataset tars of token arrays, with an index that makes them a random-access array.

    FOLDER/index.json             written last: without it the folder is not a data set
    FOLDER/tokenizer.model        the tokenizer that made the tokens, by the name of its kind (`tokenizer.FILES`)
    FOLDER/shard-000000.tar       one sample a document, in shuffled order:
        KEY.json                      {"source": ..., "text_bytes": ...}
        KEY.tokens.npy                [BOS] + ids + [EOS], uint16 or uint32
    FOLDER/shard-000000.idx.npy   one row a document: where its tokens lie in the tar (DOCUMENT_DTYPE)

Of a shard that has prompts, KEY.json has "prompt_tokens" too, and the rows are of PROMPTED_DTYPE.

KEY is the document's number in the folder and the hash of its text. Plain `tar`, numpy and webdataset read all of it;
shards.py reads the tokens through a memory map of the tar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bigtrain.config.locations import check_file
from bigtrain.data.tokenizer import FILES

FORMAT = "bigtrain shards"
VERSION = 1
INDEX = "index.json"
_SMALLEST_SAMPLE_BYTES = 4 * 512
"""Two members of a tar, each with a header and a block."""
_SHA256 = r"[0-9a-f]{64}"
_SHA256_FIELDS = ("sha256", "documents_sha256", "tokenizer")
DOCUMENT_DTYPE = np.dtype(
    [
        ("sample", "<u8"),  # offset in the tar of the sample's first header, bytes
        ("tokens_at", "<u8"),  # offset in the tar of the raw tokens, bytes
        ("num_tokens", "<u4"),
        ("text_bytes", "<u4"),
        ("crc32", "<u4"),  # of the raw tokens
    ]
)
PROMPTED_DTYPE = np.dtype(
    [
        *DOCUMENT_DTYPE.descr,
        ("prompt_tokens", "<u4"),  # at the begin, BOS counted: read, and never predicted
    ]
)
"""Rows of a shard some of whose documents begin with a prompt."""
_PARSING = threading.Lock()
"""numpy parses a header with ast.literal_eval, and two threads that do so at once end in a SystemError before Python
3.11.8: https://github.com/python/cpython/issues/106905"""


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
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError("it is not the index of a shard folder")
        if (version := values.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version}, this program reads version {VERSION}")
        try:
            index = Index(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"it lacks or adds a field: {error}") from error
        _check_values(index)
        files = index.tokenizer_files
        known = isinstance(files, dict) and files and not files.keys() - set(FILES)
        if not known or not all(re.fullmatch(_SHA256, str(digest)) for digest in files.values()):
            raise ValueError(f"its tokenizer_files are {str(files)[:80]!r}, not sha256 of {', '.join(FILES)}")
        for shard in index.shards:
            _check_values(shard)
            if shard.num_documents * _SMALLEST_SAMPLE_BYTES > shard.size_bytes:
                raise ValueError(
                    f"{shard.num_documents} documents do not fit into the {shard.size_bytes} bytes of a tar"
                )
            check_file(shard.file)
            check_file(shard.documents_file)
        return index


def _check_values(about: Index | Shard) -> None:
    """Raises ValueError where a field is not what it has to be: the file may come from anywhere."""
    for field in dataclasses.fields(about):
        value, kind = getattr(about, field.name), {"int": int, "str": str}.get(str(field.type))
        if kind is not None and type(value) is not kind:
            raise ValueError(f"its {field.name} is {str(value)[:80]!r}, no {field.type}")
        if kind is int and value < 0:
            raise ValueError(f"its {field.name} is {value}, below 0")
        if field.name in _SHA256_FIELDS and not re.fullmatch(_SHA256, value):
            raise ValueError(f"its {field.name} is {value[:80]!r}, no sha256")
        if field.name == "dtype" and value not in ("<u2", "<u4"):
            raise ValueError(f"its dtype is {value[:80]!r}, and tokens are <u2 or <u4")


def npy_header(stream: io.BytesIO) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """(dtype, shape) of a .npy file as numpy.save writes a list of rows."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"it has version {version} of the .npy format, not (1, 0)")
    with _PARSING:
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return dtype, shape


def read_metadata(tar: Path, sample: int) -> tuple[str, dict[str, Any]]:
    """(key, metadata) of the sample whose first header lies at byte `sample` of the tar."""
    with tar.open("rb") as file:
        file.seek(sample)
        return metadata_at(file)


def metadata_at(file: IO[bytes]) -> tuple[str, dict[str, Any]]:
    """(key, metadata) of the sample whose first header comes next in `file`."""
    with tarfile.open(fileobj=file, mode="r:") as members:
        member = members.next()
        content = members.extractfile(member) if member else None
        if member is None or content is None:
            raise tarfile.ReadError("no member there")
        return member.name.split(".")[0], json.loads(content.read())


def scan_tar(path: Path, dtype: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, row of PROMPTED_DTYPE) of each sample, found by reading the tar itself and nothing else.

    Raises ValueError or tarfile.TarError where a sample is not as the module says, with its key."""
    key, sample, text_bytes, prompt_tokens = "", 0, 0, 0
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as members:
        for member in members:
            name, _, ending = member.name.partition(".")
            file.seek(member.offset_data)
            raw = file.read(member.size)
            members.members = []  # tarfile would remember them all  # pyright: ignore[reportAttributeAccessIssue]
            if ending == "json":
                key, sample = name, member.offset
                text_bytes, prompt_tokens = _expect(lambda raw=raw: _parse_metadata(raw), name)
            elif ending == "tokens.npy" and name == key:
                tokens, header = _expect(lambda raw=raw: _parse_npy(raw, dtype), name)
                yield (
                    key,
                    (sample, member.offset_data + header, len(tokens), text_bytes, zlib.crc32(tokens), prompt_tokens),
                )
            else:
                raise ValueError(f"sample {name}: member {member.name} is not expected there")


def _expect(read: Any, key: str) -> Any:
    try:
        return read()
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"sample {key}: {error}") from error


def _parse_metadata(raw: bytes) -> tuple[int, int]:
    """(text_bytes, prompt_tokens)."""
    metadata = json.loads(raw)
    return int(metadata["text_bytes"]), int(metadata.get("prompt_tokens", 0))


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
