"""Slice arithmetic against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.distributed.sharding import Shard


def local_of(whole: np.ndarray, dim: int | None, rank: int, size: int, parts: int) -> np.ndarray:
    """What a tensor rank holds, made with numpy alone."""
    if dim is None:
        return whole
    stacked = np.split(whole, parts, axis=dim)
    return np.concatenate([np.split(part, size, axis=dim)[rank] for part in stacked], axis=dim)


@given(data=st.data())
def test_every_run_of_every_shard_lands_where_numpy_says(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    ndim = data.draw(st.integers(1, 2))
    dim = data.draw(st.sampled_from([None, *range(ndim)]))
    parts = data.draw(st.integers(1, 2)) if dim == 0 else 1
    shape = [data.draw(st.integers(1, 4)) for _ in range(ndim)]
    if dim is not None:
        shape[dim] *= size * parts
    whole = np.arange(np.prod(shape)).reshape(shape)
    rank = data.draw(st.integers(0, size - 1))
    local = local_of(whole, dim, rank, size, parts)
    shard = Shard.of("w", local.shape, dim=dim, rank=rank, size=size, parts=parts)
    assert shard.global_shape == whole.shape
    assert shard.local_shape == local.shape

    start = data.draw(st.integers(0, local.size))
    numel = data.draw(st.integers(0, local.size - start))
    flat = local.reshape(-1)[start : start + numel]
    seen = 0
    rectangles = list(shard.rectangles(start, numel))
    for r in rectangles:
        place = tuple(slice(o, o + n) for o, n in zip(r.offsets, r.sizes, strict=True))
        np.testing.assert_array_equal(whole[place].reshape(-1), flat[r.flat_start : r.flat_start + r.numel])
        seen += r.numel
    assert seen == numel
    assert len(rectangles) <= 3 * len(shard.blocks or (None,))


def test_only_rows_are_stacked() -> None:
    with pytest.raises(ValueError, match="only rows"):
        Shard.of("w", (2, 2), dim=1, rank=0, size=1, parts=2)


def test_three_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="w: elements"):
        list(Shard.of("w", (2, 2, 2), dim=None, rank=0, size=1).rectangles())


def test_the_first_rows_of_a_shard() -> None:
    """293 rows on three ranks, padded to 294: the last rank has one row less, and of 99 rows none."""
    shards = [Shard.of("embedding", (98, 4), dim=0, rank=rank, size=3) for rank in range(3)]
    kept = [shard.first_rows(293) for shard in shards]
    assert [shard.local_shape for shard in kept] == [(98, 4), (98, 4), (97, 4)]
    assert all(shard.global_shape == (293, 4) for shard in kept)
    assert [(r.offsets, r.sizes) for r in kept[2].rectangles()] == [((196, 0), (97, 4))]
    assert [shard.first_rows(99).numel for shard in shards] == [392, 4, 0]
    assert list(shards[2].first_rows(99).rectangles()) == []
    for other in (Shard.of("x", (4, 4), dim=1, rank=0, size=2), Shard.of("x", (4,), dim=None, rank=0, size=2)):
        with pytest.raises(ValueError, match="not one block of rows"):
            other.first_rows(3)
