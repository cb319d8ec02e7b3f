"""Read torch.distributed.checkpoint files without trusting them.

The format keeps its index (``.metadata``) as a pickle. `SafeReader` unpickles it with a list of the few classes that
such an index is made of, so a hostile file can name nothing else. Of the tensors nothing is unpickled (`stored`).
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from bigtrain.checkpoint import content_hash, manifest
from bigtrain.checkpoint.manifest import INDEX, MANIFEST, DamagedCheckpoint
from bigtrain.checkpoint.stored import Stored, StoredTensor, tensors_of
from bigtrain.config.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _ALLOWED.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"a checkpoint's index must not name {module_name}.{global_name}")


class SafeReader(FileSystemReader):
    """DCP's reader for a folder: the index unpickled safely, elements read by `Stored`, and hashed as they are read."""

    def __init__(self, folder: Path, *, hashed: Collection[tuple[str, tuple[int, ...]]] = ()) -> None:
        """`hashed`: of which tensors' chunks of this rank, by name and offsets, `sums` tells what they add to the hash
        of the whole."""
        super().__init__(folder)
        self._hashed = frozenset(hashed)
        self._tensors: dict[str, StoredTensor] = {}
        self.sums: dict[str, int] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(str(self.path)))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = tensors_of(metadata)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with Stored(Path(str(self.path))) as stored, ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
            hashing: list[Pending[None] | None] = []
            for item in sorted(plan.items, key=lambda each: self._place(each.storage_index)):
                if item.type is LoadItemType.BYTE_IO:
                    raise ValueError(f"{item.storage_index.fqn} is no tensor")
                target = planner.resolve_tensor(item).detach()
                hashing.append(self._read(stored, item, target, hasher))
                planner.commit_tensor(item, target)
            for each in hashing:
                if each is not None:
                    each.result()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(
        self, stored: Stored, item: ReadItem, target: torch.Tensor, hasher: ThreadPoolExecutor
    ) -> Pending[None] | None:
        """Read one piece and hash it: where `target` holds what was read as it was read, while the next is read."""
        tensor, offsets = self._tensors[item.storage_index.fqn], tuple(item.storage_offsets)
        chunk = tensor.chunks[item.storage_index.index or 0]

        def add(block: torch.Tensor, begin: tuple[int, ...]) -> None:
            place = tuple(a + b for a, b in zip(chunk.offsets, begin, strict=True))
            added = content_hash.of_rectangle(block.contiguous(), place)
            self.sums[tensor.name] = self.sums.get(tensor.name, 0) + added

        is_hashed = (tensor.name, tuple(item.dest_index.offset or ())) in self._hashed
        is_same = target.device.type == "cpu" and target.dtype == tensor.dtype
        stored.read_chunk(chunk, tensor.dtype, offsets, target, add if is_hashed and not is_same else None)
        return hasher.submit(add, target, offsets) if is_hashed and is_same else None

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        chunk = self._tensors[index.fqn].chunks[index.index or 0]
        return chunk.file, chunk.start


def read_index(folder: Path) -> Metadata:
    """DCP's index of `folder`. Raises pickle.UnpicklingError for anything but an index, or one that is not the one that
    was saved, OSError where there is none."""
    content = (folder / INDEX).read_bytes()
    if (folder / MANIFEST).is_file():  # a bit that flipped in a pickle may ask for all memory that there is
        saved = manifest.parse((folder / MANIFEST).read_bytes()).files.get(INDEX)
        if saved is None or saved.xxh3 != manifest.hash_of(content):
            raise pickle.UnpicklingError("its bytes have changed since it was saved")
    found = _IndexUnpickler(io.BytesIO(content)).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"{folder / INDEX} holds a {type(found).__name__}, not an index")
    return found


def tensors_in(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name (``kind.weight name``). Raises UserError where its index cannot be read."""
    try:
        return tensors_of(read_index(folder))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: its index {INDEX} cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"checkpoint {folder}: its index {INDEX} cannot be read ({error.strerror})") from error
    except Exception as error:  # a pickle that someone changed can raise anything, MemoryError too
        raise DamagedCheckpoint(f"checkpoint {folder}: its index {INDEX} cannot be read ({error})") from error
