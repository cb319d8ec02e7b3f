"""Read torch.distributed.checkpoint files without trusting them.

The format keeps its index (``.metadata``) as a pickle. `SafeReader` unpickles it with a list of the few classes that
such an index is made of, so a hostile file can name nothing else. Tensors are read with ``weights_only=True`` by torch.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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
    """DCP's reader for a folder, with the index unpickled safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(str(self.path)))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(folder: Path) -> Metadata:
    """DCP's index of `folder`. Raises pickle.UnpicklingError for anything but an index, OSError where there is none."""
    found = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"{folder}/.metadata holds a {type(found).__name__}, not an index")
    return found


def tensors_in(folder: Path) -> dict[str, torch.Size]:
    """Names (``kind.weight name``) and global shapes of the tensors of a checkpoint."""
    index = cast("dict[str, Any]", read_index(folder).state_dict_metadata)
    return {name: meta.size for name, meta in index.items() if isinstance(meta, TensorStorageMetadata)}
