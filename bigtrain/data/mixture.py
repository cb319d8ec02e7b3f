"""Which source a global sequence comes from, and which of that source's own sequences it is.

Global sequence i is row i // L of lane i % L. Every lane takes from all sources, by a fixed pattern: lane l begins at
place l of it and goes on by one in each row. So each row and each lane has its share of every source, any sequence is
found by arithmetic, and a source is read lane by lane, each lane in its own order from its beginning on.

A mixture is a list of stages. A stage begins at a global sequence and gives each source a weight. Sources are known by
their content (a fingerprint), and each counts its own rows of a lane through all stages: where the weights change,
planned or in the middle of a run, a source goes on behind what was consumed of it, and one that is left out keeps its
place.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


class Pattern:
    """Which source sequence i comes from: each gets its share, spread as evenly as whole numbers allow, with no state.

    Source 0 takes sequence i where ``floor((i + 1) w)`` is above ``floor(i w)``; the others share the rest likewise."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        left = sum(weights, Fraction(0))
        self._shares: list[tuple[int, int]] = []
        for weight in weights:
            share = weight / left if left else Fraction(1)
            self._shares.append((share.numerator, share.denominator))
            left -= weight

    def locate(self, number: int) -> tuple[int, int]:
        """(source, how many sequences of that source come before) of sequence `number`."""
        for source, (numerator, denominator) in enumerate(self._shares):
            before = number * numerator // denominator
            if (number + 1) * numerator // denominator > before:
                return source, before
            number -= before
        raise AssertionError("the last source takes what is left")

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` sequences come from each source."""
        found: list[int] = []
        for numerator, denominator in self._shares:
            found.append(number * numerator // denominator)
            number -= found[-1]
        return found


@dataclass(frozen=True)
class Stage:
    """The weights from one global sequence on."""

    first: int
    """The first global sequence of the stage."""
    weights: Mapping[str, Fraction]
    """Of each source, by its fingerprint; those above 0 take part."""


class Mixture:
    """The stages of a run, those that are consumed and those to come."""

    def __init__(self, stages: Sequence[Stage], num_lanes: int) -> None:
        """`stages`, the first of which begins at sequence 0, in rising order. Raises ValueError otherwise."""
        firsts = [stage.first for stage in stages]
        if not stages or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError(f"stages begin at sequences {firsts}: from 0 on, each later than the one before")
        self.stages, self.num_lanes = list(stages), num_lanes
        self._firsts = firsts
        self._names = [[name for name, weight in stage.weights.items() if weight > 0] for stage in stages]
        self._patterns = [
            Pattern([stage.weights[name] for name in names]) for stage, names in zip(stages, self._names, strict=True)
        ]
        self._consumed: list[list[dict[str, int]]] = [[{} for _ in range(num_lanes)]]
        """Of each stage and lane: rows of each source that the stages before it took."""
        self._places: list[list[tuple[int, list[int]]]] = [[] for _ in stages]
        """Of each stage and lane: the place in the pattern of its row 0, and of each source, what is to be added to its
        place in the pattern to have its own row. Made at the stage's first use."""
        for first in firsts[1:]:
            self._consumed.append([self._after(len(self._consumed) - 1, lane, first) for lane in range(num_lanes)])

    def locate(self, number: int) -> tuple[str, int, int]:
        """(source, lane, which of the source's own rows in this lane) of global sequence `number`."""
        stage = bisect.bisect_right(self._firsts, number) - 1
        row, lane = divmod(number, self.num_lanes)
        shift, before = (self._places[stage] or self._placed(stage))[lane]
        source, place = self._patterns[stage].locate(row + shift)
        return self._names[stage][source], lane, place + before[source]

    def consumed(self, number: int) -> dict[str, list[int]]:
        """Own rows of each source in each lane among the global sequences before `number`."""
        stage = max(bisect.bisect_left(self._firsts, number) - 1, 0)
        lanes = [self._after(stage, lane, number) for lane in range(self.num_lanes)]
        return {name: [lane.get(name, 0) for lane in lanes] for name in {name for lane in lanes for name in lane}}

    def with_plan(self, plan: Mixture, number: int) -> Mixture:
        """This mixture up to sequence `number`, and from there on what `plan` says of the sequences from there on."""
        past = [stage for stage in self.stages if stage.first < number]
        current = bisect.bisect_right(plan._firsts, number) - 1
        to_come = [Stage(number, plan.stages[current].weights), *plan.stages[current + 1 :]]
        return Mixture(joined([*past, *to_come]), self.num_lanes)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"first": stage.first, "weights": {name: str(weight) for name, weight in stage.weights.items()}}
            for stage in self.stages
        ]

    @staticmethod
    def from_json(values: Sequence[Mapping[str, Any]], num_lanes: int) -> Mixture:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        return Mixture(
            [
                Stage(int(value["first"]), {str(name): _fraction(weight) for name, weight in value["weights"].items()})
                for value in values
            ],
            num_lanes,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.stages == other.stages

    def _placed(self, stage: int) -> list[tuple[int, list[int]]]:
        names, pattern = self._names[stage], self._patterns[stage]
        self._places[stage] = [
            (
                lane - self._first_row(stage, lane),
                [taken.get(name, 0) - skipped for name, skipped in zip(names, pattern.counts(lane), strict=True)],
            )
            for lane, taken in enumerate(self._consumed[stage])
        ]
        return self._places[stage]

    def _first_row(self, stage: int, lane: int) -> int:
        """Of the lane in the stage."""
        return -((lane - self._firsts[stage]) // self.num_lanes)

    def _after(self, stage: int, lane: int, number: int) -> dict[str, int]:
        """Own rows of each source in a lane before global sequence `number`, which the stage reaches."""
        rows = -((lane - number) // self.num_lanes) - self._first_row(stage, lane)
        pattern, found = self._patterns[stage], dict(self._consumed[stage][lane])
        for name, before, after in zip(
            self._names[stage], pattern.counts(lane), pattern.counts(lane + rows), strict=True
        ):
            found[name] = found.get(name, 0) + after - before
        return found


def joined(stages: Sequence[Stage]) -> list[Stage]:
    """Without those that change nothing."""
    found: list[Stage] = []
    for stage in stages:
        if not found or found[-1].weights != stage.weights:
            found.append(stage)
    return found


def _fraction(text: str) -> Fraction:
    """``3/2`` or ``3``: what str(Fraction) writes, and nothing that could take long."""
    numerator, _, denominator = text.partition("/")
    return Fraction(int(numerator), int(denominator or "1"))
