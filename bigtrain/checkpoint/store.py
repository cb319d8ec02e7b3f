"""Save and load a run: global tensors through torch.distributed.checkpoint, the rest as JSON beside them.

Every rank writes the pieces that it owns and reads the pieces that it needs; nothing is gathered. Names and shapes are
those of the whole model, so a checkpoint does not say which layout wrote it. What is written is hashed on the way, and
so is what is read (`content_hash`): a load that returns has read what was saved.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from bigtrain.checkpoint import content_hash, manifest
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.manifest import DamagedCheckpoint
from bigtrain.checkpoint.reader import SafeReader, tensors_in
from bigtrain.checkpoint.slices import Fragment, GlobalTensor, state_dict_of
from bigtrain.checkpoint.stored import DamagedFile
from bigtrain.checkpoint.writer import Check, Places, Saved, Writer
from bigtrain.config.errors import UserError


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were. The message says which rank and why."""


def save(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: Mapping[str, Any],
    *,
    keep: folders.Keep | None = None,
    files: Mapping[str, bytes] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Saved | None:
    """Write ``root/step-NNNNNNNN``, durable on return, and commit it; then delete what `keep` does not name (None:
    nothing). Collective over `group` (None: all ranks). Returns what was written on rank 0, None elsewhere.

    `state`: JSON-able; `files`: by name, kept beside it. Raises SaveError on every rank that lives; rank 0 removes
    what was written, the next save what it could not."""
    return save_tensors(
        root, step, state_dict_of(fragments, only_owned=True), state, keep=keep, files=files, group=group
    )


def save_tensors(
    root: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    keep: folders.Keep | None = None,
    files: Mapping[str, bytes] | None = None,
    group: dist.ProcessGroup | None = None,
    places: Places | None = None,
    check: Check | None = None,
) -> Saved | None:
    """As `save`, of tensors by ``kind.name``: plain ones, or those that tell their chunks as `GlobalTensor` does. On
    this process alone where torch.distributed is not in use. `places`, `check`: see `Writer`."""
    writer = Writer(root, step, state, files or {}, places=places, check=check)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        if writer.saved is None:
            if not dist.is_initialized() or dist.get_rank() == 0:  # who commits; the others must not delete under it
                folders.drop_partial(root, step)
            failed = SaveError(f"the checkpoint of step {step} was not saved: {_cause(error)}")
            raise _reason_of_ours(error) or failed from error
    if writer.saved is not None and keep is not None:
        folders.prune(root, keep)
    return writer.saved


def load(
    folder: Path, fragments: Iterable[Fragment], fits: Callable[[dict[str, Any]], None] = lambda state: None
) -> dict[str, Any]:
    """Fill `fragments` in place from a committed checkpoint of any layout; returns its `state`, which `fits` was shown
    before (it raises UserError for one that is not wanted). Collective.

    Raises UserError for a checkpoint of another model, naming the first tensor that does not fit, and its subclass
    DamagedCheckpoint for one that is not what was saved: what is read, or the sizes of the files that are."""
    return _load(folder, fragments, lambda state: _check_whole(folder, state) or fits(state), check_sizes=True)


def load_weights(folder: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
    """As `load`, but only the weights: a run starts from them, with moments of its own. Collective.

    Any checkpoint of this model's shapes will do, also one that has nothing else."""
    return _load(folder, [replace(each, tensors={"weight": each.tensors["weight"]}) for each in fragments])


def check_shapes(folder: Path, wanted: Mapping[str, torch.Size]) -> None:
    """Raise UserError unless the checkpoint holds every tensor that is wanted, in its shape."""
    there = tensors_in(folder)
    for name, shape in wanted.items():
        if name not in there:
            raise UserError(f"checkpoint {folder}: it has no tensor {name}; it is of another model")
        if there[name].shape != tuple(shape):
            raise UserError(
                f"checkpoint {folder}: {name} has shape {there[name].shape}, this model wants {tuple(shape)}"
            )


def _load(
    folder: Path,
    fragments: Iterable[Fragment],
    fits: Callable[[dict[str, Any]], None] = lambda state: None,
    *,
    check_sizes: bool = False,
) -> dict[str, Any]:
    held = list(fragments)
    wanted = state_dict_of(held, only_owned=False)
    owned = cast("dict[str, GlobalTensor]", state_dict_of(held, only_owned=True))
    shapes = {name: each.shape for name, each in wanted.items()}
    state, expected = _agreed(lambda: _look(folder, shapes, fits, check_sizes=check_sizes))
    reader = SafeReader(folder, hashed=[(name, offsets) for name, tensor in owned.items() for offsets in tensor.chunks])
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _of_load(folder, error) from error
    for name, value in content_hash.total(_from_all(reader.sums)).items():
        if expected[name].hash != value:
            raise DamagedCheckpoint(
                f"checkpoint {folder}: {name} is not what was saved: its hash is {value}, {manifest.MANIFEST} says "
                f"{expected[name].hash}"
            )
    return state


def _of_load(folder: Path, error: CheckpointException) -> BaseException:
    """What to raise where a rank could not read: damage only where it is proven, for a damaged checkpoint is put aside.
    A disk that does not answer, too little memory or a rank that died say nothing of the checkpoint."""
    causes = [cause for cause, _ in error.failures.values()]
    words = f"checkpoint {folder}: it cannot be read: {_cause(error)}"
    for cause in causes:
        if isinstance(cause, DamagedFile | pickle.UnpicklingError):
            return DamagedCheckpoint(f"checkpoint {folder}: it cannot be read: {cause}")
    return UserError(words) if all(isinstance(cause, OSError) for cause in causes) else error


def _look(
    folder: Path, wanted: Mapping[str, torch.Size], fits: Callable[[dict[str, Any]], None], *, check_sizes: bool
) -> tuple[dict[str, Any], dict[str, manifest.Tensor]]:
    """What is known of a checkpoint before its tensors are read. Raises UserError for one that is not wanted.

    `check_sizes`: the files that will be read, by any rank, must be there, and as long as they were."""
    state, known = folders.state_of(folder), manifest.read(folder)
    expected = known.tensors
    fits(state)
    check_shapes(folder, wanted)
    for name in wanted:
        if name not in expected:
            raise DamagedCheckpoint(f"checkpoint {folder}: {manifest.MANIFEST} does not know {name}")
    if known.files.get(folders.STATE) != manifest.file_of(folder / folders.STATE):
        raise DamagedCheckpoint(f"checkpoint {folder}: {folders.STATE} has changed since it was saved")
    is_first = not dist.is_initialized() or dist.get_rank() == 0  # there is a file a rank: not all ask for all
    misfits = manifest.misfits(folder, known) if check_sizes and is_first else {}
    if needed := [f"{name}: {problem}" for name, problem in misfits.items() if manifest.is_needed(name)]:
        told, *others = needed
        more = f", and {len(others)} more" if others else ""
        raise DamagedCheckpoint(f"checkpoint {folder}: {told}{more}")
    return state, expected


def _check_whole(folder: Path, state: dict[str, Any]) -> None:
    if state.get("weights_only"):
        raise UserError(
            f"checkpoint {folder}: it has weights only, no optimizer state and no place in the data, so no run goes on "
            "from it. Start a run from its weights: checkpoint.init_from."
        )


def _agreed(look: Callable[[], Any]) -> Any:
    """What `look` returns here, once it has succeeded on all ranks. Raises the first rank's UserError on all alike: who
    went on alone would wait for the others for ever. Collective."""
    result, error = None, None
    try:
        result = look()
    except UserError as raised:
        error = raised
    except OSError as raised:
        error = UserError(f"{raised.filename or 'a checkpoint'}: it cannot be read: {raised.strerror or raised}")
    for each in _from_all(None if error is None else (isinstance(error, DamagedCheckpoint), str(error))):
        if each is not None:
            is_damaged, message = each
            raise (DamagedCheckpoint if is_damaged else UserError)(message) from error
    return result


def _from_all(mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def _reason_of_ours(error: BaseException) -> BaseException | None:
    """What stopped a save, where it was not the disk: a tensor that is made when it is written may be damaged, or
    Ctrl-C. DCP hides both in its own exception."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    return next((cause for cause in causes if isinstance(cause, UserError | KeyboardInterrupt)), None)


def _cause(error: BaseException) -> str:
    """The first rank's own words, and the disk's where there are any: torch's zip writer says "unexpected pos" after a
    failed write."""
    rank = ""
    if isinstance(error, CheckpointException):
        number, (error, _) = next(iter(error.failures.items()))
        rank = f"rank {number}: " if dist.is_initialized() and dist.get_world_size() > 1 else ""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return f"{rank}{link.strerror}"
        link = link.__cause__ or link.__context__
    return f"{rank}{error}" if isinstance(error, OSError) else f"{rank}{type(error).__name__}: {error}"
