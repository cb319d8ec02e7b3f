"""The order of the tokens, and what is said of them, to the last bit: a run of an older version can be gone on with,
and its ledger audited. The hashes were taken before reading was made fast; whoever changes one breaks such runs."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data.faults import BadDocument
from bigtrain.data.held_out import HeldOut
from bigtrain.data.lanes import draws
from bigtrain.data.loader import StepBatch, batches, evaluation_batches
from bigtrain.data.order import Order, Source
from bigtrain.data.shards import Dataset

S, LANES, G = 128, 8, 16
FIELDS = ("tokens_BS", "targets_BS", "loss_mask_BS", "positions_BS", "documents_BS")


class Made(Dataset):
    """A data set that no tokenizer has a part in: sizes and tokens are drawn."""

    is_remote = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    size_bytes = 10**9  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, seed: int, *, dtype: str = "<u2", bad: frozenset[int] = frozenset()) -> None:
        drawn = draws(300, (seed,))
        self._sizes = (2 + drawn % 40 + (drawn % 7 == 0) * (drawn >> np.uint64(8)) % 900).astype(np.int64)
        self._drawn = [(draws(int(size), (seed, n)) % 5000).astype(dtype) for n, size in enumerate(self._sizes)]
        self._seed, self._bad = seed, bad

    name = property(lambda self: f"made-{self._seed}")  # pyright: ignore
    fingerprint = property(lambda self: f"{self._seed:016d}")  # pyright: ignore

    def __len__(self) -> int:
        return len(self._sizes)

    def num_tokens_of_documents(self) -> np.ndarray:
        return self._sizes

    def shards_of_documents(self) -> np.ndarray:
        return np.arange(len(self._sizes)) // 50

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        if document in self._bad:
            raise BadDocument(self.name, "a", str(document), "damaged", 10)
        return self._drawn[document][start:stop]


def hashed(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def fields(step: StepBatch) -> list[list[tuple[str, bytes]]]:
    return [
        [(str(tensor.dtype), tensor.numpy().tobytes()) for tensor in (getattr(micro, name) for name in FIELDS)]
        + [("single", bytes([micro.single_document]))]
        for micro in step.microbatches
    ]


BAD = frozenset({3, 77, 140})
ORDERS = {
    "concat": ([Source(Made(1))], "concat", "37523ad9e513c4bb"),
    "best_fit": ([Source(Made(1))], "best_fit", "023f7cbd88f8d1fb"),
    "mixture": ([Source(Made(1), 3), Source(Made(2, dtype="<u4"), 1, [(20_000, 5)])], "concat", "f4838a1eafe01b4c"),
    "packed mixture": ([Source(Made(1), 3), Source(Made(2), 1, [(20_000, 5)])], "best_fit", "8d8f9ec671402616"),
    "bad documents": ([Source(Made(1, bad=BAD))], "concat", "2cb2f47746cb4b1b"),
    "bad documents, packed": ([Source(Made(1, bad=BAD))], "best_fit", "3580b0934031fcf9"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ORDERS)
def test_of_training(name: str, num_workers: int) -> None:
    """Several epochs, in two data ranks."""
    sources, pack, expected = ORDERS[name]
    found = []
    for rank in range(2):
        order = Order(sources, seed=5, num_lanes=LANES, sequence_length=S, pack=pack, max_bad_fraction=0.5)
        stream = batches(
            order, data_rank=rank, data_size=2, global_batch_size=G, micro_batch_size=4, start=order.start(),
            num_workers=num_workers,
        )  # fmt: skip
        found += [(step.digest, fields(step)) for step in itertools.islice(stream, 40)]
    assert hashed(found) == expected


def test_of_evaluation() -> None:
    held_out = HeldOut([Made(1), Made(2)], sequence_length=S)
    shares = evaluation_batches(held_out, data_rank=1, data_size=2, global_batch_size=12, micro_batch_size=3)
    found = [fields(StepBatch(share, None, 0.0)) for share in shares]  # type: ignore[arg-type]
    assert hashed(found) == "ec1b419cee359301"


def test_of_real_shards(built: Path) -> None:
    """What is read is what stands in the shards: against tokens that numpy reads from the tars."""
    dataset = Dataset.open(built / "train")
    order = Order([Source(dataset)], seed=5, num_lanes=LANES, sequence_length=S)
    raw = [(built / "train" / shard.file).read_bytes() for shard in dataset.index.shards]
    for number in range(100):
        parts = []
        for piece in order.pieces(number):
            shard = dataset.shard_of(piece.document)
            first = sum(each.num_documents for each in dataset.index.shards[:shard])
            at = int(dataset.documents_of_shard(shard)[piece.document - first]["tokens_at"])
            tokens = np.frombuffer(raw[shard], dataset.index.dtype, piece.start + piece.count, at)
            parts.append(tokens[piece.start :])
        assert np.array_equal(order.sequence(number).tokens, np.concatenate(parts))
