"""The loss on held-out text, the same for every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bigtrain.data.microbatch import Microbatch
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.distributed.start import Runtime
from bigtrain.engine.engine import LossSum


@dataclass(frozen=True)
class Evaluation:
    """Of the predicted tokens of the held-out batches."""

    nats: float
    """Sum of their cross-entropy."""
    tokens: int
    text_bytes: int
    """Bytes of text that these tokens stand for."""

    def as_record(self) -> dict[str, float]:
        loss = self.nats / max(self.tokens, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1),
        }


class Model(Protocol):
    """What can be evaluated: an Engine, or a model without one (`bigtrain.engine.inference.Scorer`)."""

    @property
    def runtime(self) -> Runtime: ...

    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum: ...


class Evaluator:
    """Runs the same held-out batches each time it is asked.

    `batches` makes them anew, this data rank's share; `bytes_of_tokens`: bytes of text that each id stands for, and
    `bytes_at_start` behind a `bos_id` (default: the same)."""

    def __init__(
        self,
        batches: Callable[[], Iterable[Sequence[Microbatch]]],
        bytes_of_tokens: np.ndarray,
        *,
        bytes_at_start: np.ndarray | None = None,
        bos_id: int = -1,
    ) -> None:
        self._batches, self._bos_id = batches, bos_id
        at_start = bytes_of_tokens if bytes_at_start is None else bytes_at_start
        self._bytes_of_tokens = torch.from_numpy(bytes_of_tokens.astype(np.int64))
        self._bytes_at_start = torch.from_numpy(at_start.astype(np.int64))

    @staticmethod
    def of(batches: Callable[[], Iterable[Sequence[Microbatch]]], tokenizer: Tokenizer) -> Evaluator:
        """Of batches that `tokenizer` made."""
        sizes, at_start = tokenizer.bytes_of_tokens(), tokenizer.bytes_of_tokens(at_start=True)
        return Evaluator(batches, sizes, bytes_at_start=at_start, bos_id=tokenizer.bos_id)

    def evaluate(self, model: Model, *, stops: Callable[[], bool] = lambda: False) -> Evaluation:
        """Collective. `stops` is asked ahead of each batch, on all ranks alike: where it says so the rest is left
        out."""
        runtime = model.runtime
        nats, tokens, text_bytes = 0.0, 0, 0
        for microbatches in self._batches():
            if stops():
                break
            loss = model.evaluate(microbatches)
            nats += loss.nats.item()
            tokens += int(loss.tokens.item())
            text_bytes += sum(map(self._text_bytes, microbatches))
        total = runtime.all_reduce(
            torch.tensor(text_bytes, dtype=torch.int64, device=runtime.device), group=runtime.groups.dp
        )
        return Evaluation(nats, tokens, int(total.item()))

    def _text_bytes(self, microbatch: Microbatch) -> int:
        """Bytes of text that the predicted tokens stand for. What is predicted behind a `bos_id` is the first of a
        document, also where the same token ends documents: behind an end nothing is predicted."""
        targets = microbatch.targets_BS[microbatch.loss_mask_BS]
        is_first = microbatch.tokens_BS[microbatch.loss_mask_BS] == self._bos_id
        return int(torch.where(is_first, self._bytes_at_start[targets], self._bytes_of_tokens[targets]).sum())
