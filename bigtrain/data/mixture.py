"""Which source a global sequence comes from, and which of that source's own sequences it is.

A mixture is a list of stages. A stage begins at a global sequence and gives each source a weight; within it the sources
take turns by a fixed pattern, so that any sequence is found by arithmetic. Sources are known by their content (a
fingerprint), and each counts its own sequences through all stages: where the weights change, planned or in the middle
of a run, a source goes on behind what was consumed of it, and one that is left out keeps its place.
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

    def __init__(self, stages: Sequence[Stage]) -> None:
        """`stages`, the first of which begins at sequence 0, in rising order. Raises ValueError otherwise."""
        firsts = [stage.first for stage in stages]
        if not stages or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError(f"stages begin at sequences {firsts}: from 0 on, each later than the one before")
        self.stages = list(stages)
        self._firsts = firsts
        self._names = [[name for name, weight in stage.weights.items() if weight > 0] for stage in stages]
        self._patterns = [
            Pattern([stage.weights[name] for name in names]) for stage, names in zip(stages, self._names, strict=True)
        ]
        self._consumed: list[dict[str, int]] = [{}]
        """Of each stage: sequences of each source that the stages before it took."""
        for first in firsts[1:]:
            self._consumed.append(self._after(len(self._consumed) - 1, first))

    def locate(self, number: int) -> tuple[str, int]:
        """(source, which of its own sequences) of global sequence `number`."""
        stage = bisect.bisect_right(self._firsts, number) - 1
        source, own = self._patterns[stage].locate(number - self._firsts[stage])
        name = self._names[stage][source]
        return name, own + self._consumed[stage].get(name, 0)

    def consumed(self, number: int) -> dict[str, int]:
        """Own sequences of each source among the global sequences before `number`."""
        return self._after(max(bisect.bisect_left(self._firsts, number) - 1, 0), number)

    def with_plan(self, plan: Mixture, number: int) -> Mixture:
        """This mixture up to sequence `number`, and from there on what `plan` says of the sequences from there on."""
        past = [stage for stage in self.stages if stage.first < number]
        current = bisect.bisect_right(plan._firsts, number) - 1
        to_come = [Stage(number, plan.stages[current].weights), *plan.stages[current + 1 :]]
        if past and past[-1].weights == to_come[0].weights:
            to_come = to_come[1:]
        return Mixture([*past, *to_come])

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"first": stage.first, "weights": {name: str(weight) for name, weight in stage.weights.items()}}
            for stage in self.stages
        ]

    @staticmethod
    def from_json(values: Sequence[Mapping[str, Any]]) -> Mixture:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        return Mixture(
            [
                Stage(int(value["first"]), {str(name): _fraction(weight) for name, weight in value["weights"].items()})
                for value in values
            ]
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.stages == other.stages

    def _after(self, stage: int, number: int) -> dict[str, int]:
        counts = self._patterns[stage].counts(number - self._firsts[stage])
        found = dict(self._consumed[stage])
        for name, count in zip(self._names[stage], counts, strict=True):
            found[name] = found.get(name, 0) + count
        return found


def _fraction(text: str) -> Fraction:
    """``3/2`` or ``3``: what str(Fraction) writes, and nothing that could take long."""
    numerator, _, denominator = text.partition("/")
    return Fraction(int(numerator), int(denominator or "1"))
