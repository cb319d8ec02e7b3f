"""manifest.json: what a checkpoint consists of, with a hash of every file and of every global tensor.

The hash of a file (xxh3) finds bytes that changed on a disk or on the way; the hash of a tensor (`content_hash`) stays
the same in every layout, so it also shows that two checkpoints hold the same weights. The marker COMMITTED has the hash
of the manifest itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import xxhash

from bigtrain.config.errors import UserError

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
INDEX = ".metadata"
"""torch.distributed.checkpoint's own file: which rectangle of which tensor lies where."""
_NEEDED = re.compile(r"\.metadata|state\.json|.*\.distcp")
_READ_BYTES = 8 << 20


class DamagedCheckpoint(UserError):
    """A checkpoint that was committed and does not hold any more what was written: an older one may."""


@dataclass(frozen=True)
class File:
    """What a file must be."""

    size_bytes: int
    xxh3: str
    """Hash of its bytes: 64 bits, hexadecimal."""


@dataclass(frozen=True)
class Tensor:
    """What a global tensor must be."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: float32."""
    hash: str
    """`content_hash` of its elements: 64 bits, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint: tensors by ``kind.name``, files by name (all but the manifest and the marker)."""

    tensors: dict[str, Tensor]
    files: dict[str, File]

    def to_json(self) -> bytes:
        return (json.dumps({"tensors": _plain(self.tensors), "files": _plain(self.files)}, indent=1) + "\n").encode()


def _plain(entries: Mapping[str, File | Tensor]) -> dict[str, Any]:
    return {name: asdict(entry) for name, entry in sorted(entries.items())}


def read(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint. Raises DamagedCheckpoint where it is not the one that was committed, and
    UserError where the disk does not tell."""
    try:
        content = (folder / MANIFEST).read_bytes()
        committed = (folder / COMMITTED).read_text().strip()
        if committed != hash_of(content):
            raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} is not the one that was committed: it is damaged")
        return parse(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error.strerror})") from error


def parse(content: bytes) -> Manifest:
    """Raises ValueError, KeyError, TypeError or AttributeError for what no manifest is."""
    fields = json.loads(content)
    tensors = {
        name: Tensor(tuple(map(int, one["shape"])), str(one["dtype"]), str(one["hash"]))
        for name, one in fields["tensors"].items()
    }
    files = {name: File(int(one["size_bytes"]), str(one["xxh3"])) for name, one in fields["files"].items()}
    return Manifest(tensors, files)


def hash_of(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def size_problem(expected: File, found_bytes: int | None) -> str:
    """What is wrong with a file by its size alone; None: there is no such file. Empty where nothing is."""
    wanted = f"{MANIFEST} says {expected.size_bytes:,} bytes"
    if found_bytes is None:
        return f"the file is missing, {wanted}"
    return "" if found_bytes == expected.size_bytes else f"it has {found_bytes:,} bytes, {wanted}"


def misfits(folder: Path, known: Manifest) -> dict[str, str]:
    """Files that are missing or have another size than they had, and what to say of each. Opens none. Raises OSError
    where the disk does not tell."""
    found: dict[str, str] = {}
    for name, expected in known.files.items():
        try:
            status = (folder / name).stat()
            found_bytes = status.st_size if S_ISREG(status.st_mode) else None
        except FileNotFoundError:
            found_bytes = None
        if problem := size_problem(expected, found_bytes):
            found[name] = problem
    return found


def is_needed(name: str) -> bool:
    """Whether a run that goes on reads this file of a checkpoint. It does not read the tokenizer's: it has its own."""
    return bool(_NEEDED.fullmatch(name))


class Problems(NamedTuple):
    """What is wrong with a committed checkpoint, in words."""

    damage: list[str]
    """Of what a run needs to go on from it."""
    beside: list[str]
    """Of files that no run needs to go on."""
    unknown: str
    """Why it cannot be told; empty where it can."""


def problems(folder: Path) -> Problems:
    """What its manifest and the sizes of its files tell against a committed checkpoint. Raises nothing."""
    try:
        found = misfits(folder, read(folder))
    except UserError as error:
        words = str(error).removeprefix(f"checkpoint {folder}: ")
        return Problems([words], [], "") if isinstance(error, DamagedCheckpoint) else Problems([], [], words)
    except OSError as error:
        return Problems([], [], error.strerror or str(error))
    told = {name: f"{name}: {problem}" for name, problem in found.items()}
    damage = [words for name, words in told.items() if is_needed(name)]
    return Problems(damage, [words for name, words in told.items() if not is_needed(name)], "")


def file_of(path: Path, progress: Callable[[int], None] | None = None) -> File:
    """What a file is now. `progress`: is told the bytes that were read since it was last told. Raises OSError."""
    state, size = xxhash.xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
            size += len(block)
            if progress:
                progress(len(block))
    return File(size, state.hexdigest())
