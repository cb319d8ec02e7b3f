"""Tars of raw text as a source to train on: WebDataset tars as they are, tokenised while they are streamed.

Nothing is prepared. A tar is opened (remote ones through the cache) and its headers are read when the first document of
it is due; each document is tokenised when it is due, by the code that builds shards. So how many tokens a document has
is known only then, and the order (text_lanes.py) is kept by position, not by arithmetic.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.data import encoding
from bigtrain.data.faults import BadDocument
from bigtrain.data.folders import Folder, LocalFolder, Places, RemoteFolder, allow_open_files
from bigtrain.data.formats import FORMATS, Drop, pair
from bigtrain.data.remote import Cancelled
from bigtrain.data.shard_format import INDEX
from bigtrain.data.tar_scan import JSON, Sample, scan
from bigtrain.data.tokenizer import Tokenizer

ENDING = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_MOST_TARS = 1 << 22
_LARGEST_REMOTE_TAR_BYTES = 8 << 30
_USUAL_REMOTE_TAR_BYTES = 1 << 30
"""For which the cache makes room before the size is known."""
_KEPT_TARS = 16
_KEPT_TOKENS_BYTES = 256 << 20
_SAMPLE_BYTES = 4096
_Encoded = tuple[np.ndarray, int]
"""The tokens of a document, and how many of them are its prompt."""
_Found = _Encoded | BadDocument


@dataclass(frozen=True)
class Tar:
    """One tar, its headers read."""

    raw: np.ndarray | None
    """uint8[size]; None of a remote one, which the cache may let go meanwhile."""
    samples: list[Sample]


def is_text(path: str) -> bool:
    """Whether a source of data.train is tars of text, and no folder of tokenised shards."""
    if locations.split_file(path)[1].endswith((ENDING, *_PACKED)):
        return True
    if locations.is_remote(path):
        return False
    folder = Path(locations.local(path))
    return not (folder / INDEX).exists() and next(_tars_in(folder), None) is not None


class TextTars:
    """Documents by number: shard << 32 | sample in it. Safe to use from many threads."""

    def __init__(
        self,
        folder: Folder,
        files: Sequence[str],
        tokenizer: Tokenizer | None,
        *,
        name: str,
        field: str,
        prompt_field: str = "",
    ) -> None:
        """`files` of `folder`; `field`: key of the text in .json members, `prompt_field`: of a prompt before it.
        Without a `tokenizer` it gives texts only."""
        self.name, self.files, self.is_remote = name, list(files), folder.is_remote
        self.tokenizer, self._folder, self._field, self._prompt_field = tokenizer, folder, field, prompt_field
        self.has_prompts = bool(prompt_field)
        self._sizes = _sizes_of(folder, self.files)
        self._tars: OrderedDict[int, Future[Tar]] = OrderedDict()
        self._tokens: OrderedDict[int, Future[_Found]] = OrderedDict()
        self._in_use: dict[int, int] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._opener: _Opener | None = None
        self._stopped = threading.Event()
        fields = f"{field}\0{prompt_field}" if prompt_field else field
        parts = ["text", tokenizer.fingerprint if tokenizer else "", fields, *_told(folder, self.files, self._sizes)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        """Of the tokenizer and the tars: their names, and where they lie on a disk sizes and some of the content, else
        where they lie (hex)."""

    @staticmethod
    def open(
        path: str,
        tokenizer: Tokenizer | None,
        *,
        places: Places | None = None,
        field: str = "text",
        prompt_field: str = "",
    ) -> TextTars:
        """The tars at `path`: a folder of them, or a name of one or many with {000..127} or, on a disk, * in it. Raises
        UserError where there is none, or one is packed."""
        folder, files = _expand(path, places or Places())
        if packed := next((file for file in files if file.endswith(_PACKED)), None):
            raise UserError(f"data {locations.shown(path)}: {packed} is packed. Unpack it: text is read by position.")
        if not folder.is_remote:
            allow_open_files(min(len(files), _KEPT_TARS))
        return TextTars(folder, files, tokenizer, name=locations.shown(path), field=field, prompt_field=prompt_field)

    @property
    def size_bytes(self) -> int:
        """Of all tars; of remote ones, of those that were opened."""
        return sum(self._sizes)

    def use_threads(self, number: int) -> None:
        """Tokenise documents that will be needed soon on so many threads, and open tars on another, until `close`."""
        if number:
            self._pool = ThreadPoolExecutor(number, thread_name_prefix="tokenise")
            self._opener = _Opener(self._open_ahead, self._stopped)

    def close(self) -> None:
        """End the threads, and give up what is being fetched: who waits for it gets Cancelled. It can still be read."""
        pool, stopped = self._pool, self._stopped
        self._pool, self._opener, self._stopped = None, None, threading.Event()
        stopped.set()
        if pool is not None:
            pool.shutdown(wait=False)

    def num_documents(self, shard: int) -> int:
        """Of one tar, bad ones counted. Raises UserError where it cannot be fetched or read."""
        return len(self._tar(shard).samples)

    def shard_of(self, document: int) -> int:
        """Which tar a document is in."""
        return document >> 32

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document. Raises BadDocument where it has none that can be used."""
        return self._document(document)[0][start:stop]

    def prompt_tokens(self, document: int) -> int:
        """Of a document: tokens at its begin, BOS counted, that are read and never predicted; 0 of plain text. Raises
        BadDocument."""
        return self._document(document)[1]

    def _document(self, document: int) -> _Encoded:
        with self._lock:
            found = self._tokens.get(document)
            if found is not None:
                self._tokens.move_to_end(document)
        encoded = (found or self._begin(document, None)).result()
        if isinstance(encoded, BadDocument):
            raise BadDocument(self.name, encoded.shard, encoded.sample, encoded.reason, encoded.size_bytes)
        return encoded

    def use(self, lane: int, document: int) -> None:
        """A lane is in this document: its tokens are kept until the lane is in another."""
        self._in_use[lane] = document

    def prefetch(self, documents: Iterable[int]) -> None:
        """Tokenise documents that will be asked for next, where there are threads for it."""
        if self._pool is not None:
            for document in documents:
                if document not in self._tokens:
                    self._begin(document, self._pool)

    def prefetch_tar(self, shard: int) -> None:
        """Open a tar that will be asked for next, where there is a thread for it."""
        if self._opener is not None and shard not in self._tars:
            self._opener.wanted.put(shard)

    def text_bytes(self, document: int) -> int:
        """Size of the document in the tar, about that of its text."""
        return self._sample(document)[1].size

    def file_of(self, document: int) -> str:
        """The tar that a document is in."""
        return self.files[self.shard_of(document)]

    def describe(self, document: int) -> tuple[str, dict[str, Any]]:
        """(key, metadata) of a document: its name in the tar, and {"source": ..., "text_bytes": ...}."""
        _, sample = self._sample(document)
        return sample.key, {"source": self.file_of(document), "text_bytes": sample.size}

    def _begin(self, document: int, pool: ThreadPoolExecutor | None) -> Future[_Found]:
        """Tokenise it: on the pool, or at once. Only one does it for all who ask."""
        mine: Future[_Found] = Future()
        with self._lock:
            found = self._tokens.setdefault(document, mine)
        if found is mine:
            if pool is None:
                self._tokenize_into(document, mine)
            else:
                pool.submit(self._tokenize_into, document, mine, self._stopped)
        return found

    def _tokenize_into(self, document: int, result: Future[_Found], stopped: threading.Event | None = None) -> None:
        try:
            if stopped is not None and stopped.is_set():
                raise Cancelled
            encoded: _Found = self._tokenize(document)
        except BadDocument as bad:
            encoded = BadDocument(self.name, bad.shard, bad.sample, bad.reason, bad.size_bytes)  # without its frames
        except BaseException as error:
            result.set_exception(error)
            with self._lock:
                self._tokens.pop(document, None)
            return
        result.set_result(encoded)
        with self._lock:
            self._held_bytes += _size_of(result)
            if self._held_bytes > _KEPT_TOKENS_BYTES:
                self._let_go({document, *self._in_use.values()})

    def _let_go(self, kept: set[int]) -> None:
        """Forget the tokens that were used least recently, but those of `kept` documents."""
        for document, future in list(self._tokens.items()):
            if self._held_bytes <= _KEPT_TOKENS_BYTES:
                return
            if document not in kept and future.done():
                del self._tokens[document]
                self._held_bytes -= _size_of(future)

    def _tokenize(self, document: int) -> _Encoded:
        assert self.tokenizer is not None
        prompt, text = self._pair(document)
        return encoding.encode_pair(self.tokenizer, prompt, text)

    def text(self, document: int) -> str:
        """The text of a document, its prompt before it; never blank. Raises BadDocument where it has none that can be
        used."""
        prompt, text = self._pair(document)
        return (prompt or "") + text

    def _pair(self, document: int) -> tuple[str | None, str]:
        """(prompt, text)."""
        tar, sample = self._sample(document)
        try:
            if sample.reason:
                raise Drop(sample.reason)
            tar_bytes = self._map(self.shard_of(document)) if tar.raw is None else tar.raw
            raw = tar_bytes[sample.start : sample.start + sample.size].tobytes()
            if self._prompt_field and sample.kind != JSON:
                raise Drop("it is .txt, which has no prompt")
            if self._prompt_field:
                return pair(raw, self._field, self._prompt_field)
            text = FORMATS[".jsonl" if sample.kind == JSON else "text"].text(raw, self._field)
            if not text or text.isspace():
                raise Drop("empty")
        except Drop as reason:
            raise BadDocument(self.name, self.file_of(document), sample.key, str(reason), sample.size) from None
        return None, text

    def _sample(self, document: int) -> tuple[Tar, Sample]:
        tar = self._tar(document >> 32)
        return tar, tar.samples[document & 0xFFFFFFFF]

    def _tar(self, shard: int) -> Tar:
        """Open it, once for all who ask; the newest stay open."""
        mine: Future[Tar] = Future()
        with self._lock:
            found = self._tars.setdefault(shard, mine)
            self._tars.move_to_end(shard)
            if len(self._tars) > _KEPT_TARS:
                self._tars.popitem(last=False)
        if found is mine:
            try:
                mine.set_result(self._open(shard))
            except BaseException as error:
                with self._lock:
                    self._tars.pop(shard, None)
                mine.set_exception(error)
        return found.result()

    def _open_ahead(self, shard: int) -> None:
        with contextlib.suppress(UserError, Cancelled):  # who needs the tar will be told
            self._tar(shard)

    def _open(self, shard: int) -> Tar:
        raw = self._map(shard)
        self._sizes[shard] = len(raw)
        return Tar(None if self.is_remote else raw, scan(raw))

    def _map(self, shard: int) -> np.ndarray:
        file, folder, most = self.files[shard], self._folder, _LARGEST_REMOTE_TAR_BYTES
        try:
            if isinstance(folder, RemoteFolder):
                usual = _USUAL_REMOTE_TAR_BYTES
                return folder.map(file, sha256=None, max_bytes=most, reserve_bytes=usual, cancelled=self._stopped)
            return folder.map(file, sha256=None, max_bytes=most)
        except OSError as error:
            raise UserError(f"data {self.name}: {file}: {error.strerror or error}.") from error


class _Opener(threading.Thread):
    """Opens tars, one behind the other. A daemon: a server that stalls does not keep the process from ending."""

    def __init__(self, work: Callable[[int], None], stopped: threading.Event) -> None:
        super().__init__(name="open-tars", daemon=True)
        self.wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._work, self._stopped = work, stopped
        self.start()

    def run(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Empty):
                shard = self.wanted.get(timeout=0.5)
                self._work(shard)


def _size_of(future: Future[_Found]) -> int:
    """Bytes of its tokens."""
    encoded = None if future.exception() else future.result()
    return encoded[0].nbytes if isinstance(encoded, tuple) else 0


def _told(folder: Folder, files: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
    """What tells these tars from others."""
    if not isinstance(folder, LocalFolder):
        yield from (folder.name, *files)
        return
    for file, size in zip(files, sizes, strict=True):
        with (folder.path / file).open("rb") as tar:
            digest = hashlib.sha256(tar.read(_SAMPLE_BYTES))
            tar.seek(size // 2)
            digest.update(tar.read(_SAMPLE_BYTES))
        yield f"{file} {size} {digest.hexdigest()}"


def _expand(path: str, places: Places) -> tuple[Folder, list[str]]:
    shown = locations.shown(path)
    if locations.is_remote(path):
        folder, pattern = locations.split_file(path)
        try:
            return places.open(folder), [locations.check_file(file) for file in _braces(pattern, shown)]
        except ValueError as error:
            raise UserError(f"data {shown}: {error}. Name many files with {{000..127}}.") from None
    local = Path(locations.local(path))
    found = sorted(_tars_in(local)) if local.is_dir() else sorted({*_globs(str(local), shown)})
    if not found:
        raise UserError(f"data {shown}: no such tar, or none in the folder.")
    parent = Path(os.path.commonpath([file.parent for file in found]))
    return LocalFolder(parent), [str(file.relative_to(parent)) for file in found]


def _tars_in(folder: Path) -> Iterator[Path]:
    return folder.glob(f"*{ENDING}")


def _globs(pattern: str, shown: str) -> Iterator[Path]:
    for each in _braces(pattern, shown):
        found = glob.glob(each, recursive=True)
        if not found:
            raise UserError(f"data {shown}: {each}: no such file.")
        yield from map(Path, found)


def _braces(pattern: str, shown: str) -> list[str]:
    import braceexpand

    try:
        found = list(itertools.islice(braceexpand.braceexpand(pattern), _MOST_TARS + 1))
    except ValueError as error:
        raise UserError(f"data {shown}: {error}") from error
    if len(found) > _MOST_TARS:
        raise UserError(f"data {shown}: it names more than {_MOST_TARS:,} tars")
    return found


def _sizes_of(folder: Folder, files: Sequence[str]) -> list[int]:
    if not isinstance(folder, LocalFolder):
        return [0] * len(files)
    try:
        return [(folder.path / file).stat().st_size for file in files]
    except OSError as error:
        raise UserError(f"data {error.filename}: {error.strerror}.") from error
