"""The tensors of a checkpoint where they lie on the disk, read in pieces of any size and never more.

torch.distributed.checkpoint writes each chunk of a tensor as a small zip archive of torch.save, uncompressed, one
behind the other in a file. So the elements of a chunk are contiguous bytes at a place that the archive's directory
tells: `Stored` reads the rows that are asked for from there. Nothing is unpickled, and a file that ends early is an
OSError.
"""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

BLOCK_BYTES = 8 << 20
"""Most that is read at a time."""
_LOCAL_HEADER_BYTES = 30

Visit = Callable[[torch.Tensor, tuple[int, ...]], None]
"""Is shown each block that was read, contiguous, and where it begins in its chunk."""


class DamagedFile(OSError):
    """A file of a checkpoint is not what was written: it is missing, ends early, or holds no such tensor. Any other
    OSError says nothing of the checkpoint: another try may read it."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor that lies in one file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """Byte where its archive begins in the file."""
    length: int
    """Bytes of its archive."""

    @property
    def numel(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def tensors_of(index: Any) -> dict[str, StoredTensor]:
    """The tensors of DCP's index, by name. Raises ValueError where the index contradicts itself."""
    found: dict[str, StoredTensor] = {}
    for name, meta in cast("dict[str, Any]", index.state_dict_metadata).items():
        if not isinstance(meta, TensorStorageMetadata):
            continue
        chunks = tuple(_chunk(index.storage_data, name, each, number) for number, each in enumerate(meta.chunks))
        shape = tuple(meta.size)
        if sum(chunk.numel for chunk in chunks) != prod(shape):
            raise ValueError(f"the chunks of {name} do not add up to its shape {shape}")
        found[name] = StoredTensor(name, shape, meta.properties.dtype, chunks)
    return found


def _chunk(places: dict[MetadataIndex, Any], name: str, chunk: Any, number: int) -> Chunk:
    place = places.get(MetadataIndex(name, chunk.offsets, number))
    if place is None:
        raise ValueError(f"the index does not tell where the chunk of {name} at {tuple(chunk.offsets)} lies")
    file = str(place.relative_path)
    if Path(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"{name} would lie in {file!r}, outside of the checkpoint")
    return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, int(place.offset), int(place.length))


class Stored:
    """Open files of one checkpoint; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, io.FileIO] = {}
        self._payloads: dict[tuple[str, int], int] = {}
        self._stack = ExitStack()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, tensor: StoredTensor, offsets: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out` with the rectangle of its shape that begins at `offsets`. Raises OSError, ValueError."""
        for chunk, where, target in _overlaps(tensor, offsets, out):
            self.read_chunk(chunk, tensor.dtype, where, target)

    def read_chunk(
        self, chunk: Chunk, dtype: torch.dtype, offsets: Sequence[int], out: torch.Tensor, visit: Visit | None = None
    ) -> None:
        """Fill `out`, of any dtype and device, with the part of `chunk` of its shape that begins at `offsets` (counted
        from the chunk's own corner). `visit`: see there."""
        if visit is None and _is_like(out, chunk, dtype):
            position = self._payload(chunk, dtype) + offsets[0] * prod(chunk.sizes[1:]) * dtype.itemsize
            self._read_exactly(chunk.file, position, memoryview(cast("Any", out.view(-1).view(torch.uint8).numpy())))
            return
        for block, begin in self.blocks(chunk, dtype, offsets, tuple(out.shape)):
            if visit is not None:
                visit(block, begin)
            if not out.dim():
                out.copy_(block)
                continue
            first = begin[0] - offsets[0]
            out[first : first + len(block)].copy_(block)

    def blocks(
        self,
        chunk: Chunk,
        dtype: torch.dtype,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
        """The part of a chunk (default: all of it) in blocks of whole rows of it, each with where it begins in the
        chunk. A block is memory that the next one overwrites."""
        begin, shape = tuple(offsets or (0,) * len(chunk.sizes)), tuple(chunk.sizes if sizes is None else sizes)
        if not prod(shape):
            return
        payload = self._payload(chunk, dtype)
        if not shape:
            yield self._block(chunk, dtype, payload, 1, ()).view(()), ()
            return
        row_bytes = prod(chunk.sizes[1:]) * dtype.itemsize
        rows_a_block = max(1, BLOCK_BYTES // row_bytes)
        columns = tuple(slice(at, at + size) for at, size in zip(begin[1:], shape[1:], strict=True))
        whole = shape[1:] == chunk.sizes[1:]
        for first in range(begin[0], begin[0] + shape[0], rows_a_block):
            rows = min(rows_a_block, begin[0] + shape[0] - first)
            block = self._block(chunk, dtype, payload + first * row_bytes, rows, chunk.sizes[1:])
            yield (block if whole else block[(slice(None), *columns)].contiguous()), (first, *begin[1:])

    def _block(
        self, chunk: Chunk, dtype: torch.dtype, position: int, rows: int, row_shape: tuple[int, ...]
    ) -> torch.Tensor:
        size = rows * prod(row_shape) * dtype.itemsize
        if len(self._scratch) < size:
            self._scratch = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
        memory = self._scratch[:size]
        self._read_exactly(chunk.file, position, memoryview(cast("Any", memory.numpy())))
        return memory.view(dtype).view(rows, *row_shape)

    def _read_exactly(self, file: str, position: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._open(file).fileno(), [view[done:]], position + done)
            if count == 0:
                raise DamagedFile(f"{file} ends at byte {position + done}")
            done += count

    def _open(self, file: str) -> io.FileIO:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(io.FileIO(self.folder / file))
            except FileNotFoundError as error:
                raise DamagedFile(f"{file} is missing") from error
        return self._files[file]

    def _payload(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Byte of the file where the elements of a chunk begin."""
        key = (chunk.file, chunk.start)
        if key not in self._payloads:
            self._payloads[key] = self._find_payload(chunk, chunk.numel * dtype.itemsize)
        return self._payloads[key]

    def _find_payload(self, chunk: Chunk, size_bytes: int) -> int:
        archive = _Slice(self._open(chunk.file), chunk.start, chunk.length)
        try:
            with zipfile.ZipFile(archive) as directory:
                entries = {each.filename.partition("/")[2]: each for each in directory.infolist()}
            record, order = entries["data/0"], entries["byteorder"]
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
            if archive.error is not None:  # which zipfile takes for a file that is no archive
                raise archive.error from None
            raise DamagedFile(f"{chunk.file}: there is no tensor at byte {chunk.start} ({error})") from error
        if (
            record.compress_type != zipfile.ZIP_STORED
            or record.file_size != size_bytes
            or archive.bytes_at(_content_of(archive, order), order.file_size) != b"little"
        ):
            raise DamagedFile(f"{chunk.file}: the tensor at byte {chunk.start} is not {size_bytes} plain bytes")
        return chunk.start + _content_of(archive, record)


def _content_of(archive: _Slice, entry: zipfile.ZipInfo) -> int:
    """Byte of an archive where the content of an entry begins. (zipfile would refuse entries without a checksum.)"""
    header = archive.bytes_at(entry.header_offset, _LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES:
        raise DamagedFile(f"{entry.filename}: the file ends in its header")
    name_bytes, extra_bytes = struct.unpack_from("<26xHH", header)
    return entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


def _is_like(out: torch.Tensor, chunk: Chunk, dtype: torch.dtype) -> bool:
    """Whether whole rows of the chunk can be read straight into `out`."""
    whole_rows = out.dim() > 0 and out.shape[1:] == chunk.sizes[1:] and out.numel() > 0
    return whole_rows and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()


def _overlaps(
    tensor: StoredTensor, offsets: tuple[int, ...], out: torch.Tensor
) -> Iterator[tuple[Chunk, tuple[int, ...], torch.Tensor]]:
    """Chunks with a part in the rectangle at `offsets` of the shape of `out`; where that part begins in the chunk, and
    its place in `out`."""
    for chunk in tensor.chunks:
        low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        ends = zip(offsets, out.shape, chunk.offsets, chunk.sizes, strict=True)
        high = [min(at + size, start + length) for at, size, start, length in ends]
        if all(a < b for a, b in zip(low, high, strict=True)):
            place = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, offsets, strict=True))
            yield chunk, tuple(a - start for a, start in zip(low, chunk.offsets, strict=True)), out[place]


class _Slice(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0
        self.error: OSError | None = None
        """The last that a read met."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"a place before the file: {base + offset}")
        self._at = base + offset
        return self._at

    def bytes_at(self, position: int, size: int) -> bytes:
        self.seek(position)
        return self.read(size)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        try:
            count = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        except OSError as error:
            self.error = error
            raise
        self._at += count
        return count
