"""Where two checkpoints differ: tensors by their content hashes, which is instant, and on request by how much.

The hash does not depend on the layout, so two checkpoints of one step compare equal whatever ranks wrote them. It is
what their manifests say: `verify` tells whether the files still hold it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.manifest import DamagedCheckpoint

if TYPE_CHECKING:
    from bigtrain.checkpoint.stored import Stored, StoredTensor


@dataclass(frozen=True)
class Values:
    """By how much two tensors of one shape differ, both as fp64."""

    num_different: int
    """Elements whose bits differ; of two dtypes, those that differ once the wider is rounded to the narrower."""
    numel: int
    largest: float
    """Absolute difference; inf where one of the two alone is no number."""
    index: tuple[int, ...]
    """Where that is."""
    relative: float
    """Norm of the difference over the norm of A's tensor."""


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both."""

    name: str
    a: str
    """What A has; empty where it has none."""
    b: str
    values: Values | None = None


@dataclass(frozen=True)
class Comparison:
    """Of two checkpoints."""

    num_equal: int
    """Tensors."""
    tensors: list[Difference]
    state: list[tuple[str, Any, Any]]
    """Entries of state.json that differ: name with dots, in A, in B; None where it is not there."""
    kinds_alone: dict[str, tuple[str, int]]
    """Kinds of which only one has tensors, as of weights without moments: which, A or B, and how many tensors."""

    @property
    def is_equal(self) -> bool:
        return not self.tensors and not self.state


def compare(a: Path, b: Path, *, values: bool = False, progress: Callable[[int], None] = lambda _: None) -> Comparison:
    """Compare two committed checkpoints by their manifests and their state.json. `values`: of tensors that differ in a
    shape that is the same, also by how much; these are read, in blocks. `progress` is told the bytes of A that were
    read. Raises UserError for a checkpoint that cannot be read."""
    ours, theirs = manifest.read(a).tensors, manifest.read(b).tensors
    found: list[Difference] = []
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (not name.startswith("weight."), name)):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one != other:
            has_same_type = (
                one is not None and other is not None and (one.shape, one.dtype) == (other.shape, other.dtype)
            )
            found.append(Difference(name, _shown(one, has_same_type), _shown(other, has_same_type)))
    num_equal = len(ours.keys() & theirs.keys()) - sum(1 for each in found if each.a and each.b)
    if values:
        found = list(_with_values(found, a, b, progress))
    state = list(_entries(folders.state_of(a), folders.state_of(b)))
    kinds = _kinds(ours), _kinds(theirs)
    alone = {kind: ("A", count) for kind, count in kinds[0].items() if kind not in kinds[1]}
    alone |= {kind: ("B", count) for kind, count in kinds[1].items() if kind not in kinds[0]}
    return Comparison(num_equal, found, state, alone)


def _kinds(tensors: Iterable[str]) -> Counter[str]:
    return Counter(name.partition(".")[0] for name in tensors)


def lines(found: Comparison, a: str, b: str) -> list[str]:
    """A line a difference; one line for none."""
    if found.is_equal:
        return [f"the same: {found.num_equal} tensors, by their hashes, and {folders.STATE}"]
    rows: list[str] = [f"A: {a}", f"B: {b}"]
    for each in found.tensors:
        if not (each.a and each.b):
            if each.name.partition(".")[0] not in found.kinds_alone:
                rows.append(f"only in {'A' if each.a else 'B'}: {each.name}: {each.a or each.b}")
        elif each.values is None:
            rows.append(f"differs: {each.name}: {each.a} in A, {each.b} in B")
        else:
            rows.append(f"differs: {each.name}: {_told(each.values)}{_types(each)}")
    for kind, (where, count) in found.kinds_alone.items():
        rows.append(f"only in {where}: all {count} tensors of {kind}")
    for name, one, other in found.state:
        rows.append(f"{folders.STATE}: {name}: {_short(one)} in A, {_short(other)} in B")
    count = sum(1 for each in found.tensors if each.a and each.b)
    alone = len(found.tensors) - count
    rows.append(
        f"{found.num_equal} tensors are the same, {count} differ, {alone} are in one alone; "
        f"{len(found.state)} entries of {folders.STATE} differ"
    )
    return rows


def as_json(found: Comparison) -> dict[str, Any]:
    """The same for a program."""
    return {
        "equal": found.is_equal,
        "num_equal": found.num_equal,
        "tensors": [{**vars(each), "values": vars(each.values) if each.values else None} for each in found.tensors],
        "state": [{"name": name, "a": one, "b": other} for name, one, other in found.state],
    }


def _told(values: Values) -> str:
    share = _percent(values.num_different, values.numel)
    return (
        f"{values.num_different:,} of {values.numel:,} elements ({share}), largest {values.largest:.3g} at "
        f"{list(values.index)}, relative {values.relative:.3g}"
    )


def _percent(part: int, whole: int) -> str:
    """A share that is not rounded to none or to all where it is neither."""
    share = 100 * part / max(whole, 1)
    if part and share < 0.01:
        return "<0.01 %"
    if part < whole and share > 99.99:
        return ">99.99 %"
    return f"{share:.2f}".rstrip("0").rstrip(".") + " %"


def _types(each: Difference) -> str:
    return f" ({each.a} in A, {each.b} in B; counted as the narrower)" if "[" in each.a else ""


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def bytes_that_differ(a: Path, b: Path) -> int:
    """Of A's tensors: about what `compare` reads of it for `values`."""
    from bigtrain.checkpoint.reader import tensors_in

    ours, theirs, there = manifest.read(a).tensors, manifest.read(b).tensors, tensors_in(a)
    names = [name for name in ours.keys() & theirs.keys() & there.keys() if ours[name] != theirs[name]]
    return sum(there[name].size_bytes for name in names if ours[name].shape == theirs[name].shape)


def _shown(tensor: manifest.Tensor | None, has_same_type: bool) -> str:
    if tensor is None:
        return ""
    return tensor.hash if has_same_type else f"{tensor.dtype} {list(tensor.shape)}"


def _with_values(found: list[Difference], a: Path, b: Path, progress: Callable[[int], None]) -> Iterator[Difference]:
    from bigtrain.checkpoint.reader import tensors_in
    from bigtrain.checkpoint.stored import Stored

    in_a, in_b = tensors_in(a), tensors_in(b)
    with Stored(a) as one, Stored(b) as other:
        for each in found:
            ours, theirs = in_a.get(each.name), in_b.get(each.name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                yield each
                continue
            try:
                measured = _values(one, ours, other, theirs, progress)
            except (OSError, ValueError, RuntimeError) as error:
                raise DamagedCheckpoint(f"{each.name} cannot be read in {a} or {b}: {error!s:.300}") from error
            yield Difference(each.name, each.a, each.b, measured)


def _values(
    stored_a: Stored, a: StoredTensor, stored_b: Stored, b: StoredTensor, progress: Callable[[int], None]
) -> Values:
    import torch

    num_different, largest, index = 0, -1.0, (0,) * len(a.shape)
    squares_of_difference = squares_of_a = 0.0
    room = torch.empty(0, dtype=b.dtype)
    for chunk in a.chunks:
        for ours, begin in stored_a.blocks(chunk, a.dtype):
            if room.numel() < ours.numel():
                room = torch.empty(ours.numel(), dtype=b.dtype)
            theirs = room[: ours.numel()].view(ours.shape)
            offsets = tuple(x + y for x, y in zip(chunk.offsets, begin, strict=True))
            stored_b.read(b, offsets, theirs)
            for place, x, y in _small(ours, theirs):
                difference, is_different = _difference(x, y)
                num_different += int(is_different.count_nonzero())
                squares_of_difference += float(difference.square().sum())
                squares_of_a += float(x.double().square().sum())
                top = int(difference.argmax())
                if float(difference[top]) > largest:
                    largest, index = float(difference[top]), _index(place + top, tuple(ours.shape), offsets)
            progress(ours.nbytes)
    relative = math.sqrt(squares_of_difference / squares_of_a) if squares_of_a else math.inf
    return Values(num_different, math.prod(a.shape), largest, index, relative if largest else 0.0)


_SMALL_ELEMENTS = 1 << 18
"""Converted to fp64 at a time."""


def _small(ours: Any, theirs: Any) -> Iterator[tuple[int, Any, Any]]:
    x, y = ours.reshape(-1), theirs.reshape(-1)
    for first in range(0, len(x), _SMALL_ELEMENTS):
        yield first, x[first : first + _SMALL_ELEMENTS], y[first : first + _SMALL_ELEMENTS]


def _difference(x: Any, y: Any) -> tuple[Any, Any]:
    """Absolute, fp64, without NaN; and which elements differ."""
    import torch

    difference = (x.double() - y.double()).abs()
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, difference).nan_to_num(nan=math.inf, posinf=math.inf)
    if x.dtype != y.dtype:
        narrow = min((x.dtype, y.dtype), key=lambda dtype: dtype.itemsize)
        x, y = x.to(narrow), y.to(narrow)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return difference, x.view(bits) != y.view(bits)


def _index(flat: int, shape: tuple[int, ...], offsets: tuple[int, ...]) -> tuple[int, ...]:
    """Where element `flat` of a block lies in the whole tensor."""
    found: list[int] = []
    for length, offset in zip(reversed(shape), reversed(offsets), strict=True):
        flat, at = divmod(flat, length)
        found.append(offset + at)
    return tuple(reversed(found))


def _entries(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        one, other = cast("dict[str, Any]", a), cast("dict[str, Any]", b)
        for key in sorted(one.keys() | other.keys()):
            yield from _entries(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b
