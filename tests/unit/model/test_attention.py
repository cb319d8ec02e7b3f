"""Attention within documents, against a score matrix with a mask, in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bigtrain.distributed import megatron_cpu
from bigtrain.model.attention import DocumentAttention, boundaries_of

B, S, HEADS, GROUPS, D = 2, 12, 4, 2, 8


def attention(rope_theta: float | None = None, **settings: Any) -> DocumentAttention:
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": HEADS * D, "num_attention_heads": HEADS}
    shape |= {"attention_dropout": 0.0, **settings}
    config = TransformerConfig(**shape)
    return DocumentAttention(config, 1, rope_theta=rope_theta).eval()


def inputs(groups: int = GROUPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(S, B, n, D, generator=generator) for n in (HEADS, groups, groups))
    return query, key, value


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[S, B, N * D], each score computed and masked."""
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    same = documents[:, :, None] == documents[:, None, :]
    seen = same & torch.ones(S, S, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~seen[:, None], -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 12])


def test_boundaries() -> None:
    assert boundaries_of(DOCUMENTS).tolist() == [0, 5, 6, 12, 24]
    assert boundaries_of(torch.zeros(3, 4, dtype=torch.int32)).tolist() == [0, 4, 8, 12]
    assert boundaries_of(DOCUMENTS).dtype == torch.int32


def test_a_document_that_fills_two_rows_is_cut_at_the_row() -> None:
    """The same number in two rows is not the same document."""
    assert boundaries_of(torch.tensor([[0, 0], [0, 1]])).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
def test_documents_against_a_masked_score_matrix(groups: int) -> None:
    query, key, value = inputs(groups)
    found = attention()(query, key, value, boundaries_of(DOCUMENTS))
    assert found.shape == (S, B, HEADS * D)
    torch.testing.assert_close(found.double(), by_hand(query, key, value, DOCUMENTS), atol=2e-6, rtol=2e-6)


def test_without_boundaries_every_row_is_one_document() -> None:
    query, key, value = inputs()
    module, one = attention(), torch.zeros(B, S, dtype=torch.int32)
    fast = module(query, key, value, None)
    torch.testing.assert_close(fast.double(), by_hand(query, key, value, one), atol=2e-6, rtol=2e-6)
    assert torch.equal(fast, module(query, key, value, boundaries_of(one)))


def test_a_scale_is_used() -> None:
    query, key, value = inputs()
    module = attention()
    module.scale = 2.0 / math.sqrt(D)
    expected = by_hand(2 * query, key, value, DOCUMENTS)
    found = module(query, key, value, boundaries_of(DOCUMENTS))
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)


def rotated(x_SBND: torch.Tensor, theta: float) -> torch.Tensor:
    """Each pair of a head (one of each half) as a complex number, turned by position x frequency."""
    pairs = torch.complex(x_SBND[..., : D // 2].double(), x_SBND[..., D // 2 :].double())
    angles = torch.arange(S)[:, None] / theta ** (torch.arange(D // 2) * 2 / D)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None].to(torch.complex128)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rotary_positions_by_hand() -> None:
    query, key, value = inputs()
    found = attention(rope_theta=100.0)(query, key, value, boundaries_of(DOCUMENTS))
    expected = by_hand(rotated(query, 100.0), rotated(key, 100.0), value, DOCUMENTS)
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=5e-6)


def test_only_the_distance_within_a_document_matters() -> None:
    """The same document at another place in the row."""
    query, key, value = inputs()
    module, place = attention(rope_theta=100.0), torch.arange(S)
    shifted = [x.roll(5, dims=0) for x in (query, key, value)]
    first = module(query, key, value, boundaries_of((place >= 6).int().expand(B, S)))[:6]
    second = module(*shifted, boundaries_of(((place >= 5).int() + (place >= 11).int()).expand(B, S)))[5:11]
    torch.testing.assert_close(first, second, atol=5e-6, rtol=5e-6)


class TestDropout:
    """Where the random numbers come from."""

    @pytest.fixture(autouse=True)
    def tracker(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random

        monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)  # all that `apply` replaces
        monkeypatch.setattr(schedules, "torch", torch)
        for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
            monkeypatch.setattr(random, name, getattr(random, name))
        for name in ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"):
            monkeypatch.setattr(random, name, getattr(random, name))
        megatron_cpu.apply()
        tracker: Any = random.get_cuda_rng_tracker()
        tracker.add("model-parallel-rng", 11)
        yield tracker

    def test_it_drops_in_training_only(self) -> None:
        query, key, value = inputs()
        module = attention(attention_dropout=0.5)
        assert torch.equal(module(query, key, value, None), attention()(query, key, value, None))
        first, second = (module.train()(query, key, value, None) for _ in range(2))
        assert not torch.equal(first, second)

    def test_it_draws_from_the_tensor_ranks_own_stream(self) -> None:
        query, key, value = inputs()
        before = torch.get_rng_state()
        attention(attention_dropout=0.5).train()(query, key, value, None)
        assert torch.equal(torch.get_rng_state(), before)

    def test_under_sequence_parallel_it_goes_on_in_the_stream_around_it(self, tracker: Any) -> None:
        """A second fork of the same stream would repeat the numbers that the layer around draws."""
        module = attention(attention_dropout=0.5).train()
        module.in_sharded_region = True
        with tracker.fork():
            before = torch.get_rng_state()
            module(*inputs(), None)
            assert not torch.equal(torch.get_rng_state(), before)
