"""Windows that are passed over: where steps begin around them, what is fed, and the proof of the rest."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import passed_over
from bigtrain.data.audit import audit
from bigtrain.data.ledger import Entry
from bigtrain.data.loader import StepBatch, batches
from bigtrain.data.order import Order, Source
from bigtrain.data.passed_over import Window, behind, first_of_step
from bigtrain.data.shards import Dataset

S, LANES, G = 64, 8, 8


def window(first: int, end: int) -> Window:
    return Window(first, end, from_step=end // G, to_step=first // G, reason="a spike")


def walked(windows: list[Window], start: int, size: int, steps: int) -> list[int]:
    """Where each step begins, one sequence at a time: the plain way."""
    bad = {number for each in windows for number in range(each.first, each.end)}
    found, at = [], start
    for _ in range(steps):
        while at in bad:
            at += 1
        found.append(at)
        at += size
    return found


def test_steps_begin_where_a_walk_finds_them() -> None:
    """Windows apart, behind each other, in each other, and with another batch size than when they were made."""
    generator = random.Random(3)
    for _ in range(300):
        windows = [
            window(first, first + generator.randrange(1, 60))
            for first in generator.sample(range(150), generator.randrange(4))
        ]
        start, size = generator.randrange(120), generator.choice([1, 4, 8, 12])
        expected = walked(windows, start, size, 20)
        assert [first_of_step(windows, start, size, step) for step in range(20)] == expected, windows
        assert behind(windows, start) == expected[0]


def test_a_window_is_kept(tmp_path: Path) -> None:
    assert passed_over.read(tmp_path) == []
    first, second = window(8, 24), window(80, 96)
    assert passed_over.add(tmp_path, first) == [first] == passed_over.read(tmp_path)
    assert passed_over.add(tmp_path, second) == [first, second] == passed_over.read(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passed_over.json"]


@pytest.mark.parametrize("content", ["{", "[1]", '[{"first": 4}]', json.dumps([window(8, 8).to_dict()])])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "passed_over.json").write_text(content)
    with pytest.raises(UserError, match=r"passed_over\.json: it does not say which data are passed over"):
        passed_over.read(tmp_path)


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def order(built: Path, request: pytest.FixtureRequest) -> Order:
    return Order(
        [Source(Dataset.open(built / "train"))], seed=5, num_lanes=LANES, sequence_length=S, pack=request.param
    )


def loaded(order: Order, rank: int, size: int, count: int, windows: list[Window], workers: int) -> list[StepBatch]:
    loader = batches(
        order,
        data_rank=rank,
        data_size=size,
        global_batch_size=G,
        micro_batch_size=2,
        start=order.start(),
        num_workers=workers,
        passed_over=windows,
    )
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_fed_is_what_a_loader_feeds_that_has_only_the_rest(order: Order, workers: int) -> None:
    windows = [window(5 * G, 9 * G), window(12 * G, 13 * G)]
    every = loaded(order, 1, 2, 30, [], 0)
    found = loaded(order, 1, 2, 20, windows, workers)
    kept = [step for step in range(30) if step not in (5, 6, 7, 8, 12)][:20]
    assert [batch.digest for batch in found] == [every[step].digest for step in kept]
    assert [batch.cursor.num_sequences for batch in found] == [(step + 1) * G for step in kept]


def entries_of(order: Order, count: int, windows: list[Window]) -> list[Entry]:
    found: list[Entry] = []
    for rank in range(2):
        for step, batch in enumerate(loaded(order, rank, 2, count, windows, 0), start=1):
            found.append(Entry(step, batch.cursor.num_sequences - G, G, rank, 2, batch.digest))
    return sorted(found, key=lambda entry: (entry.step, entry.data_rank))


def test_the_audit_proves_the_rest(order: Order) -> None:
    """Over several epochs, in which the windows are what nothing else may repeat."""
    windows = [window(5 * G, 9 * G), window(40 * G, 41 * G)]
    entries = entries_of(order, 200, windows)
    found = audit(order, entries, passed_over=windows)
    assert found.problems == [] and found.passed_over == 5 * G and found.sequences == 200 * G
    (dataset,) = order.datasets
    assert isinstance(dataset, Dataset)
    assert len(found.epochs[dataset.name]) > 2 and found.epochs[dataset.name][0] == (len(dataset), 0)


def test_the_audit_knows_no_other_gap(order: Order) -> None:
    windows = [window(5 * G, 9 * G)]
    entries = entries_of(order, 20, windows)
    assert "step 6 skips sequences: it begins at 72, 40 comes next" in audit(order, entries).problems
    wider = [window(5 * G, 10 * G)]
    assert (
        "step 6 repeats sequences: it begins at 72, 80 comes next" in audit(order, entries, passed_over=wider).problems
    ), "or it trained on a part of the window"
    trained = entries_of(order, 20, [])
    assert any("step 6 repeats" in each for each in audit(order, trained, passed_over=windows).problems)
    again = [replace(each, first=5 * G) if each.step == 12 else each for each in entries]
    assert any("step 12" in each for each in audit(order, again, passed_over=windows).problems)
