"""The audit: a proof from a run's ledger and the data that no token was trained on twice in an epoch, or left out.

It works out from the data what the sequences of the ledger hold, and proves

1. that all steps stand there once, and their sequences follow each other without a gap or a repeat;
2. that what was fed is what the order says: the digests are those of the data;
3. that no token of a document was a target twice in an epoch, and none was left out of an epoch that has ended. A
   token of a prompt counts where it would be a target: it was read there, and not learned.

Sequences that the run passed over on purpose (passed_over.py) may be missing between two steps, as a whole window; they
count as consumed: no other step may have been fed them in that epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigtrain.data.lanes import Census, Piece
from bigtrain.data.ledger import Begin, Entry, digest
from bigtrain.data.order import Order
from bigtrain.data.passed_over import Window, behind

_MANY_ROWS = 1 << 20


@dataclass
class Audit:
    """What an audit found."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    """Predicted: without first tokens of documents, prompts and padding."""
    passed_over: int = 0
    """Sequences between the steps that were left out on purpose."""
    problems: list[str] = field(default_factory=list[str])
    """The first of each kind; empty where all is proven."""
    epochs: dict[str, list[tuple[int, int]]] = field(default_factory=dict[str, list[tuple[int, int]]])
    """Of each source, by its folder: (documents consumed whole, in part) in each epoch."""


def audit(
    order: Order,
    entries: Sequence[Entry],
    *,
    begin: Begin | None = None,
    saved_step: int = 0,
    passed_over: Sequence[Window] = (),
    advance: Any = None,
) -> Audit:
    """Prove what the module says, or name the first step, sequence or document that contradicts it.

    `order` is that of the run, all its mixtures included. `begin`: where the run begins, if not with step 1.
    `saved_step`: steps of the newest checkpoint, which the ledger must know. `passed_over`: of the run. `advance` is
    called with 1 behind each entry."""
    begin = begin or Begin()
    found = Audit(steps=len({entry.step for entry in entries}))
    found.problems += _steps(entries, begin, saved_step, passed_over)
    coverage, seen = _Coverage(), dict[str, int]()
    for number in range(begin.num_sequences):
        coverage.add(order.pieces(number))
    for gap in _gaps(entries, begin, passed_over):
        found.passed_over += len(gap)
        for number in gap:
            coverage.add(order.pieces(number))
    for entry in entries:
        windows = [order.sequence(number) for number in entry.sequences]
        really = digest((window.tokens for window in windows), [window.prompts for window in windows])
        if really != entry.digest and not any("was fed" in each for each in found.problems):
            repeats = f": it is what step {seen[entry.digest]} was fed" if entry.digest in seen else ""
            found.problems.append(
                f"step {entry.step}, data rank {entry.data_rank}: what it was fed is not what the order says of "
                f"sequences {entry.first:,} to {entry.first + entry.size - 1:,}{repeats}"
            )
        seen.setdefault(really, entry.step)
        seen.setdefault(entry.digest, entry.step)
        found.sequences += len(windows)
        for window in windows:
            coverage.add(window.pieces)
            found.tokens += int(window.predicted.sum())
        if advance is not None:
            advance(1)
    consumed = max((entry.first + entry.size for entry in entries), default=begin.num_sequences)
    table = coverage.table()
    for source, dataset in enumerate(order.datasets):
        rows = table[table[:, 0] == source]
        problem, epochs = _epochs(rows, order.census(source, consumed, np.unique(rows[:, 2])))
        found.problems += [f"data {dataset.name}: {problem}"] if problem else []
        found.epochs[dataset.name] = epochs
    return found


class _Coverage:
    """Which tokens were targets. What follows each other is joined: it grows with the documents, not with the run."""

    def __init__(self) -> None:
        self._joined = np.zeros((0, 5), np.int64)
        self._new: list[tuple[int, int, int, int, int]] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        self._new += [(p.source, p.epoch, p.document, p.start + 1, p.start + p.count) for p in pieces if p.count > 1]
        if len(self._new) >= _MANY_ROWS:
            self.table()

    def table(self) -> np.ndarray:
        """int64[runs, 5], sorted: source, epoch, document, first target, end of targets."""
        rows = np.concatenate([self._joined, np.array(self._new, np.int64).reshape(-1, 5)])
        rows = rows[np.lexsort(rows.T[3::-1])]
        goes_on = (rows[1:, :3] == rows[:-1, :3]).all(1) & (rows[1:, 3] == rows[:-1, 4])
        firsts, lasts = np.append(True, ~goes_on)[: len(rows)], np.append(~goes_on, True)[-len(rows) :]
        self._joined = np.concatenate([rows[firsts, :4], rows[lasts, 4:]], axis=1) if len(rows) else rows
        self._new = []
        return self._joined


def _gaps(entries: Sequence[Entry], begin: Begin, windows: Sequence[Window]) -> Iterator[range]:
    """What was passed over in front of each step."""
    expected = begin.num_sequences
    for entry in sorted(entries, key=lambda entry: entry.step):
        if entry.first > expected and entry.first == behind(windows, expected):
            yield range(expected, entry.first)
        expected = entry.first + entry.size


def _steps(entries: Sequence[Entry], begin: Begin, saved_step: int, windows: Sequence[Window]) -> Iterator[str]:
    """The first thing that is wrong with the steps and their sequences."""
    shares: dict[int, list[Entry]] = {}
    for entry in entries:
        shares.setdefault(entry.step, []).append(entry)
    expected_step, expected_first = begin.step + 1, begin.num_sequences
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
        expected_first = behind(windows, expected_first)
        if parts[0].first != expected_first:
            what = "repeats" if parts[0].first < expected_first else "skips"
            yield f"step {step} {what} sequences: it begins at {parts[0].first:,}, {expected_first:,} comes next"
            return
        expected_step, expected_first = step + 1, parts[0].first + parts[0].size
    if expected_step <= saved_step:
        yield f"the ledger ends before step {expected_step}, but step {saved_step} was trained: a checkpoint has it"
    elif not shares:
        yield "the ledger is empty"


def _epochs(table: np.ndarray, census: Census) -> tuple[str | None, list[tuple[int, int]]]:
    """(the first problem, documents whole and in part in each epoch) of one source. `table`: of `_Coverage`."""
    if not len(table):
        return None, []
    documents, sizes = census.documents, census.num_tokens
    counts: list[tuple[int, int]] = []
    for epoch in range(int(table[:, 1].max()) + 1):
        rows = table[table[:, 1] == epoch]
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
