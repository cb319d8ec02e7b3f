from __future__ import annotations

import random

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import sides
from bigtrain.data.sides import Census


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 200])
def test_one_pass_and_all_hashes_tell_the_same(count: int, share: float) -> None:
    texts = [f"text {number % max(1, count - 2)}" for number in range(count)]
    random.Random(count).shuffle(texts)
    held_out = sides.held_out(np.array([sides.hash_of(text.encode()) for text in texts], np.uint64), share)
    census = Census()
    train = list(sides.training_side(texts, share, census))
    assert sorted(train) == sorted(text for text, out in zip(texts, held_out, strict=True) if not out)
    assert (census.train, census.valid) == ((~held_out).sum(), held_out.sum())


def test_two_documents_are_enough_for_both_sides() -> None:
    for share in (1e-9, 0.05):
        assert sorted(sides.held_out(np.array([3 << 62, 1 << 63], np.uint64), share).tolist()) == [False, True]
    assert not sides.held_out(np.array([3 << 62, 3 << 62], np.uint64), 0.05).any()


@pytest.mark.parametrize(
    ("census", "says"),
    [
        (
            Census(16, 1),
            "17, of which 16 for train/ and 1 for valid/; train/ needs 64 (data.num_lanes=64). To mend it, ",
        ),
        (Census(16, 1), "set data.num_lanes to at most 16 (a multiple of the data-parallel size), or add text: each"),
        (Census(60, 9), "lower data.prepare.held_out=0.05 (--held-out)"),
        (Census(1, 0), "train/ needs 64 (data.num_lanes=64) and valid/ needs one that is not in train/"),
        (Census(), "the inputs hold no document"),
        (Census(64, 0), "64, of which 64 for train/ and 0 for valid/; valid/ needs one"),
    ],
)
def test_too_few_documents(census: Census, says: str) -> None:
    with pytest.raises(UserError) as caught:
        census.check(0.05, num_lanes=64)
    assert says in str(caught.value)


def test_enough_documents() -> None:
    Census(64, 1).check(0.05, num_lanes=64)
    Census(1, 0).check(0.0)
    Census(1, 0).check(0.05, needs_valid=False)
