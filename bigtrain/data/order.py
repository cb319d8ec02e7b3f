"""Which tokens are in global sequence i: a function of (data, mixture, seed, number of lanes, sequence length).

Nothing here knows ranks, workers or steps, so nothing of them can change the order.

The mixture (mixture.py) says which source a global sequence comes from, and which of that source's own sequences it is.
The source says which pieces of which documents are in it: documents end to end in lanes (lanes.py), or packed into bins
(packing.py). All of it is arithmetic on the documents' sizes, so any sequence is found at once, and the state is one
number, the sequences consumed, beside the mixture that it counts in. Raw text has no sizes before it is tokenised:
there each lane keeps the place where it goes on (text_lanes.py), and the answer is the same, however it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig, SourceConfig
from bigtrain.data import rows, shards, text_lanes
from bigtrain.data.faults import Faults, Skipped
from bigtrain.data.folders import Places
from bigtrain.data.lanes import Census, Lanes, Piece
from bigtrain.data.mixture import Mixture, Stage, joined
from bigtrain.data.packing import PackedSequences
from bigtrain.data.rows import Rows, Window
from bigtrain.data.shards import Dataset
from bigtrain.data.text_lanes import Position, TextLanes
from bigtrain.data.text_tars import TextTars, is_text
from bigtrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cursor:
    """How far the training data are consumed. It says nothing about ranks, so any layout can go on from it."""

    num_sequences: int
    """Global sequences consumed."""
    order: str
    """Which order it counts in: `Order.fingerprint`."""
    mixture: Mixture
    """Where those sequences came from, and what was planned for those behind them."""
    positions: Mapping[str, Mapping[int, Position]] = field(default_factory=dict[str, Mapping[int, Position]])
    """Of sources of raw text: where each lane goes on. Those of the lanes that this process read are current."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_sequences": self.num_sequences,
            "order": self.order,
            "num_lanes": self.mixture.num_lanes,
            "mixture": self.mixture.to_json(),
            "positions": {name: text_lanes.to_json(lanes) for name, lanes in self.positions.items()},
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cursor:
        """Raises ValueError, KeyError or TypeError for what `to_dict` did not write."""
        mixture = Mixture.from_json(values["mixture"], int(values["num_lanes"]))
        positions = {str(name): text_lanes.from_json(lanes) for name, lanes in values["positions"].items()}
        return Cursor(int(values["num_sequences"]), str(values["order"]), mixture, positions)


class Sequences(Protocol):
    """The endless sequences of one source, in their order."""

    def pieces(self, lane: int, row: int) -> list[Piece]: ...

    def epochs(self, rows: Sequence[int]) -> float: ...

    def census(self, rows: Sequence[int], named: np.ndarray) -> Census: ...


@dataclass(frozen=True)
class Source:
    """A data set and its weight, which may change with the tokens trained on."""

    dataset: Dataset | TextTars
    weight: float = 1.0
    then: Sequence[tuple[int, float]] = ()
    """(tokens, weight): the weight from so many tokens of the run on."""

    def __post_init__(self) -> None:
        """Raises UserError for what is no weight."""
        for tokens, weight in ((0, self.weight), *self.then):
            if not 0 <= weight < float("inf"):
                raise UserError(f"data.train: the weight of {self.dataset.name} is {weight}: 0 or a number above it")
            if tokens < 0:
                raise UserError(f"data.train: from_tokens of {self.dataset.name} is {tokens}: a number of tokens")

    def weight_at(self, tokens: int) -> Fraction:
        """From so many tokens on."""
        begun = [(since, weight) for since, weight in ((0, self.weight), *self.then) if since <= tokens]
        return Fraction(str(max(begun, key=lambda each: each[0])[1]))


class Order:
    """The endless order of the training sequences."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        num_lanes: int,
        sequence_length: int,
        pack: str = "concat",
        max_bad_fraction: float = 0.0,
    ) -> None:
        """Raises UserError for no sources, the same data twice, too few documents, or a time without any weight."""
        if not sources:
            raise UserError("data.train is empty: give it shard folders, [{path: FOLDER, weight: 1}]")
        self.sources = list(sources)
        self.datasets = [source.dataset for source in sources]
        self.num_lanes, self.sequence_length, self.pack = num_lanes, sequence_length, pack
        self._names = [dataset.fingerprint[:16] for dataset in self.datasets]
        for place, name in enumerate(self._names):
            if name in self._names[:place]:
                paths = f"{self.datasets[self._names.index(name)].name} and {self.datasets[place].name}"
                raise UserError(f"data.train: {paths} hold the same data. Name it once, with the sum of the weights.")
        self.faults = Faults(max_bad_fraction)
        self._kept: dict[str, Mapping[int, Position]] = {}
        """Positions in sources that are no longer named."""
        self._seed = seed
        self._sequences = [self._arranged(place, dataset) for place, dataset in enumerate(self.datasets)]
        self._by_name = dict(zip(self._names, self._sequences, strict=True))
        self.mixture = self._planned()
        self.fingerprint = f"seed={seed} num_lanes={num_lanes} sequence_length={sequence_length} pack={pack}"
        """What the order depends on beside the mixture, readable."""

    @property
    def is_streamed(self) -> bool:
        """Whether a source is raw text: then sequences are best asked for in their order."""
        return any(isinstance(dataset, TextTars) for dataset in self.datasets)

    def use_threads(self, number: int) -> None:
        """Tokenise raw text that will be needed soon on so many threads."""
        for dataset in self.datasets:
            if isinstance(dataset, TextTars):
                dataset.use_threads(number)

    def close(self) -> None:
        """End the threads that `use_threads` began."""
        for dataset in self.datasets:
            if isinstance(dataset, TextTars):
                dataset.close()

    def allow(self, skipped: Iterable[Skipped]) -> None:
        """Count the bad documents that all data ranks passed over. Raises UserError where they are too many."""
        self.faults.allow(skipped, lambda source: self.datasets[source].size_bytes)

    def start(self) -> Cursor:
        """Nothing consumed yet."""
        return self.cursor(0)

    def cursor(self, num_sequences: int) -> Cursor:
        """So many global sequences consumed."""
        positions = {
            name: sequences.positions
            for name, sequences in zip(self._names, self._sequences, strict=True)
            if isinstance(sequences, TextLanes)
        }
        return Cursor(num_sequences, self.fingerprint, self.mixture, {**self._kept, **positions})

    def go_on_from(self, cursor: Cursor, *, accept_change: bool = False) -> bool:
        """Take over what was consumed. Returns whether the mixture is another one from here on.

        Raises UserError where the cursor counts in another order than this one, or (unless `accept_change`) in another
        mixture."""
        if cursor.order != self.fingerprint:
            raise UserError(
                "the order of the data is not that of the checkpoint, so its place means nothing here. Its order was:\n"
                f"  {cursor.order}\nthis run's is:\n  {self.fingerprint}\n"
                "Set what differs back, or start another run."
            )
        merged = cursor.mixture.with_plan(self.mixture, cursor.num_sequences)
        changed = merged != cursor.mixture
        if changed and not accept_change:
            raise UserError(
                f"data.train is not the mixture of the checkpoint. Its mixture was:\n{self._told(cursor.mixture)}\n"
                f"this run's is:\n{self._told(self.mixture)}\nSet it back, or go on with the new one from sequence "
                f"{cursor.num_sequences:,} on, without repeating what was consumed: data.on_change=accept. Data of "
                "which files were added, removed or built again count as other data, and begin anew."
            )
        self.mixture = merged
        self._kept = {name: lanes for name, lanes in cursor.positions.items() if name not in self._names}
        for name, sequences in zip(self._names, self._sequences, strict=True):
            if isinstance(sequences, TextLanes):
                sequences.restore(cursor.positions.get(name, {}))
        return changed

    def epochs(self, num_sequences: int) -> dict[str, float]:
        """How often each source was gone through in so many global sequences, by its folder."""
        consumed = self.mixture.consumed(num_sequences)
        return {
            dataset.name: sequences.epochs(consumed[name]) if name in consumed else 0.0
            for name, dataset, sequences in zip(self._names, self.datasets, self._sequences, strict=True)
        }

    def census(self, source: int, num_sequences: int, named: np.ndarray) -> Census:
        """All documents of a source, and what so many global sequences made of them. `named`: those that pieces of them
        name, int64, rising."""
        nothing = [0] * self.num_lanes
        return self._sequences[source].census(
            self.mixture.consumed(num_sequences).get(self._names[source], nothing), named
        )

    def sequences_of(self, source: int) -> Sequences:
        """The endless sequences of one source by itself."""
        return self._sequences[source]

    def pieces(self, number: int) -> list[Piece]:
        """What is in global sequence `number`."""
        name, lane, row = self.mixture.locate(number)
        sequences = self._by_name.get(name)
        if sequences is None:
            raise UserError(
                f"sequence {number:,} came from data {name}, which data.train does not name any more. Name its folder "
                "again, with weight: 0, to look at what it gave."
            )
        return sequences.pieces(lane, row)

    def rows(self, numbers: Iterable[int]) -> Rows:
        """These global sequences, one a row. Random access; costs a binary search and a copy each."""
        return self._read([self.pieces(number) for number in numbers])

    def sequence(self, number: int) -> Window:
        """Global sequence `number`, and what it is made of."""
        return rows.window(self._read([pieces := self.pieces(number)]), pieces)

    def _read(self, pieces_B: Sequence[Sequence[Piece]]) -> Rows:
        apart = self.pack != "concat"
        return rows.read(self.datasets, pieces_B, self.sequence_length, apart=apart, faults=self.faults)

    def _arranged(self, place: int, dataset: Dataset | TextTars) -> Sequences:
        if isinstance(dataset, TextTars):
            if self.pack != "concat":
                raise UserError(
                    f"data.pack={self.pack} needs the sizes of all documents, and data {dataset.name} is raw text. Set "
                    "data.pack=concat, or tokenise it first: tools/shards.py build."
                )
            return TextLanes(
                dataset,
                seed=self._seed,
                num_lanes=self.num_lanes,
                sequence_length=self.sequence_length,
                source=place,
                faults=self.faults,
            )
        kind = Lanes if self.pack == "concat" else PackedSequences
        return kind(
            dataset,
            seed=self._seed,
            num_lanes=self.num_lanes,
            sequence_length=self.sequence_length,
            source=place,
        )

    def _planned(self) -> Mixture:
        """As data.train says it. A weight changes at the first sequence that begins at or behind its tokens."""
        changes = sorted({0, *(tokens for source in self.sources for tokens, _ in source.then)})
        stages: dict[int, Stage] = {}
        for tokens in changes:
            weights = {name: each.weight_at(tokens) for name, each in zip(self._names, self.sources, strict=True)}
            if not any(weights.values()):
                raise UserError(f"data.train: no source has a weight above 0 from token {tokens:,} on")
            first = -(-tokens // self.sequence_length)
            stages[first] = Stage(first, weights)
        return Mixture(joined(list(stages.values())), self.num_lanes)

    def _told(self, mixture: Mixture) -> str:
        paths = {name: dataset.name for name, dataset in zip(self._names, self.datasets, strict=True)}
        return "\n".join(
            f"  from sequence {stage.first:,}: "
            + ", ".join(f"{paths.get(name, 'other data')} ({name}) {weight}" for name, weight in stage.weights.items())
            for stage in mixture.stages
        )


def training_order(data: DataConfig, *, seed: int, sequence_length: int, tokenizer: Tokenizer | None = None) -> Order:
    """The order of data.train. `tokenizer`: of the run; None will do where no source is raw text. Raises UserError for
    data that are missing, of another tokenizer, or too few."""
    places = Places.of(data)
    shard_paths = [source.path for source in data.train if not is_text(source.path)]
    opened = iter(
        shards.open_all(
            shard_paths,
            what="data.train",
            tokenizer=tokenizer,
            places=places,
            check_sizes=not data.max_bad_fraction,
        )
        if shard_paths or not data.train
        else []
    )
    sources = [
        Source(
            _text(each, tokenizer, places) if is_text(each.path) else next(opened),
            each.weight,
            [(change.from_tokens, change.weight) for change in each.then],
        )
        for each in data.train
    ]
    return Order(
        sources,
        seed=seed,
        num_lanes=data.num_lanes,
        sequence_length=sequence_length,
        pack=data.pack,
        max_bad_fraction=data.max_bad_fraction,
    )


def _text(source: SourceConfig, tokenizer: Tokenizer | None, places: Places) -> TextTars:
    if tokenizer is None:
        raise ValueError(f"{source.path} is raw text, and there is no tokenizer for it")
    return TextTars.open(source.path, tokenizer, places=places, field=source.field, prompt_field=source.prompt_field)
