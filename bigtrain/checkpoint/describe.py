"""What a checkpoint is, from its JSON and the sizes of its files alone: no tensor is read and torch is not imported, so
it answers at once, for any size, and for a damaged checkpoint as far as its files can be read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.manifest import COMMITTED, Manifest
from bigtrain.config.errors import UserError

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "bool": 1}
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class Kind:
    """The tensors of one kind: weight, or a moment."""

    num_tensors: int
    numel: int
    size_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """One checkpoint."""

    folder: Path
    is_committed: bool
    saved_at: datetime | None
    """When it was committed, by this machine's clock."""
    files: dict[str, int]
    """Bytes of each on the disk."""
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    """state.json; empty where it cannot be read."""
    manifest: Manifest | None = None
    problems: tuple[str, ...] = ()
    """What could not be read, and files that are missing or have another size than they had."""

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def ranks(self) -> list[int]:
        """That wrote a file."""
        return sorted(int(match[1]) for name in self.files if (match := _RANK_FILE.fullmatch(name)))

    @property
    def num_parameters(self) -> int:
        return self.kinds["weight"].numel if "weight" in self.kinds else 0

    @property
    def kinds(self) -> dict[str, Kind]:
        """Weights first, then what the optimizer keeps."""
        tensors = self.manifest.tensors if self.manifest else {}
        found: dict[str, Kind] = {}
        for kind in sorted({name.partition(".")[0] for name in tensors}, key=lambda kind: (kind != "weight", kind)):
            these = [each for name, each in tensors.items() if name.partition(".")[0] == kind]
            sizes = [(prod(each.shape), _BYTES.get(each.dtype, 0)) for each in these]
            dtypes = tuple(sorted({each.dtype for each in these}))
            found[kind] = Kind(
                len(these), sum(numel for numel, _ in sizes), sum(numel * size for numel, size in sizes), dtypes
            )
        return found

    @property
    def num_sequences(self) -> int | None:
        """Training sequences consumed; None where it notes no place in the data."""
        count = _dict(self.state.get("cursor")).get("num_sequences")
        return count if isinstance(count, int) else None

    def setting(self, group: str, name: str) -> Any:
        """Of the run that wrote it; None where it notes none."""
        return _dict(_dict(self.state.get("config")).get(group)).get(name)


def find(path: Path) -> Path:
    """As `folders.resolve`, and by its own path also one that was never committed. Raises UserError where there is
    none."""
    path = folders.followed(path)
    return path if folders.is_checkpoint(path) else folders.resolve(path)


def describe(folder: Path) -> Description:
    """What the checkpoint in `folder` is. What cannot be read, or has another size than it had, is told in
    `problems`."""
    problems: list[str] = []
    marker = folder / COMMITTED
    state: dict[str, Any] = {}
    known: Manifest | None = None
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if marker.is_file():
        try:
            known = manifest.read(folder)
        except UserError as error:
            problems.append(str(error))
    misfits = manifest.misfits(folder, known) if known else {}
    problems += [f"checkpoint {folder}: {name}: {problem}" for name, problem in misfits.items()]
    try:
        state = folders.state_of(folder)
    except UserError as error:
        if not misfits.get(folders.STATE):  # a line a file is enough
            problems.append(str(error))
    saved_at = datetime.fromtimestamp(marker.stat().st_mtime) if marker.is_file() else None
    return Description(folder, marker.is_file(), saved_at, files, state, known, tuple(problems))


class Listed(NamedTuple):
    """A folder among the checkpoints of a run."""

    folder: Path
    step: int | None
    num_bytes: int
    loss: float | None
    """Held-out; None where it was not evaluated at its step."""
    note: str
    """latest, damaged, not committed, being written; empty for any other committed one."""


def listed(path: Path) -> list[Listed]:
    """The checkpoints of a run's folder, or of its checkpoints/; empty where `path` is neither."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        return []
    link = root / folders.LATEST
    latest = link.readlink().name if link.is_symlink() else ""
    found: list[Listed] = []
    for folder in root.iterdir():
        match = re.fullmatch(r"(\.|damaged-)?step-(\d{8,})(\.partial)?", folder.name)
        if not match or not folder.is_dir():
            continue
        note = "latest" if folder.name == latest else ""
        if match[1] == "damaged-":
            note = "damaged"
        elif match[3]:
            note = "being written, or left by a kill"
        elif not (folder / COMMITTED).is_file():
            note = "not committed"
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        found.append(Listed(folder, int(match[2]), size, folders.loss_of(folder), note))
    return sorted(found, key=lambda each: (each.step or 0, each.folder.name))


def listing(found: list[Listed]) -> list[str]:
    """A line a checkpoint; none for none."""
    if not found:
        return []
    rows = [
        (each.folder.name, size(each.num_bytes), "" if each.loss is None else f"{each.loss:.4f}", each.note)
        for each in found
    ]
    return [*table([("in the folder", "size", "loss", ""), *rows]), ""]


def tensor_lines(described: Description) -> list[str]:
    """A line a tensor. Imports torch, for the index."""
    from bigtrain.checkpoint.reader import tensors_in

    there = tensors_in(described.folder)
    known = described.manifest.tensors if described.manifest else {}
    rows = [("tensor", "shape", "dtype", "hash", "chunks")]
    for name, tensor in there.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        value = known[name].hash if name in known else "not in the manifest"
        rows.append((name, " x ".join(map(str, tensor.shape)) or "scalar", dtype, value, str(len(tensor.chunks))))
    return ["", *table(rows)]


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def lines(described: Description) -> list[str]:
    """A line a fact, with its unit: what a person reads."""
    state, kinds = described.state, described.kinds
    rows: list[tuple[str, str]] = [("checkpoint", str(described.folder))]
    if state:
        rows.append(("step", f"{state.get('step')}{_what(state)}"))
    saved = f"{described.saved_at:%Y-%m-%d %H:%M:%S}" if described.saved_at else f"no: there is no {COMMITTED}"
    rows.append(("committed", saved))
    if isinstance(state.get("loss"), float):
        rows.append(("held-out loss", f"{state['loss']:.4f} nats a token"))
    if described.num_sequences is not None:
        rows.append(("data", _consumed(described)))
    if described.setting("model", "hidden_size"):
        rows.append(("model", _model(described)))
    if kinds:
        rows.append(("parameters", f"{described.num_parameters:,}"))
    for name, kind in kinds.items():
        what = f"{kind.num_tensors} tensors, {size(kind.size_bytes)}, {', '.join(kind.dtypes)}"
        rows.append(("weights" if name == "weight" else name, what))
    rows.append(("on disk", f"{size(described.num_bytes)} in {len(described.files)} files{_ranks(described.ranks)}"))
    if versions := _dict(state.get("versions")):
        rows.append(("written by", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [f"{name:<14} {value}" for name, value in rows]


def as_json(described: Description) -> dict[str, Any]:
    """The same for a program."""
    state = described.state
    tensors = described.manifest.tensors if described.manifest else {}
    return {
        "folder": str(described.folder),
        "step": state.get("step"),
        "committed": described.is_committed,
        "saved_at": described.saved_at.isoformat() if described.saved_at else None,
        "loss": state.get("loss"),
        "weights_only": bool(state.get("weights_only")),
        "imported": state.get("imported"),
        "num_sequences": described.num_sequences,
        "num_parameters": described.num_parameters,
        "model": _dict(state.get("config")).get("model"),
        "kinds": {name: vars(kind) for name, kind in described.kinds.items()},
        "files": described.files,
        "ranks": described.ranks,
        "num_bytes": described.num_bytes,
        "versions": state.get("versions"),
        "problems": described.problems,
        "tensors": {name: vars(tensor) for name, tensor in tensors.items()},
    }


def size(count: float) -> str:
    """Bytes as a person reads them (units of 1000)."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def _what(state: Mapping[str, Any]) -> str:
    origin = _dict(state.get("imported")).get("from")
    origin = f", imported from {origin}" if origin else ""
    return f"{origin}{', weights only' if state.get('weights_only') else ''}"


def _consumed(described: Description) -> str:
    count, length = described.num_sequences or 0, described.setting("train", "sequence_length")
    tokens = f" of {length:,} tokens, {count * length:,} in all" if isinstance(length, int) else ""
    return f"{count:,} sequences consumed{tokens}"


def _model(described: Description) -> str:
    def get(name: str) -> Any:
        return described.setting("model", name)

    trained = described.setting("precision", "dtype")
    parts = [
        f"{get('num_layers')} layers, width {get('hidden_size')}",
        f"{get('num_attention_heads')} heads ({get('num_query_groups')} key/value)",
        f"feed-forward {get('ffn_hidden_size')}, vocabulary {get('vocab_size')}",
        f"{get('position')}, {get('norm')}, {get('activation')}",
        *(["tied embeddings"] if get("tie_embeddings") else []),
        *([f"trained in {trained}"] if trained else []),
    ]
    return f"{get('name')}: {', '.join(parts)}"


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f", tensors written by rank {ranks[0]}"
    whole = ranks == list(range(ranks[0], ranks[-1] + 1))
    return f", tensors written by {len(ranks)} ranks{f' ({ranks[0]} to {ranks[-1]})' if whole else ''}"


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
