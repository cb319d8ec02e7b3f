"""The ledger: which sequences each data rank was fed in each step, and the audit that proves what follows from it.

RUN/ledger/rank-00003.jsonl has a line a step: the sequences, and a digest of their tokens as they were fed. The audit
reads nothing else of the run. It works out from the data what those sequences hold, and proves

1. that steps 1, 2, ... stand there once, and their sequences follow each other without a gap or a repeat;
2. that what was fed is what the order says: the digests are those of the data;
3. that no token of a document was a target twice in an epoch, and none was left out of an epoch that has ended.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bigtrain.config.errors import UserError
from bigtrain.data.lanes import Census
from bigtrain.data.order import Order

FOLDER = "ledger"
_DIGESTED = np.dtype("<i8")


@dataclass(frozen=True)
class Entry:
    """One data rank's share of a step."""

    step: int
    """From 1 on."""
    first: int
    """The global sequence that the step begins with."""
    size: int
    """Global sequences of the step."""
    data_rank: int
    data_size: int
    digest: str
    """Of the tokens of this rank's sequences: `digest`."""

    @property
    def sequences(self) -> range:
        """This rank's global sequences, in the order in which they were fed."""
        return range(self.first + self.data_rank, self.first + self.size, self.data_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Entry:
        """Raises KeyError, TypeError or ValueError for what is no entry."""
        numbers = {name: int(values[name]) for name in ("step", "first", "size", "data_rank", "data_size")}
        if numbers["data_size"] < 1 or not 0 <= numbers["data_rank"] < numbers["data_size"] or numbers["size"] < 1:
            raise ValueError("sizes that cannot be")
        return Entry(**numbers, digest=str(values["digest"]))


def path_of(run_dir: Path, data_rank: int) -> Path:
    """The file of one data rank."""
    return run_dir / FOLDER / f"rank-{data_rank:05d}.jsonl"


def skipped_path_of(run_dir: Path, data_rank: int) -> Path:
    """Where a data rank writes down the bad documents that it passed over: step, data, shard, sample, reason."""
    return run_dir / FOLDER / f"skipped-{data_rank:05d}.jsonl"


def skipped(run_dir: Path) -> Counter[str]:
    """Bad documents that the run passed over, by reason. A document is counted once for each start of the run that met
    it."""
    lines = [
        line for path in sorted((run_dir / FOLDER).glob("skipped-*.jsonl")) for line in path.read_bytes().split(b"\n")
    ]
    return Counter(str(json.loads(line)["reason"]) for line in lines if line.endswith(b"}"))


def digest(tokens: Iterable[np.ndarray]) -> str:
    """Of these tokens, one array behind the other, padding included: 64 bits, hexadecimal (xxh3)."""
    state = xxhash.xxh3_64()
    for part in tokens:
        state.update(part.data if part.dtype == _DIGESTED else part.astype(_DIGESTED).data)
    return state.hexdigest()


def read(run_dir: Path) -> list[Entry]:
    """All entries of a run, by step and data rank. A last line that a crash cut is left out.

    Raises UserError where there is no ledger, or a line is none of it."""
    files = sorted((run_dir / FOLDER).glob("rank-*.jsonl"))
    if not files:
        raise UserError(f"{run_dir}: it has no ledger ({FOLDER}/rank-NNNNN.jsonl). Was data.ledger=false?")
    entries: list[Entry] = []
    for path in files:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entries.append(Entry.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: it is no entry of a ledger: {error}") from error
    return sorted(entries, key=lambda entry: (entry.step, entry.data_rank))


@dataclass
class Audit:
    """What an audit found."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    """Targets, without first tokens of documents and padding."""
    problems: list[str] = field(default_factory=list[str])
    """The first of each kind; empty where all is proven."""
    epochs: dict[str, list[tuple[int, int]]] = field(default_factory=dict[str, list[tuple[int, int]]])
    """Of each source, by its folder: (documents consumed whole, in part) in each epoch."""


def audit(order: Order, entries: Sequence[Entry], *, advance: Any = None) -> Audit:
    """Prove what the module says, or name the first step, sequence or document that contradicts it.

    `order` is that of the run, all its mixtures included. `advance` is called with 1 behind each entry."""
    found = Audit(steps=len({entry.step for entry in entries}))
    found.problems += _steps(entries)
    pieces: list[tuple[int, int, int, int, int]] = []
    seen: dict[str, int] = {}
    for entry in entries:
        windows = [order.sequence(number) for number in entry.sequences]
        if (really := digest(window.tokens for window in windows)) != entry.digest and not any(
            "was fed" in each for each in found.problems
        ):
            repeats = f": it is what step {seen[entry.digest]} was fed" if entry.digest in seen else ""
            found.problems.append(
                f"step {entry.step}, data rank {entry.data_rank}: what it was fed is not what the order says of "
                f"sequences {entry.first:,} to {entry.first + entry.size - 1:,}{repeats}"
            )
        seen.setdefault(really, entry.step)
        seen.setdefault(entry.digest, entry.step)
        found.sequences += len(windows)
        for window in windows:
            pieces += [(p.source, p.epoch, p.document, p.start + 1, p.start + p.count) for p in window.pieces]
        if advance is not None:
            advance(1)
    table = np.array(pieces, np.int64).reshape(-1, 5)
    found.tokens = int((table[:, 4] - table[:, 3]).sum())
    consumed = max((entry.first + entry.size for entry in entries), default=0)
    for source, dataset in enumerate(order.datasets):
        problem, epochs = _epochs(table[table[:, 0] == source], order.census(source, consumed))
        found.problems += [f"data {dataset.name}: {problem}"] if problem else []
        found.epochs[dataset.name] = epochs
    return found


def _steps(entries: Sequence[Entry]) -> Iterator[str]:
    """The first thing that is wrong with the steps and their sequences."""
    shares: dict[int, list[Entry]] = {}
    for entry in entries:
        shares.setdefault(entry.step, []).append(entry)
    expected_step, expected_first = 1, 0
    for step, parts in sorted(shares.items()):
        if step != expected_step:
            yield f"step {expected_step} is missing; the next one is step {step}"
            return
        ranks = Counter(part.data_rank for part in parts)
        if twice := [rank for rank, count in ranks.items() if count > 1]:
            yield f"step {step} stands twice, of data rank {twice[0]}"
            return
        if len({(part.first, part.size, part.data_size) for part in parts}) > 1:
            yield f"step {step}: the data ranks do not agree on its sequences"
            return
        if missing := set(range(parts[0].data_size)) - set(ranks):
            yield f"step {step}: data rank {min(missing)} of {parts[0].data_size} is missing"
            return
        if parts[0].first != expected_first:
            what = "repeats" if parts[0].first < expected_first else "skips"
            yield f"step {step} {what} sequences: it begins at {parts[0].first:,}, {expected_first:,} comes next"
            return
        expected_step, expected_first = step + 1, parts[0].first + parts[0].size


def _epochs(table: np.ndarray, census: Census) -> tuple[str | None, list[tuple[int, int]]]:
    """(the first problem, documents whole and in part in each epoch) of one source. Rows of `table`: source, epoch,
    document, first target, end of targets."""
    if not len(table):
        return None, []
    documents, sizes = census.documents, census.num_tokens
    counts: list[tuple[int, int]] = []
    for epoch in range(int(table[:, 1].max()) + 1):
        rows = table[table[:, 1] == epoch]
        rows = rows[(rows[:, 4] > rows[:, 3])]
        rows = rows[np.lexsort((rows[:, 3], rows[:, 2]))]
        same = rows[1:, 2] == rows[:-1, 2]
        overlaps = np.flatnonzero(same & (rows[1:, 3] < rows[:-1, 4]))
        if len(overlaps):
            _, _, document, token, _ = rows[overlaps[0] + 1].tolist()
            return f"document {document}, token {token}, is repeated in epoch {epoch}", counts
        covered = np.zeros(len(documents), np.int64)
        np.add.at(covered, np.searchsorted(documents, rows[:, 2]), rows[:, 4] - rows[:, 3])
        lacking = np.flatnonzero((census.epochs_ended > epoch) & (covered < sizes - 1))
        if len(lacking):
            return f"document {documents[lacking[0]]} is not whole in epoch {epoch}, which has ended", counts
        whole = int((covered == sizes - 1).sum())
        counts.append((whole, int((covered > 0).sum()) - whole))
    return None, counts
