"""Shards that are damaged after they were built: refused, or masked and counted, and never trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig, SourceConfig
from bigtrain.data.faults import BadDocument, Faults
from bigtrain.data.loader import microbatch
from bigtrain.data.order import Order, training_order
from bigtrain.data.shards import Dataset

S, LANES = 64, 4


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built / "train", tmp_path / "train")
    return tmp_path / "train"


def order_of(folder: Path, max_bad_fraction: float, pack: str = "concat") -> Order:
    source = [SourceConfig(str(folder))]
    data = DataConfig(train=source, num_lanes=LANES, max_bad_fraction=max_bad_fraction, pack=pack)
    return training_order(data, seed=1, sequence_length=S)


def flip(path: Path, row: np.void) -> None:
    with path.open("r+b") as file:
        file.seek(int(row["tokens_at"]))
        byte = file.read(1)[0]
        file.seek(int(row["tokens_at"]))
        file.write(bytes([byte ^ 1]))


def cut(path: Path, row: np.void) -> None:
    with path.open("r+b") as file:
        file.truncate(int(row["tokens_at"]) + 1)


def empty(path: Path, row: np.void) -> None:
    path.write_bytes(b"")


def missing(path: Path, row: np.void) -> None:
    path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path, np.void], None], str]] = {
    "flipped byte": (flip, "its tokens are damaged: their checksum is not that of the index"),
    "cut short": (cut, "the shard is cut short before its end"),
    "empty": (empty, "the shard is cut short before its end"),
    "missing": (missing, "the shard cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("what", DAMAGE)
def test_bad_documents_are_masked_and_the_others_as_they_were(copy: Path, built: Path, what: str, pack: str) -> None:
    damage, reason = DAMAGE[what]
    whole, number = Dataset.open(built / "train"), 1
    damage(copy / whole.index.shards[number].file, whole.documents_of_shard(number)[3])
    damaged, sound = order_of(copy, 0.9, pack), order_of(built / "train", 0.0, pack)
    bad: set[int] = set()
    for sequence in range(300):
        window, expected = damaged.sequence(sequence), sound.sequence(sequence)
        assert [piece.document for piece in window.pieces] == [piece.document for piece in expected.pieces]
        learned = microbatch([window]).loss_mask_BS[0].numpy()
        learned_there = microbatch([expected]).loss_mask_BS[0].numpy()
        at = 0
        for piece in window.pieces:
            here = slice(at, at + piece.count)
            try:
                damaged.datasets[0].tokens(piece.document)
                assert np.array_equal(window.tokens[here], expected.tokens[here])
            except BadDocument as error:
                bad.add(piece.document)
                assert error.reason == reason and not window.tokens[here].any()
                # no token of it is a target: those at places at ... at + count - 1 are predicted one place before
                assert not learned[max(at - 1, 0) : at + piece.count - 1].any()
                learned_there[max(at - 1, 0) : at + piece.count - 1] = False
            at += piece.count
        assert np.array_equal(learned, learned_there), "nothing else is masked"
    skipped = damaged.faults.take()
    assert bad and {each.reason for each in skipped} == {reason}
    assert len(skipped) == len(bad) == sum(damaged.faults.counts.values())
    assert all(each.shard == whole.index.shards[number].file for each in skipped)
    in_shard = whole.index.shards[number].num_documents
    assert len(bad) <= {"flipped byte": 1, "cut short": in_shard - 3}.get(what, in_shard)


@pytest.mark.parametrize("what", DAMAGE)
def test_none_is_allowed_by_default(copy: Path, what: str) -> None:
    damage, _ = DAMAGE[what]
    whole = Dataset.open(copy)
    shard = whole.index.shards[1]
    damage(copy / shard.file, whole.documents_of_shard(1)[3])
    with pytest.raises(UserError, match=rf"{copy}: {shard.file}"):
        order = order_of(copy, 0.0)
        for sequence in range(300):
            order.sequence(sequence)


def test_the_limit_counts_what_this_rank_reads() -> None:
    """One of four data ranks meets a quarter of the documents, so a quarter of what is allowed is its limit."""
    faults = Faults(0.1)
    faults.share = 4
    bad = [BadDocument("data", "x.tar", str(number), "damaged", 10) for number in range(4)]
    for number in (0, 1, 1, 0):
        faults.skip(0, number, bad[number], "data", lambda: 1000)
    assert faults.counts == {"damaged": 2}
    with pytest.raises(UserError, match=r"sample 2: damaged\. With it 30 bytes of 250 are bad, more than data"):
        faults.skip(0, 2, bad[2], "data", lambda: 1000)
