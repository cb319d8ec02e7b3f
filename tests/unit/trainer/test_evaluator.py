"""Loss, perplexity and bits a byte of an evaluation, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.data.microbatch import Microbatch
from bigtrain.engine.engine import LossSum
from bigtrain.trainer.evaluator import Evaluation, Evaluator

BYTES = np.array([0, 1, 2, 5], dtype=np.int32)
"""Of tokens 0 to 3."""


def microbatch(targets: list[list[int]], mask: list[list[int]]) -> Microbatch:
    targets_BS = torch.tensor(targets)
    return Microbatch(
        tokens_BS=torch.full_like(targets_BS, 3),
        targets_BS=targets_BS,
        starts_B=[[place for place, learned in enumerate(row, start=1) if not learned] for row in mask],
        num_tokens_B=[len(row) + 1 for row in mask],
    )


class Engine:
    """Each predicted token of any rank costs 2 nats; `data` data ranks have batches like this one's."""

    def __init__(self, data: int) -> None:
        self.data = data
        self.runtime: Any = SimpleNamespace(
            device=torch.device("cpu"), groups=SimpleNamespace(dp="dp"), all_reduce=self.all_reduce
        )

    def all_reduce(self, tensor: torch.Tensor, *, group: str) -> torch.Tensor:
        assert group == "dp", "tensor peers and stages see the same text: it is counted once"
        return tensor.mul_(self.data)

    def evaluate(self, microbatches: tuple[Microbatch, ...]) -> LossSum:
        tokens = self.data * sum(int(batch.loss_mask_BS.sum()) for batch in microbatches)
        return LossSum(torch.tensor(2.0 * tokens), torch.tensor(tokens))


BATCHES = [
    (microbatch([[1, 2, 3]], [[1, 1, 0]]), microbatch([[3, 3, 3]], [[0, 0, 1]])),
    (microbatch([[0, 1, 2]], [[1, 0, 0]]),),
]


@pytest.mark.parametrize("data", [1, 3])
def test_sums_over_batches_and_ranks(data: int) -> None:
    evaluator = Evaluator(lambda: iter(BATCHES), BYTES)
    engine: Any = Engine(data)
    # predicted: 1, 2 and 3 of the first batch (1 + 2 + 5 bytes), 0 of the second (0 bytes)
    expected = Evaluation(nats=data * 8.0, tokens=data * 4, text_bytes=data * 8)
    assert evaluator.evaluate(engine) == expected
    assert evaluator.evaluate(engine) == expected, "the batches are made anew"


def test_where_it_is_to_stop_the_rest_is_left_out() -> None:
    engine: Any = Engine(1)
    asked = iter([False, True])
    found = Evaluator(lambda: iter(BATCHES), BYTES).evaluate(engine, stops=lambda: next(asked))
    assert found == Evaluation(nats=6.0, tokens=3, text_bytes=8), "the first batch"


def test_a_space_before_a_document_is_no_text() -> None:
    """Token 3 begins documents: what is predicted behind it counts without the space that a tokenizer puts there."""
    without = np.array([0, 0, 2, 5], dtype=np.int32)  # token 1 is a space
    first = microbatch([[1, 1, 2, 3, 1]], [[1, 1, 1, 0, 1]])
    first.tokens_BS[:] = torch.tensor([[3, 1, 1, 2, 3]])
    evaluator = Evaluator(lambda: iter([(first,)]), BYTES, bytes_at_start=without, bos_id=3)
    engine: Any = Engine(1)
    assert evaluator.evaluate(engine).text_bytes == 0 + 1 + 2 + 0


def test_the_record() -> None:
    record = Evaluation(nats=6.0, tokens=3, text_bytes=12).as_record()
    assert record == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "bits_per_byte": pytest.approx(6.0 / math.log(2) / 12),
    }


def test_a_loss_that_no_float_can_raise_e_to() -> None:
    record = Evaluation(nats=1e6, tokens=1, text_bytes=1).as_record()
    assert record["loss"] == 1e6 and math.isfinite(record["perplexity"])


def test_nothing_predicted() -> None:
    assert Evaluation(nats=0.0, tokens=0, text_bytes=0).as_record()["loss"] == 0.0
