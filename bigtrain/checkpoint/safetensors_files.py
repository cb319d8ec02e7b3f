"""safetensors files, a tensor at a time: eight bytes with the header's length, a JSON header, the numbers.

The library of that name writes a file from tensors that are all in memory, and does not say which tensor of a damaged
file is wrong. Here a file is planned from shapes alone and written as the tensors come, and a header is checked entry
by entry before a byte of its tensors is read. https://github.com/huggingface/safetensors#format
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from bigtrain.config.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a header."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_JSON_BYTES = 100_000_000
"""A larger header or index is refused, as the library refuses a header."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    name: str
    file: Path
    dtype: torch.dtype | None
    """None for one that cannot be weights: a buffer of whole numbers, 8-bit floats."""
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file, none read yet. Raises UserError for a damaged file, naming the tensor where it is one."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
                raise UserError(f"{file}: it is no safetensors file, or cut off (a header of {length} bytes in {size})")
            header: object = json.loads(opened.read(length), object_pairs_hook=_no_pair_twice)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header cannot be read: {error!s:.200}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: its header is no JSON object")
    entries = cast("dict[str, Any]", header)
    begin = 8 + length
    return {
        name: _entry(name, value, file, begin, size - begin)
        for name, value in entries.items()
        if name != "__metadata__"
    }


def read(entry: Entry, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """The tensor, or its rows [start, stop) alone. Raises UserError where the file is shorter than it was, or the dtype
    holds no weights."""
    if entry.dtype is None:
        raise unfit_dtype(entry)
    start, stop = rows or (0, entry.shape[0] if entry.shape else 1)
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    bytes_a_row = prod(entry.shape[1:]) * entry.dtype.itemsize
    buffer = bytearray((stop - start) * bytes_a_row)
    try:
        with entry.file.open("rb") as opened:
            opened.seek(entry.start + start * bytes_a_row)
            got = opened.readinto(buffer)
    except OSError as error:
        raise UserError(f"{entry.file}: tensor {entry.name} cannot be read: {error.strerror}") from error
    if got != len(buffer):
        raise UserError(f"{entry.file}: it ends in tensor {entry.name}")
    if not buffer:
        return torch.empty(shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype).view(shape)


def unfit_dtype(entry: Entry) -> UserError:
    return UserError(
        f"{entry.file}: tensor {entry.name} has dtype {entry.dtype_name!r:.40}; weights are {', '.join(DTYPES)}"
    )


def header_of(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> bytes:
    """What a file begins with that holds these (name, shape) one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Transformers wants to be told
    end = 0
    for name, shape in tensors:
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def append(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Write the numbers of a tensor behind those before it."""
    numbers = tensor.contiguous().view(torch.uint8).flatten().numpy()
    file.write(memoryview(cast("Any", numbers)))


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes; a larger tensor is alone."""
    groups: list[list[str]] = []
    filled = most
    for name, size in sizes.items():
        if filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def locate(folder: Path) -> dict[str, Entry]:
    """Every tensor of a Hugging Face folder by name. Raises UserError for one without safetensors, for an index that
    names files elsewhere or tensors that are not where it says."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return read_header(whole)
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise UserError(
                f"{folder}: it has {pickles[0]}, a pickle, which may run code when it is read, and no safetensors. "
                "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)."
            )
        raise UserError(f"{folder}: there is no {whole.name} and no {index.name} in it")
    weight_map = _weight_map(index)
    headers: dict[str, dict[str, Entry]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: tensor {tensor:.200}: {name!r:.200} is no name of a safetensors file in that folder"
            )
        if name not in headers:
            if not (folder / name).is_file():
                raise UserError(f"{index}: tensor {tensor:.200}: there is no file {name} in {folder}")
            headers[name] = read_header(folder / name)
        if tensor not in headers[name]:
            raise UserError(f"{folder / name}: tensor {tensor:.200} is missing, which {index.name} says is in it")
    found: dict[str, Entry] = {}
    for entries in headers.values():
        for tensor, entry in entries.items():
            if tensor in found:
                raise UserError(f"{folder}: tensor {tensor:.200} is in {found[tensor].file.name} and {entry.file.name}")
            found[tensor] = entry
    return found


def read_json(file: Path) -> object:
    """Raises UserError for what is not there, is larger than MAX_JSON_BYTES, or is no JSON."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes are no file of settings")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: it is no JSON: {error!s:.200}") from error


def _weight_map(index: Path) -> dict[str, Any]:
    content = read_json(index)
    found: object = cast("dict[str, Any]", content).get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index}: it has no weight_map")
    return cast("dict[str, Any]", found)


def _entry(name: str, value: Any, file: Path, begin: int, size: int) -> Entry:
    where = f"{file}: tensor {name:.200}"
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its entry {value!r:.200} has no dtype, shape and data_offsets") from error
    if (
        not isinstance(dtype, str)
        or len(numbers) > 10
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers)
    ):
        raise UserError(f"{where}: its entry {value!r:.200} is no dtype, shape and data_offsets")
    known = DTYPES.get(dtype)
    if stop > size or start > stop or (known is not None and stop - start != prod(shape) * known.itemsize):
        raise UserError(
            f"{where}: bytes {start} to {stop} of {size} are not those of shape {tuple(shape)} in {dtype:.20}"
        )
    return Entry(name, file, known, dtype, tuple(shape), begin + start)


def _no_pair_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r:.200} is there twice")
    return found
