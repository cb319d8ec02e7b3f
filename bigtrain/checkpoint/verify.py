"""Whether a checkpoint still holds what was saved, and if not, which file and which tensor.

The marker has the hash of the manifest, the manifest has those of the files and of the tensors. All is read in blocks,
so it takes the memory of a block, not of a tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.manifest import COMMITTED, INDEX, MANIFEST, Manifest
from bigtrain.config.errors import UserError

if TYPE_CHECKING:
    from bigtrain.checkpoint.stored import Chunk, Stored, StoredTensor

Progress = Callable[[int], None]
"""Is told the bytes that were read since it was last told."""
_FEW = 3
"""Names of tensors, where there may be hundreds."""


@dataclass(frozen=True)
class Verified:
    """What was found."""

    problems: list[str]
    """Each begins with the file or the tensor."""
    num_files: int
    num_tensors: int
    """That were read: 0 where only files were."""
    num_bytes: int
    """Of the files."""


def bytes_to_read(folder: Path, *, files_only: bool = False) -> int:
    """About how many bytes `verify` reads."""
    files = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return files if files_only else 2 * files


def verify(folder: Path, *, files_only: bool = False, progress: Progress = lambda _: None) -> Verified:
    """Compare a checkpoint with its manifest: every file, and unless `files_only` every tensor's content hash.

    Tensors that were in what a file lost, or in a file that is gone, are told in the line of the file."""
    problems: list[str] = []
    known = _manifest(folder, problems)
    if known is None:
        return Verified(problems, 0, 0, 0)
    of_files, of_tensors, num_tensors = dict(_files(folder, known, progress)), [], 0
    if not files_only:
        num_tensors = len(known.tensors)
        lost, of_tensors = _tensors(folder, known, of_files, progress)
        of_files |= {name: f"{of_files[name]}, so {_unreadable(tensors)}" for name, tensors in lost.items()}
    problems += [*(f"{name}: {problem}" for name, problem in of_files.items()), *of_tensors]
    return Verified(problems, len(known.files), num_tensors, sum(file.size_bytes for file in known.files.values()))


def _manifest(folder: Path, problems: list[str]) -> Manifest | None:
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        problems.append(f"{MANIFEST}: it cannot be read: {error.strerror}")
        return None
    try:
        if (folder / COMMITTED).read_text(errors="replace").strip() != manifest.hash_of(content):
            problems.append(f"{MANIFEST}: it is not the one that was committed ({COMMITTED} has another hash)")
    except OSError:
        problems.append(f"{COMMITTED}: it is missing, so this checkpoint was never committed")
    try:
        return manifest.parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{MANIFEST}: it cannot be read: {error!s:.200}")
        return None


def _files(folder: Path, known: Manifest, progress: Progress) -> Iterator[tuple[str, str]]:
    """Files with something wrong, and what it is."""
    there = {path.name: path for path in sorted(folder.iterdir())}
    for name, expected in known.files.items():
        try:
            found_bytes = there[name].stat().st_size if name in there and there[name].is_file() else None
            if problem := manifest.size_problem(expected, found_bytes):
                yield name, problem
            elif (found := manifest.file_of(there[name], progress).xxh3) != expected.xxh3:
                yield name, f"its bytes have changed (hash {found}, {MANIFEST} says {expected.xxh3})"
        except OSError as error:
            yield name, f"it cannot be read: {error.strerror}"
    for name in there:
        if name not in known.files and name not in (MANIFEST, COMMITTED):
            yield name, f"{MANIFEST} does not know it"


def _tensors(
    folder: Path, known: Manifest, wrong_files: Iterable[str], progress: Progress
) -> tuple[dict[str, list[str]], list[str]]:
    """Tensors that are lost, by file, and what is wrong with the others, which are read."""
    from bigtrain.checkpoint.reader import tensors_in
    from bigtrain.checkpoint.stored import Stored

    try:
        there = tensors_in(folder)
    except UserError as error:
        return {}, [f"{INDEX}: no tensor was read: {str(error).removeprefix(f'checkpoint {folder}: ')}"]
    lost = _lost(folder, wrong_files, there)
    problems = [f"{name}: the index {INDEX} does not know it" for name in sorted(known.tensors.keys() - there.keys())]
    problems += [f"{name}: {MANIFEST} does not know it" for name in sorted(there.keys() - known.tensors.keys())]
    # a file at a time, as it was written
    names = known.tensors.keys() & there.keys() - {name for names in lost.values() for name in names}
    with Stored(folder) as stored:
        for name in sorted(names, key=lambda name: [(each.file, each.start) for each in there[name].chunks[:1]]):
            if problem := _tensor(stored, there[name], known.tensors[name], progress):
                problems.append(f"{name}: {problem}")
    return lost, problems


def _lost(folder: Path, wrong_files: Iterable[str], there: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """By file that is gone or cut off, the tensors with a chunk in the part that is gone, weights first."""
    sizes: dict[str, int] = {}
    for name in wrong_files:
        with suppress(OSError):
            sizes[name] = (folder / name).stat().st_size if (folder / name).is_file() else 0
    found: dict[str, list[str]] = {}
    for name in sorted(there, key=lambda name: (not name.startswith("weight."), name)):
        ends = [(chunk.file, chunk.start + chunk.length) for chunk in there[name].chunks]
        for file in dict.fromkeys(file for file, end in ends if end > sizes.get(file, end)):
            found.setdefault(file, []).append(name)
    return found


def _unreadable(tensors: list[str]) -> str:
    count, first = len(tensors), ", ".join(tensors[:_FEW])
    more = f" and {count - _FEW} more" if count > _FEW else ""
    return f"{count} tensor{'s' if count > 1 else ''} cannot be read: {first}{more}"


def _tensor(stored: Stored, tensor: StoredTensor, expected: manifest.Tensor, progress: Progress) -> str:
    """What is wrong with one tensor; empty where nothing is."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if (tensor.shape, dtype) != (expected.shape, expected.dtype):
        return f"it is {dtype} {tensor.shape}, {MANIFEST} says {expected.dtype} {expected.shape}"
    if problem := uncovered(tensor.shape, tensor.chunks):
        return problem
    try:
        found = hash_of(stored, tensor, progress)
    except (OSError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        return f"it cannot be read: {(getattr(error, 'strerror', None) or error)!s:.300}"
    return "" if found == expected.hash else f"its numbers have changed (hash {found}, {MANIFEST} says {expected.hash})"


def hash_of(stored: Stored, tensor: StoredTensor, progress: Progress = lambda _: None) -> str:
    """The content hash of a tensor as it lies on the disk. Raises OSError, ValueError."""
    from bigtrain.checkpoint import content_hash

    total = 0
    for chunk in tensor.chunks:
        for block, begin in stored.blocks(chunk, tensor.dtype):
            place = tuple(a + b for a, b in zip(chunk.offsets, begin, strict=True))
            total += content_hash.of_rectangle(block, place)
            progress(block.nbytes)
    return content_hash.total([{"": total}])[""]


def uncovered(shape: tuple[int, ...], chunks: tuple[Chunk, ...]) -> str:
    """What is wrong with chunks that should cover a tensor once; empty where nothing is."""
    for chunk in chunks:
        ends = zip(chunk.offsets, chunk.sizes, shape, strict=False)
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
            at < 0 or length < 0 or at + length > whole for at, length, whole in ends
        ):
            return f"its chunk at {chunk.offsets} of size {chunk.sizes} is outside of its shape {shape}"
    open_: list[Chunk] = []  # of those that begin above, the ones that reach down to here
    for chunk in sorted((each for each in chunks if each.numel), key=lambda each: each.offsets):
        open_ = [each for each in open_ if not shape or each.offsets[0] + each.sizes[0] > chunk.offsets[0]]
        for other in open_:
            if _overlap(chunk, other):
                return f"its chunks at {other.offsets} and {chunk.offsets} overlap"
        open_.append(chunk)
    return ""  # they add up to its elements, or `tensors_of` would have refused them


def _overlap(one: Chunk, other: Chunk) -> bool:
    sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)
