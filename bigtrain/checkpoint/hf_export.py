"""A checkpoint as a folder that Transformers opens: ``AutoModelForCausalLM.from_pretrained(FOLDER)``.

The tensors stream: each of ours is read whole out of the checkpoint, cut into theirs, converted, written, and let go,
so the memory that it takes is a few times the largest tensor, however large the model. The folder is written aside and
renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from bigtrain.checkpoint import content_hash, hf_config, manifest, safetensors_files, store
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.dtypes import DTYPES, converted
from bigtrain.checkpoint.hf_names import Part, our_shapes, parts
from bigtrain.checkpoint.manifest import DamagedCheckpoint
from bigtrain.checkpoint.reader import tensors_in
from bigtrain.checkpoint.saved_model import saved_model
from bigtrain.checkpoint.stored import Stored
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig

SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Text:
    """What an export needs to know of the tokenizer."""

    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """tokenizer.json and what belongs beside it, by name."""
    vocab_size: int = 0
    """One more than the largest id: the model has at least as many rows."""
    bos_id: int | None = None
    eos_id: int | None = None


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    architecture: str
    dtype: str
    num_tensors: int
    num_bytes: int
    """Of the tensors."""
    num_files: int
    """Of safetensors."""
    vocab_size: int
    notes: list[str]
    """What the user should know."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    text: Text,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write `out`, which must not exist, from a committed checkpoint (or a run's newest). On one process, no ranks.

    `dtype`: fp32, bf16 or fp16; default: what the run trained in. `shard_bytes`: of a safetensors file at most, unless
    one tensor is larger. `vocab_size`: rows of the embedding; default: all, or of an imported model those that it came
    with. `progress` is told bytes written and bytes in all. Raises UserError for a model that Transformers has not, a
    damaged checkpoint, numbers that fp16 cannot hold, a disk that is full; `out` is then not there."""
    source = folders.resolve(checkpoint)
    saved = saved_model(source, folders.state_of(source))
    model = saved.model
    _check_layers(source, model)
    rows = vocab_size or saved.num_tokens
    if not max(text.vocab_size, 1) <= rows <= model.vocab_size:
        raise UserError(
            f"{rows} rows of the vocabulary: the model has {model.vocab_size}, its tokenizer needs {text.vocab_size}"
        )
    kind = dtype or saved.dtype
    if kind not in DTYPES:
        raise UserError(f"dtype {kind}: it takes {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"a file of {shard_bytes} bytes: it takes 1 or more")
    planned = list(parts(model, rows))
    store.check_shapes(source, {f"weight.{name}": torch.Size(shape) for name, shape in our_shapes(model).items()})
    config = hf_config.to_theirs(model, dtype=kind, vocab_size=rows, bos_id=text.bos_id, eos_id=text.eos_id)
    generation = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id}
    settings = {"config.json": config, "generation_config.json": generation}
    sizes = {part.name: prod(part.shape) * DTYPES[kind].itemsize for part in planned}
    with _aside(out, sum(sizes.values())) as aside:
        for name, values in settings.items():
            (aside / name).write_text(json.dumps(values, indent=2) + "\n")
        for name, content in text.files.items():
            (aside / name).write_bytes(content)
        files = safetensors_files.split(sizes, shard_bytes)
        _write(aside, files, planned, Weights(source), DTYPES[kind], progress)
    return Exported(
        out,
        config["architectures"][0],
        kind,
        len(planned),
        sum(sizes.values()),
        len(files),
        rows,
        hf_config.lost_in_theirs(model),
    )


class Weights:
    """The weights of a checkpoint, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where its index or its manifest cannot be read."""
        self._folder, self._tensors = folder, tensors_in(folder)
        self._expected = manifest.read(folder).tensors

    def read(self, name: str) -> torch.Tensor:
        """The global tensor, fp32. Raises DamagedCheckpoint where it is not what was saved."""
        kept = f"weight.{name}"
        stored = self._tensors[kept]
        tensor, corner = torch.empty(stored.shape, dtype=stored.dtype), (0,) * len(stored.shape)
        try:
            with Stored(self._folder) as files:
                files.read(stored, corner, tensor)
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"checkpoint {self._folder}: {kept} cannot be read: {error!s:.500}") from error
        found = content_hash.total([{kept: content_hash.of_rectangle(tensor, corner)}])[kept]
        if kept not in self._expected or self._expected[kept].hash != found:
            raise DamagedCheckpoint(
                f"checkpoint {self._folder}: {kept} is not what was saved: its hash is {found}, which "
                f"{manifest.MANIFEST} does not say"
            )
        return tensor.float()


def theirs(part: Part, ours: torch.Tensor) -> torch.Tensor:
    """Their tensor, cut out of ours."""
    found = torch.cat([ours[start:stop] for start, stop in part.rows]) if len(part.rows) > 1 else _one(part, ours)
    return found.t() if part.transposed else found


def _one(part: Part, ours: torch.Tensor) -> torch.Tensor:
    ((start, stop),) = part.rows
    return ours[start:stop]


def _check_layers(source: Path, model: ModelConfig) -> None:
    """Before names are made for all of them: there may be billions. Raises UserError."""
    if model.num_layers > len(tensors_in(source)):
        raise UserError(f"checkpoint {source}: it has fewer tensors than its {model.num_layers} layers")


def _write(
    aside: Path,
    files: list[list[str]],
    planned: list[Part],
    weights: Weights,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The safetensors files and their index. Those of one tensor of ours follow each other: it is read once."""
    by_name = {part.name: part for part in planned}
    total, done = sum(prod(part.shape) for part in planned) * dtype.itemsize, 0
    weight_map: dict[str, str] = {}
    held, ours = "", torch.empty(0)
    for number, names in enumerate(files, start=1):
        single = len(files) == 1
        file = aside / ("model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        with file.open("wb") as opened:
            opened.write(safetensors_files.header_of([(name, by_name[name].shape) for name in names], dtype))
            for name in names:
                part = by_name[name]
                if part.ours != held:
                    ours = torch.empty(0)  # let go of the last one first
                    held, ours = part.ours, weights.read(part.ours)
                tensor = converted(theirs(part, ours), dtype, name)
                safetensors_files.append(opened, tensor)
                weight_map[name] = file.name
                done += tensor.nbytes
                if progress:
                    progress(done, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _aside(out: Path, num_bytes: int) -> Generator[Path]:
    """A folder beside `out` that becomes it when the block ends well, and goes when it does not."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: it is there already, and nothing is written over. Name another folder.")
    partial = out.with_name(f".{out.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes:
            raise UserError(f"{out}: {num_bytes / 1e9:.3g} GB of weights, and the disk has {free / 1e9:.3g} GB free")
        partial.mkdir()
        try:
            yield partial
            for file in partial.iterdir():
                folders.sync(file)
            partial.rename(out)
            folders.sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{out}: it cannot be written: {error.strerror}") from error


def _remove_abandoned(out: Path) -> None:
    """What exports to `out` left that were killed on this machine. Those of others may still be written."""
    named = re.compile(rf"\.{re.escape(out.name)}\.{re.escape(socket.gethostname())}\.(\d+)\.partial")
    for path in out.parent.iterdir():
        match = named.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True
