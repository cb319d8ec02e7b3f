"""Write a checkpoint anew: cut as another layout's ranks would write it, or without optimizer state, or in another
dtype.

No run needs it to change its layout: any layout loads any checkpoint. It is for what comes after, weights alone for
others, and for loads that read one file a rank. `plan` decides (`layout`), `reshard` carries it out a chunk at a time.
The hashes of the tensors do not depend on how they are cut, so the new manifest must have the old one's: if it does
not, nothing is committed. Where the dtype changes, what is read is hashed as it is read.
"""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import content_hash, layout, manifest, store
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.describe import size
from bigtrain.checkpoint.dtypes import DTYPES, converted
from bigtrain.checkpoint.layout import Layout, Piece
from bigtrain.checkpoint.manifest import INDEX, MANIFEST, DamagedCheckpoint, Manifest
from bigtrain.checkpoint.pieces import PieceTensor
from bigtrain.checkpoint.reader import tensors_in
from bigtrain.checkpoint.saved_model import saved_model
from bigtrain.checkpoint.stored import BLOCK_BYTES, Stored, StoredTensor
from bigtrain.checkpoint.verify import uncovered
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig

_OF_A_RUN = ("cursor", "adam_step", "loss_scale")
"""Entries of state.json that mean nothing without the optimizer's state."""


_BYTES_A_CHUNK = 2600
"""Of memory, measured: DCP's plan and index name each."""


@dataclass(frozen=True)
class Plan:
    """What will be written."""

    source: Path
    tensors: dict[str, StoredTensor]
    """Those that are kept, by ``kind.name``."""
    known: Manifest
    """Of the source."""
    files: list[list[Piece]]
    """Chunks in their order; the place in the list is the rank in the file's name. Empty: no file."""
    weights_only: bool
    dtype: torch.dtype | None
    """None: each tensor as it is."""

    def bytes_of(self, piece: Piece) -> int:
        return piece.numel * (self.dtype or self.tensors[piece.name].dtype).itemsize

    @property
    def file_bytes(self) -> list[int]:
        """Of the tensors in each file."""
        return [sum(map(self.bytes_of, file)) for file in self.files]

    @property
    def num_chunks(self) -> int:
        return sum(map(len, self.files))

    @property
    def num_bytes(self) -> int:
        return sum(self.file_bytes)

    @property
    def largest_chunk_bytes(self) -> int:
        return max((self.bytes_of(piece) for file in self.files for piece in file), default=0)

    @property
    def buffer_bytes(self) -> int:
        """Most that is held at a time besides the program itself: three chunks (one is read, one written, one hashed),
        the blocks that go to the disk, and DCP's index."""
        sizes = [(p.numel * self.tensors[p.name].dtype.itemsize, self.bytes_of(p)) for f in self.files for p in f]
        chunk = max((old + (new if self.dtype else 0) for old, new in sizes), default=0)
        return 3 * chunk + 4 * BLOCK_BYTES + _BYTES_A_CHUNK * self.num_chunks


def plan(
    source: Path,
    *,
    layout_: Layout | None = None,
    num_files: int = 0,
    weights_only: bool = False,
    dtype: str | None = None,
) -> Plan:
    """Plan to write the committed checkpoint `source` anew for a layout, into `num_files` files, or else with as many
    files as it has. Nothing is written.

    Raises UserError for a dtype without `weights_only`: moments and fp32 master weights would be rounded, and the run
    would go on differently. Also for a layout that the model cannot have, and for a damaged index."""
    known, there = manifest.read(source), tensors_in(source)
    state = folders.state_of(source)
    saved = known.files.get(folders.STATE)
    if saved is None or manifest.file_of(source / folders.STATE) != saved or type(state.get("step")) is not int:
        raise DamagedCheckpoint(f"checkpoint {source}: {folders.STATE} has changed since it was saved")
    if dtype is not None and not (weights_only or state.get("weights_only")):
        raise UserError(
            f"--dtype {dtype}: a checkpoint to go on from has fp32 master weights and moments, which would be rounded. "
            "Add --weights-only."
        )
    _check(source, known, there)
    kept = {name: each for name, each in there.items() if not weights_only or name.startswith("weight.")}
    if not kept:
        raise UserError(f"checkpoint {source}: it has no weights")
    if layout_ is not None:
        files = _of_layout(kept, _model_of(source, state), layout_)
    else:
        if num_files < 0:
            raise UserError(f"--files {num_files}: it takes 1 or more")
        there_now = len({chunk.file for tensor in kept.values() for chunk in tensor.chunks})
        files = layout.in_files({name: each.shape for name, each in kept.items()}, num_files or there_now)
    target = DTYPES[dtype] if dtype else None
    chunks = [
        [
            chunk
            for piece in file
            for chunk in layout.cut(piece, max(kept[piece.name].dtype.itemsize, target.itemsize if target else 1))
        ]
        for file in files
    ]
    return Plan(source, kept, known, chunks, weights_only, target)


def lines(planned: Plan) -> list[str]:
    """The plan, for a person."""
    sizes = [count for count in planned.file_bytes if count]
    spread = " to ".join(dict.fromkeys((size(min(sizes, default=0)), size(max(sizes, default=0)))))
    empty = len(planned.files) - len(sizes)
    rows = [
        ("from", str(planned.source)),
        ("tensors", f"{len(planned.tensors)}, {size(planned.num_bytes)}, in {planned.num_chunks:,} chunks"),
        ("files", f"{len(sizes)} of {spread}" + (f"; {empty} ranks have copies, and write none" if empty else "")),
        ("largest chunk", size(planned.largest_chunk_bytes)),
        ("memory", f"{size(planned.buffer_bytes)} at a time, besides the program (about 300 MB)"),
    ]
    return [f"{name:<14} {value}" for name, value in rows]


def reshard(planned: Plan, out: Path, progress: Callable[[int], None] = lambda _: None) -> Path:
    """Write ``out/step-NNNNNNNN`` as planned, committed; returns it. `out` must be new, or empty. `progress` is told
    the bytes that were written since it was last told.

    Raises UserError for a source that is damaged and for a disk that is full; nothing is left then."""
    state = folders.state_of(planned.source)
    step = state["step"]
    if planned.weights_only:
        state = {name: value for name, value in state.items() if name not in _OF_A_RUN} | {"weights_only": True}
    check_new(out)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Stored(planned.source) as stored:
            return _write(planned, out, step, state, stored, progress)
    except BaseException as error:
        folders.drop_partial(out, step)
        if is_new and out.is_dir():
            out.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{out}: it cannot be written: {error.strerror or error}") from error
        if isinstance(error, store.SaveError):
            raise UserError(f"{out}: {error}") from error
        raise


def check_new(out: Path) -> None:
    """Raise UserError for a folder that has something in it: a run's own checkpoints may be among it."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: it is there already, and nothing is written over. Name another folder.")


def _write(
    planned: Plan, out: Path, step: int, state: Mapping[str, Any], stored: Stored, progress: Callable[[int], None]
) -> Path:
    sums: dict[str, int] = {}

    def read(piece: Piece) -> tuple[torch.Tensor, int]:
        tensor = planned.tensors[piece.name]
        values = torch.empty(piece.sizes, dtype=tensor.dtype)
        try:
            stored.read(tensor, piece.offsets, values)
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"checkpoint {planned.source}: {piece.name} cannot be read: {error}") from error
        if planned.dtype is None:
            return values, 0
        return converted(values, planned.dtype, piece.name), content_hash.of_rectangle(values, piece.offsets)

    def take(piece: Piece) -> torch.Tensor:
        values, added = ahead.take(piece)
        sums[piece.name] = sums.get(piece.name, 0) + added
        progress(planned.bytes_of(piece))
        return values

    def check(written: Mapping[str, manifest.Tensor]) -> None:
        as_read = content_hash.total([sums]) if planned.dtype else {name: each.hash for name, each in written.items()}
        for name in planned.tensors:
            if as_read[name] != planned.known.tensors[name].hash:
                raise DamagedCheckpoint(
                    f"checkpoint {planned.source}: {name} is not what was saved: its hash is {as_read[name]}, "
                    f"{MANIFEST} says {planned.known.tensors[name].hash}. Nothing was written."
                )

    pieces: dict[str, list[Piece]] = {name: [] for name in planned.tensors}
    places: dict[tuple[str, tuple[int, ...]], int] = {}
    for number, file in enumerate(planned.files):
        for piece in file:
            pieces[piece.name].append(piece)
            places[piece.name, piece.offsets] = number
    tensors = {
        name: PieceTensor.made(tensor.shape, planned.dtype or tensor.dtype, pieces[name], take)
        for name, tensor in planned.tensors.items()
    }
    with ThreadPoolExecutor(1, "reshard-read") as pool:
        ahead = _Ahead([piece for file in planned.files for piece in file], read, pool)
        saved = store.save_tensors(out, step, tensors, state, files=_other_files(planned), places=places, check=check)
    if saved is None:
        raise OSError(errno.EIO, "nothing was saved")
    return saved.folder


class _Ahead:
    """Reads the next piece while one is written."""

    def __init__(
        self, pieces: list[Piece], read: Callable[[Piece], tuple[torch.Tensor, int]], pool: ThreadPoolExecutor
    ) -> None:
        self._pieces, self._read, self._pool = iter(pieces), read, pool
        self._next = self._begin()

    def _begin(self) -> tuple[Piece, Future[tuple[torch.Tensor, int]]] | None:
        piece = next(self._pieces, None)
        return None if piece is None else (piece, self._pool.submit(self._read, piece))

    def take(self, piece: Piece) -> tuple[torch.Tensor, int]:
        """The pieces must be taken in their order."""
        if self._next is None or self._next[0] != piece:
            raise ValueError(f"{piece} is not the next")
        _, pending = self._next
        values = pending.result()
        self._next = self._begin()
        return values


def _check(source: Path, known: Manifest, there: Mapping[str, StoredTensor]) -> None:
    """The index must be of the tensors that the manifest knows."""
    for name in known.tensors.keys() | there.keys():
        if name not in known.tensors or name not in there:
            where = INDEX if name not in there else MANIFEST
            raise DamagedCheckpoint(f"checkpoint {source}: {where} does not know {name}")
        tensor = there[name]
        problem = uncovered(tensor.shape, tensor.chunks)
        if tensor.shape != known.tensors[name].shape:
            problem = f"it has shape {tensor.shape}, {MANIFEST} says {known.tensors[name].shape}"
        if problem:
            raise DamagedCheckpoint(f"checkpoint {source}: {name}: {problem}")


def _of_layout(kept: Mapping[str, StoredTensor], model: ModelConfig, wanted: Layout) -> list[list[Piece]]:
    kinds = list(
        dict.fromkeys(name.partition(".")[0] for name in sorted(kept, key=lambda n: not n.startswith("weight.")))
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in kept.items():
        bare = name.partition(".")[2]
        if shapes.setdefault(bare, tensor.shape) != tensor.shape:
            raise UserError(f"{name} has shape {tensor.shape}, its weight {shapes[bare]}; use --files N")
    return [
        [
            replace(piece, name=f"{kind}.{piece.name}")
            for piece in rank
            for kind in kinds
            if f"{kind}.{piece.name}" in kept
        ]
        for rank in layout.of_layout(shapes, model, wanted)
    ]


def _model_of(source: Path, state: Mapping[str, Any]) -> ModelConfig:
    try:
        return saved_model(source, state).model
    except UserError as error:
        raise UserError(f"{error}, so no layout says who writes what; use --files N") from error


def _other_files(planned: Plan) -> dict[str, bytes]:
    """The tokenizer and what else lies beside the tensors. Raises DamagedCheckpoint where it has changed."""
    found: dict[str, bytes] = {}
    tensor_files = {chunk.file for tensor in tensors_in(planned.source).values() for chunk in tensor.chunks}
    for name, expected in planned.known.files.items():
        if name in tensor_files or name in (folders.STATE, INDEX):
            continue
        if Path(name).name != name:
            raise DamagedCheckpoint(f"checkpoint {planned.source}: {MANIFEST} names {name!r:.200}, outside of it")
        try:
            found[name] = (planned.source / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {planned.source}: {name} cannot be read: {error.strerror}") from error
        if manifest.hash_of(found[name]) != expected.xxh3:
            raise DamagedCheckpoint(f"checkpoint {planned.source}: {name} has changed since it was saved")
    return found
