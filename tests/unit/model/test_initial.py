"""Initial weights are a function of (seed, name): not of how the model is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.distributed.sharding import Shard
from bigtrain.model import initial

NAME = "decoder.layers.3.mlp.linear_fc1.weight"


def whole(name: str, shape: tuple[int, ...], *, seed: int = 7, std: float = 0.02) -> torch.Tensor:
    shard = Shard.of(name, shape, dim=None, rank=0, size=1)
    return initial.values(shard, 0, shard.numel, std=std, seed=seed).view(shape)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a few rows, so that a small matrix has many."""
    monkeypatch.setattr(initial, "BLOCK_ELEMENTS", 24)
    yield


def draw_shard(data: st.DataObject, shape: tuple[int, int]) -> tuple[Shard, torch.Tensor]:
    """Some tensor rank's shard of a matrix, and its part of the whole, cut by torch alone."""
    full = whole(NAME, shape)
    size = data.draw(st.sampled_from([1, 2, 3]))
    rank = data.draw(st.integers(0, size - 1))
    dim, parts = data.draw(st.sampled_from([(None, 1), (0, 1), (0, 2), (1, 1)]))
    if dim is None:
        return Shard.of(NAME, shape, dim=None, rank=0, size=size), full
    local = torch.cat([part.chunk(size, dim)[rank] for part in full.chunk(parts, dim)], dim)
    return Shard.of(NAME, tuple(local.shape), dim=dim, rank=rank, size=size, parts=parts), local


@pytest.mark.usefixtures("small_blocks")
def test_any_run_of_any_shard_is_that_part_of_the_whole() -> None:
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        shape = 12 * data.draw(st.integers(1, 4)), 6 * data.draw(st.integers(1, 2))
        shard, local = draw_shard(data, shape)
        start = data.draw(st.integers(0, local.numel()))
        numel = data.draw(st.integers(0, local.numel() - start))
        run = initial.values(shard, start, numel, std=0.02, seed=7)
        assert torch.equal(run, local.reshape(-1)[start : start + numel])

    check()


def test_a_matrix_of_several_real_blocks() -> None:
    shape = 2500, 1000  # blocks of 1048 rows
    full = whole(NAME, shape)
    blocks = full[:1048], full[1048:2096], full[2096:]
    assert not torch.equal(blocks[0], blocks[1]) and not torch.equal(blocks[1][:404], blocks[2])
    lower = Shard.of(NAME, (1250, 1000), dim=0, rank=1, size=2)
    assert torch.equal(initial.values(lower, 0, lower.numel, std=0.02, seed=7).view(1250, 1000), full[1250:])
    # a run that begins and ends within rows, and spans the border of two blocks
    start, numel = 1040 * 1000 + 37, 20 * 1000 + 5
    flat = Shard.of(NAME, shape, dim=None, rank=0, size=1)
    assert torch.equal(initial.values(flat, start, numel, std=0.02, seed=7), full.reshape(-1)[start : start + numel])


def test_they_are_normal_with_the_deviation_that_is_asked() -> None:
    values = whole(NAME, (1000, 1000), std=0.05)
    assert values.std().item() == pytest.approx(0.05, rel=5e-3)
    assert abs(values.mean().item()) < 3e-4
    within_one_deviation = (values.abs() < 0.05).float().mean().item()
    assert within_one_deviation == pytest.approx(0.6827, abs=3e-3)


def test_other_names_and_seeds_are_other_numbers() -> None:
    first = whole(NAME, (40, 40))
    for other in (whole(NAME.replace("3", "4"), (40, 40)), whole(NAME, (40, 40), seed=8)):
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.1
    assert torch.equal(first, whole(NAME, (40, 40)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("decoder.final_layernorm.weight", 1.0), ("decoder.layers.0.input_layernorm.bias", 0.0), ("mlp.bias", 0.0)],
)
def test_norms_are_one_and_biases_zero(name: str, value: float) -> None:
    shard = Shard.of(name, (6,), dim=None, rank=0, size=1)
    assert initial.values(shard, 1, 4, std=None, seed=1).tolist() == [value] * 4


def test_the_numbers_never_change() -> None:
    """A run's seed stands for its initial model: new numbers would be another model under the same config."""
    first, last = whole("embedding.word_embeddings.weight", (300, 4096), seed=1234, std=1.0)[[0, -1], :4]
    assert first.tolist() == pytest.approx(GOLDEN_FIRST, abs=1e-5)
    assert last.tolist() == pytest.approx(GOLDEN_LAST, abs=1e-5)


GOLDEN_FIRST = [0.5998923, -1.5027019, -1.4753332, 0.8563460]
GOLDEN_LAST = [-1.6088389, -0.1064003, -0.3031746, 0.6372617]
