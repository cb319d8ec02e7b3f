from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data.mixture import Mixture, Stage
from bigtrain.data.order import Cursor, Order, Source
from bigtrain.data.shards import Dataset

S, LANES = 64, 8


@pytest.fixture(scope="module")
def train(built: Path) -> Dataset:
    return Dataset.open(built / "train")


@pytest.fixture(scope="module")
def valid(built: Path) -> Dataset:
    return Dataset.open(built / "valid")


def order(*sources: Source) -> Order:
    return Order(sources, seed=1, num_lanes=LANES, sequence_length=S)


def shares(mixture: Mixture, first: int, count: int) -> dict[str, float]:
    counts = Counter(mixture.locate(number)[0] for number in range(first, first + count))
    return {name: found / count for name, found in counts.items()}


def test_observed_shares_are_those_asked_for() -> None:
    weights = {"web": Fraction("0.7"), "code": Fraction("0.2"), "books": Fraction("0.07"), "poems": Fraction("0.03")}
    found = shares(Mixture([Stage(0, weights)], 64), 0, 6_400)
    for name, weight in weights.items():
        assert found[name] == pytest.approx(float(weight), abs=0.001)


def test_each_source_counts_on_through_the_stages() -> None:
    """Also one that is left out for a while, and one that comes later."""
    mixture = Mixture(
        [
            Stage(0, {"a": Fraction(1), "b": Fraction(1)}),
            Stage(101, {"a": Fraction(0), "b": Fraction(3), "c": Fraction(1)}),
            Stage(333, {"a": Fraction(2), "c": Fraction(1)}),
        ],
        num_lanes=7,
    )
    seen: Counter[tuple[str, int]] = Counter()
    for number in range(1000):
        consumed = mixture.consumed(number)
        assert consumed == {name: [seen[name, lane] for lane in range(7)] for name in consumed}
        name, lane, own = mixture.locate(number)
        assert (lane, own) == (number % 7, seen[name, lane])
        seen[name, lane] += 1
    assert shares(mixture, 101, 232)["b"] == pytest.approx(0.75, abs=0.02)
    assert shares(mixture, 336, 630) == {"a": pytest.approx(2 / 3), "c": pytest.approx(1 / 3)}


def test_every_lane_and_every_row_has_its_share() -> None:
    """So every data rank reads all lanes of its own of every source, and every batch is mixed."""
    mixture = Mixture([Stage(0, {"a": Fraction("0.75"), "b": Fraction("0.25")})], 16)
    names = np.array([mixture.locate(number)[0] == "b" for number in range(16 * 40)]).reshape(40, 16)
    assert (names.sum(0) == 10).all() and (names.sum(1) == 4).all()


def test_a_plan_of_weights_over_tokens(train: Dataset, valid: Dataset) -> None:
    planned = order(Source(train, 3.0), Source(valid, 1.0, [(100 * S - 5, 3.0), (200 * S, 0.0)]))
    sources = [planned.sequence(number).pieces[0].source for number in range(300)]
    assert sources[:100].count(1) == 25
    assert sources[100:200].count(1) == 50
    assert sources[200:].count(1) == 0


def test_a_change_in_the_middle_repeats_nothing(train: Dataset, valid: Dataset) -> None:
    before, after = order(Source(train, 1.0)), order(Source(valid, 1.0), Source(train, 1.0))
    cursor = Cursor.from_dict(json.loads(json.dumps(before.cursor(50).to_dict())))
    with pytest.raises(UserError, match=r"is not the mixture of the checkpoint(.|\n)*data\.on_change=accept"):
        after.go_on_from(cursor)
    assert after.go_on_from(cursor, accept_change=True)
    alone = [order(Source(valid)), order(Source(train))]
    seen = [[0] * LANES, [len(range(lane, 50, LANES)) for lane in range(LANES)]]
    for number in range(50, 250):
        pieces, lane = after.pieces(number), number % LANES
        source = pieces[0].source
        assert [p.document for p in pieces] == [
            p.document for p in alone[source].pieces(seen[source][lane] * LANES + lane)
        ]
        seen[source][lane] += 1
    assert [sum(each) for each in seen] == [100, 150]
    again = order(Source(valid, 1.0), Source(train, 1.0))
    assert not again.go_on_from(after.cursor(120)), "the second stop finds nothing new"
    assert [again.pieces(number) for number in range(120, 140)] == [after.pieces(number) for number in range(120, 140)]


def test_a_source_that_is_gone_is_not_needed_any_more(train: Dataset, valid: Dataset) -> None:
    both, one = order(Source(train), Source(valid)), order(Source(valid))
    assert one.go_on_from(both.cursor(40), accept_change=True)
    assert one.epochs(60)[str(valid.path)] == pytest.approx((20 + 20) * S / valid.index.num_tokens)
    with pytest.raises(UserError, match=r"sequence 1 came from data .* does not name any more"):
        one.pieces(1)


def test_a_stage_that_changes_nothing_is_none(train: Dataset, valid: Dataset) -> None:
    """A run may stop where it begins, and go on."""

    def planned() -> Order:
        return order(Source(train, 3.0, [(100 * S, 3.0), (200 * S, 1.0)]), Source(valid, 1.0, [(100 * S, 1.0)]))

    for number in (99, 100, 101, 200):
        again = planned()
        assert not again.go_on_from(planned().cursor(number))
    assert [stage.first for stage in planned().mixture.stages] == [0, 200]


def test_the_same_data_twice(train: Dataset) -> None:
    with pytest.raises(UserError, match="hold the same data"):
        order(Source(train), Source(train))


def test_a_time_without_data(train: Dataset) -> None:
    with pytest.raises(UserError, match="no source has a weight above 0 from token 640 on"):
        order(Source(train, 1.0, [(640, 0.0)]))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [{"first": 1, "weights": {"a": "1"}}],
        [{"first": 0, "weights": {"a": "1e99999999"}}],
        [{"first": 0, "weights": {"a": "1"}}, {"first": 0, "weights": {"a": "1"}}],
    ],
)
def test_what_is_no_mixture(values: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError):
        Mixture.from_json(values, 8)
