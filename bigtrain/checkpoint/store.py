"""Save and load a run: global tensors through torch.distributed.checkpoint, the rest as JSON beside them.

Every rank writes the pieces that it owns and reads the pieces that it needs; nothing is gathered. Names and shapes are
those of the whole model, so a checkpoint does not say which layout wrote it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.reader import SafeReader, tensors_in
from bigtrain.checkpoint.slices import Fragment, state_dict_of
from bigtrain.config.errors import UserError


def save(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    *,
    keep: int,
    files: dict[str, bytes] | None = None,
) -> None:
    """Write ``root/step-NNNNNNNN`` and commit it; then delete all but the `keep` newest. Collective.

    `state`: JSON-able; `files`: by name, kept beside it. Both the same on every rank."""
    main = dist.get_rank() == 0
    partial = folders.partial_of(root, step)
    if main:
        folders.prune(root, keep)
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    writer = dcp.FileSystemWriter(partial, sync_files=True, single_file_per_rank=True)
    dcp.save(state_dict_of(fragments, only_owned=True), storage_writer=writer)
    if main:
        folders.commit(root, step, state, files)
        folders.prune(root, keep)
    dist.barrier()


def load(folder: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Fill `fragments` in place from a committed checkpoint of any layout; returns its `state`. Collective.

    Raises UserError for a checkpoint of another model, naming the first tensor that does not fit."""
    wanted = state_dict_of(fragments, only_owned=False)
    state = folders.state_of(folder)
    if state.get("weights_only"):
        raise UserError(
            f"checkpoint {folder}: it has weights only, no optimizer state and no place in the data, so no run goes on "
            "from it. Start a run from its weights: checkpoint.init_from."
        )
    check_shapes(folder, {name: tensor.shape for name, tensor in wanted.items()})
    _read(folder, wanted)
    return state


def load_weights(folder: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
    """As `load`, but only the weights: a run starts from them, with moments of its own. Collective.

    Any checkpoint of this model's shapes will do, also one that has nothing else."""
    weights = [replace(each, tensors={"weight": each.tensors["weight"]}) for each in fragments]
    wanted = state_dict_of(weights, only_owned=False)
    state = folders.state_of(folder)
    check_shapes(folder, {name: tensor.shape for name, tensor in wanted.items()})
    _read(folder, wanted)
    return state


def load_full(folder: Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    """Every global tensor of one kind, whole, on this process alone. No process group is needed."""
    names = tensors_in(folder)
    tensors = {name: torch.empty(size) for name, size in names.items() if name.startswith(f"{kind}.")}
    _read(folder, cast("dict[str, Any]", tensors), no_dist=True)
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items()}


def check_shapes(folder: Path, wanted: dict[str, torch.Size]) -> None:
    """Raise UserError unless the checkpoint holds every tensor that is wanted, in its shape."""
    try:
        there = tensors_in(folder)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, KeyError) as error:
        raise UserError(f"checkpoint {folder}: its index .metadata cannot be read ({error})") from error
    for name, shape in wanted.items():
        if name not in there:
            raise UserError(f"checkpoint {folder}: it has no tensor {name}; it is of another model")
        if there[name] != shape:
            raise UserError(
                f"checkpoint {folder}: {name} has shape {tuple(there[name])}, this model wants {tuple(shape)}"
            )


def _read(folder: Path, tensors: dict[str, Any], *, no_dist: bool = False) -> None:
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=no_dist)
    except CheckpointException as error:
        raise UserError(f"checkpoint {folder}: it cannot be read: {_first_cause(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:  # torch says it so where there is one process
        raise UserError(f"checkpoint {folder}: it cannot be read: {error}") from error


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"
