from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import audit as auditing
from bigtrain.data import ledger
from bigtrain.data.audit import audit
from bigtrain.data.ledger import Begin, Entry
from bigtrain.data.loader import batches
from bigtrain.data.order import Order, Source
from bigtrain.data.shards import Dataset

S, LANES, G = 64, 8, 8


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def order(built: Path, request: pytest.FixtureRequest) -> Order:
    sources = [Source(Dataset.open(built / "train"), 3.0), Source(Dataset.open(built / "valid"), 1.0)]
    return Order(sources, seed=5, num_lanes=LANES, sequence_length=S, pack=request.param)


def fed(order: Order, steps: range, data_size: int = 2) -> list[Entry]:
    """What real loaders of `data_size` data ranks feed in these steps."""
    found: list[Entry] = []
    for rank in range(data_size):
        loader = batches(
            order,
            data_rank=rank,
            data_size=data_size,
            global_batch_size=G,
            micro_batch_size=2,
            start=order.cursor((steps.start - 1) * G),
        )
        found += [Entry(n, (n - 1) * G, G, rank, data_size, next(loader).digest) for n in steps]
    return sorted(found, key=lambda entry: (entry.step, entry.data_rank))


@pytest.fixture(scope="module")
def entries(order: Order) -> list[Entry]:
    """Several epochs, and another number of data ranks half-way."""
    return [*fed(order, range(1, 150)), *fed(order, range(150, 300), data_size=4)]


def test_a_sound_run_is_proven(order: Order, entries: list[Entry]) -> None:
    found = audit(order, entries)
    assert found.problems == []
    assert found.steps == 299 and found.sequences == 299 * G
    train = order.datasets[0]
    assert isinstance(train, Dataset)
    epochs = found.epochs[train.name]
    assert len(epochs) > 2 and epochs[0] == (len(train), 0)
    assert sum(epochs[-1]) < len(train)


PLANTED = {
    "a step is lost": (lambda e: [x for x in e if x.step != 40], "step 40 is missing"),
    "a rank's step is lost": (
        lambda e: [x for x in e if (x.step, x.data_rank) != (40, 1)],
        "data rank 1 of 2 is missing",
    ),
    "a step stands twice": (lambda e: [*e, *[x for x in e if x.step == 40]], "step 40 stands twice, of data rank 0"),
    "sequences are skipped": (
        lambda e: [replace(x, first=x.first + G) if x.step >= 40 else x for x in e],
        "step 40 skips sequences: it begins at 320, 312 comes next",
    ),
    "sequences are repeated": (
        lambda e: [replace(x, first=x.first - G) if x.step >= 40 else x for x in e],
        "step 40 repeats sequences: it begins at 304, 312 comes next",
    ),
    "other tokens were fed": (
        lambda e: [replace(x, digest="0" * 16) if (x.step, x.data_rank) == (40, 1) else x for x in e],
        "step 40, data rank 1: what it was fed is not what the order says of sequences 312 to 319",
    ),
    "an earlier step was fed again": (
        lambda e: [replace(x, digest=next(y for y in e if y.step == 39).digest) if x == e[78] else x for x in e],
        "step 40, data rank 0: what it was fed is not what the order says of sequences 312 to 319: it is what step 39",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_first_repeat_or_gap_is_named(order: Order, entries: list[Entry], what: str) -> None:
    plant, says = PLANTED[what]
    early = [entry for entry in entries if entry.step < 60]
    assert early[78].step == 40 and early[78].data_rank == 0
    planted = sorted(plant(early), key=lambda entry: (entry.step, entry.data_rank))
    assert any(says in problem for problem in audit(order, planted).problems)


def test_a_ledger_that_knows_less_than_a_checkpoint(order: Order, entries: list[Entry]) -> None:
    """Its end may be lost with the machine."""
    some = [entry for entry in entries if entry.step <= 20]
    assert audit(order, some, saved_step=20).problems == []
    (problem,) = audit(order, some, saved_step=24).problems
    assert problem == "the ledger ends before step 21, but step 24 was trained: a checkpoint has it"
    assert audit(order, []).problems == ["the ledger is empty"]


def test_a_run_that_goes_on_from_another_runs_checkpoint(order: Order, entries: list[Entry], tmp_path: Path) -> None:
    later = [entry for entry in entries if entry.step > 90]
    begin = Begin(90, later[0].first)
    found = audit(order, later, begin=begin)
    assert found.problems == [] and found.steps == 209
    assert any("step 1 is missing" in problem for problem in audit(order, later).problems)
    (tmp_path / "ledger").mkdir()
    assert ledger.read_begin(tmp_path) == Begin()
    ledger.write_begin(tmp_path, begin)
    assert ledger.read_begin(tmp_path) == begin
    (tmp_path / "ledger" / "begin.json").write_text("{")
    with pytest.raises(UserError, match=r"begin\.json: it does not say"):
        ledger.read_begin(tmp_path)


def test_what_follows_each_other_is_joined(order: Order, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proof from many small parts; and memory that does not grow with the run."""
    expected = audit(order, entries)
    monkeypatch.setattr(auditing, "_MANY_ROWS", 50)
    assert audit(order, entries) == expected


class Faulty(Order):
    """An order that is wrong: the audit must see it though what was fed agrees with it."""

    repeats = False
    last = 10**9

    def pieces(self, number: int):  # type: ignore[no-untyped-def]
        return super().pieces(number - (3 * LANES * (number >= 120)) if self.repeats else number + 8 * (number >= 160))


@pytest.mark.parametrize(("repeats", "says"), [(True, "is repeated in epoch"), (False, "is not whole in epoch")])
def test_an_order_that_repeats_or_skips_documents_is_found(order: Order, repeats: bool, says: str) -> None:
    faulty = Faulty(order.sources[:1], seed=5, num_lanes=LANES, sequence_length=S, pack=order.pack)
    faulty.repeats = repeats
    found = audit(faulty, fed(faulty, range(1, 200)))
    assert any(says in problem for problem in found.problems), found


def write(run_dir: Path, entries: list[Entry]) -> None:
    for entry in entries:
        path = ledger.path_of(run_dir, entry.data_rank)
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"kind": "data", **entry.to_dict()}) + "\n")


def test_it_is_read_from_its_files(entries: list[Entry], tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(entries, len(entries))
    write(tmp_path, shuffled)
    with ledger.path_of(tmp_path, 0).open("a") as file:
        file.write('{"step": 300, "fir')  # a crash
    assert ledger.read(tmp_path) == entries


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", '{"step":1,"first":0,"size":8,"data_rank":2,"data_size":2,"digest":""}']
)
def test_what_is_no_ledger(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match="has no ledger"):
        ledger.read(tmp_path)
    path = ledger.path_of(tmp_path, 0)
    path.parent.mkdir()
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1: it is no entry"):
        ledger.read(tmp_path)
