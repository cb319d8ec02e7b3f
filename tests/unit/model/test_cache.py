"""Attention over kept keys and values, against attention over whole texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.model.attention import DocumentAttention
from bigtrain.model.cache import KeyValueCache

LENGTHS, LONGEST, WIDTH, NEW = [3, 8, 1, 5], 8, 16, 4


def attention(theta: float | None) -> DocumentAttention:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True)
    return DocumentAttention(config, layer_number=1, rope_theta=theta).eval()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("theta", [None, 10000.0])
def test_texts_of_different_lengths_go_on_as_if_read_whole(groups: int, theta: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(LONGEST + NEW, len(LENGTHS), heads, WIDTH, generator=generator) for heads in (4, groups, groups)
    )
    module, cache = attention(theta), KeyValueCache(LONGEST + NEW)
    whole = module(query, key, value, None)  # causal: each row's places are its text's, however far it goes

    def read(positions_BS: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(positions_BS))[:, None]
        chosen: Any = [x[positions_BS, rows].transpose(0, 1) for x in (query, key, value)]
        return module(*chosen, cache.at(positions_BS))

    first = read(torch.arange(LONGEST).expand(len(LENGTHS), -1))
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(first[:length, row], whole[:length, row], rtol=0, atol=1e-6)
    lengths = torch.tensor(LENGTHS)
    read(torch.stack([lengths, lengths + 1], dim=1))  # two tokens at a time
    for step in range(2, NEW):
        found = read((lengths + step)[:, None])[0]
        expected = torch.stack([whole[length + step, row] for row, length in enumerate(LENGTHS)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_texts_that_leave_do_not_touch_the_others() -> None:
    cache = KeyValueCache(4)
    key = torch.arange(6.0).view(2, 3, 1, 1)
    cache.at(torch.tensor([[0, 1]] * 3)).extended(1, key, -key)
    cache.keep(torch.tensor([2, 0]))
    keys, values = cache.at(torch.tensor([[2], [1]])).extended(
        1, torch.tensor([[7.0, 8.0]]).view(1, 2, 1, 1), key[:1, :2]
    )
    assert keys[:, 0, :, 0].tolist() == [[2.0, 5.0, 7.0], [0.0, 8.0, 0.0]]
    assert values[:, 0, :, 0].tolist() == [[-2.0, -5.0, 0.0], [0.0, 1.0, 0.0]]
    assert cache.seen_BST()[:, 0].tolist() == [[True, True, True], [True, True, False]]
    with pytest.raises(ValueError, match="position 4 of a cache for 4"):
        cache.at(torch.tensor([[4], [2]]))
