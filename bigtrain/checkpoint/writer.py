"""DCP's writer, with what a checkpoint needs on top: a file a rank past the page cache, hashes, and the commit.

torch's own keeps every tensor of a file in memory until the file is done, and writes through the page cache. Here two
chunks are in the works at most: one is written while another thread hashes it or the one before. What the ranks wrote
reaches rank 0 with the results that DCP gathers anyway; it commits before DCP tells the others that all is well, so an
error of any rank or of the commit is every rank's error.
"""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bigtrain.checkpoint import content_hash
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.direct_file import DirectFile
from bigtrain.checkpoint.manifest import File, Tensor

Places = Mapping[tuple[str, tuple[int, ...]], int]
"""Chunks, by tensor and offsets, in the order in which they are written, and the number of the file of each."""
Check = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Saved:
    """What was written: on rank 0, of all ranks."""

    folder: Path
    num_bytes: int
    """Of the files."""


class _Results(list[WriteResult]):
    """What DCP gathers of a rank, and what it does not know of."""

    def __init__(self, results: list[WriteResult], files: dict[str, File], sums: dict[str, int]) -> None:
        super().__init__(results)
        self.files, self.sums = files, sums

    def __reduce__(self) -> tuple[Any, ...]:
        return _Results, (list(self), self.files, self.sums)


class Writer(FileSystemWriter):
    """Writes ``root/step-NNNNNNNN`` and commits it."""

    def __init__(
        self,
        root: Path,
        step: int,
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        places: Places | None = None,
        check: Check | None = None,
    ) -> None:
        """`state`, `files`: see `folders.commit`. `places`: which file each chunk goes into, and in which order; None:
        all into this rank's. `check` is shown, on rank 0, what was written before it counts; what it raises stops the
        commit."""
        super().__init__(folders.partial_of(root, step))
        self._root, self._step, self._state, self._files = root, step, state, files
        self._places, self._check = places, check
        self.saved: Saved | None = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is made once all plans are here, by rank 0

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        folders.prepare(self._root, self._step, sum(map(_bytes_of, (item for plan in plans for item in plan.items))))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        sums: dict[str, int] = {}
        hashing: list[tuple[str, Pending[int]]] = []
        files: dict[str, File] = {}
        for name, items in self._by_file(plan).items():
            file = DirectFile(folders.partial_of(self._root, self._step) / name)
            try:
                with _no_zip_checksums(), ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
                    for item in items:
                        results.append(self._write_item(item, planner, file, name, hasher, hashing))
                        _add_up(sums, hashing, but_last=1)  # one more chunk at most stays in memory
                    _add_up(sums, hashing)
                files[name] = file.close()
            finally:
                file.abandon()
        done: Future[list[WriteResult]] = Future()
        done.set_result(_Results(results, files, sums))
        return done

    def _by_file(self, plan: SavePlan) -> dict[str, list[WriteItem]]:
        if self._places is None:
            return {f"{plan.storage_data.prefix}0.distcp": list(plan.items)} if plan.items else {}
        by_place = {(item.index.fqn, tuple(item.index.offset or ())): item for item in plan.items}
        found: dict[str, list[WriteItem]] = {}
        for place, number in self._places.items():
            found.setdefault(f"__{number}_0.distcp", []).append(by_place[place])
        return found

    def _write_item(
        self,
        item: WriteItem,
        planner: SavePlanner,
        file: DirectFile,
        file_name: str,
        hasher: ThreadPoolExecutor,
        hashing: list[tuple[str, Pending[int]]],
    ) -> WriteResult:
        name, start = item.index.fqn, file.tell()
        if item.type is WriteItemType.BYTE_IO:
            raise TypeError(f"{name}: a checkpoint's files hold tensors only")
        chunk = _alone(cast("torch.Tensor", planner.resolve_data(item)))
        offsets = tuple(item.index.offset or (0,) * chunk.dim())
        hashing.append((name, hasher.submit(content_hash.of_rectangle, chunk, offsets)))
        torch.save(chunk, cast("IO[bytes]", file))
        length = file.tell() - start
        return WriteResult(item.index, length, _StorageInfo(file_name, start, length))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [cast("_Results", each) for each in results]
        super().finish(metadata, results)
        hashes = content_hash.total(each.sums for each in written)
        tensors = {
            name: Tensor(tuple(meta.size), str(meta.properties.dtype).removeprefix("torch."), hashes[name])
            for name, meta in cast("dict[str, Any]", metadata.state_dict_metadata).items()
            if isinstance(meta, TensorStorageMetadata)
        }
        if self._check is not None:
            self._check(tensors)
        files = {name: file for each in written for name, file in each.files.items()}
        folder = folders.commit(self._root, self._step, self._state, self._files, tensors=tensors, written=files)
        self.saved = Saved(folder, sum(file.size_bytes for file in files.values()))


def _add_up(sums: dict[str, int], hashing: list[tuple[str, Pending[int]]], but_last: int = 0) -> None:
    """Wait for what is being hashed, but for the last ones."""
    while len(hashing) > but_last:
        name, added = hashing.pop(0)
        sums[name] = sums.get(name, 0) + added.result()


@contextmanager
def _no_zip_checksums() -> Generator[None]:
    """torch.save without the CRC of each record: three times the work of our hashes, which cover the same bytes."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(chunk: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in host memory with a storage of its own, which torch.save writes whole. Not copied where it
    lies so already."""
    flat = chunk.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return torch.empty(chunk.shape, dtype=chunk.dtype)
    memory = cast("Any", flat.view(torch.uint8).numpy())
    return torch.frombuffer(memory, dtype=chunk.dtype).view(chunk.shape)


def _bytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
