"""What every contender of tools/bench/step.py shares: the model, the data, and the clock that it reports to.

Nothing here imports torch when it is loaded: a contender's imports are part of what is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigtrain.config.schema import ModelConfig, OptimConfig

if TYPE_CHECKING:
    from torch import Tensor

MODEL = ModelConfig(
    name="bench_10m",
    num_layers=6,
    hidden_size=320,
    num_attention_heads=5,
    num_query_groups=5,
    ffn_hidden_size=896,
    vocab_size=4096,
    max_positions=256,
)
OPTIM = OptimConfig(lr=1e-3)
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Job:
    """One contender's run, the same for all of them."""

    ranks: int = 1
    num_warmup: int = 3
    """Steps before the measured ones."""
    num_steps: int = 12
    sequence_length: int = 256
    """Tokens."""
    batch_size: int = 8
    """Sequences a step, over all ranks."""
    model: ModelConfig = MODEL
    layout: str = ""
    """Ours alone: ZeRO stage and sizes, as tools/layouts.py names them."""

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def rank_batch_size(self) -> int:
        return self.batch_size // self.ranks

    @property
    def num_parameters(self) -> int:
        """What every contender's model must have."""
        m = self.model
        qkv = (m.num_attention_heads + 2 * m.num_query_groups) * (m.hidden_size // m.num_attention_heads)
        layer = m.hidden_size * (qkv + m.hidden_size + 3 * m.ffn_hidden_size + 2)
        return m.num_layers * layer + 2 * m.vocab_size * m.hidden_size + m.hidden_size

    @property
    def flops_per_step(self) -> float:
        """Multiply-adds count two. Forward and backward of the matrices (not the embedding's look-up) and of causal
        attention, of which half is masked: 6 S L H a token."""
        m = self.model
        matrices = self.num_parameters - m.vocab_size * m.hidden_size
        attention = 6 * self.sequence_length * m.num_layers * m.hidden_size
        return self.tokens_per_step * (6.0 * matrices + attention)

    def batches(self) -> Iterator[Tensor]:
        """Random tokens, [B, S + 1], one item a step: the part of this rank, or all of them where there is a layout."""
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.sequence_length + 1)
        mine = slice(rank() * self.rank_batch_size, (rank() + 1) * self.rank_batch_size)
        for _ in range(self.num_warmup + self.num_steps):
            batch = torch.randint(self.model.vocab_size, shape, generator=generator)
            yield batch if self.layout else batch[mine]


@dataclass
class Clock:
    """Seconds of each phase up to the first step, and of each step. `launched_at` is in seconds since the epoch.

    `cpu_s` is what this process spent on processors in each step, all threads together: other load on the machine
    hardly changes it, so it tells a slow contender from a disturbed one."""

    launched_at: float
    phases_s: dict[str, float] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last, self._last_cpu = self.launched_at, time.process_time()

    def mark(self, phase: str) -> None:
        """The time since the last mark was `phase`."""
        now = time.time()
        self.phases_s[phase] = self.phases_s.get(phase, 0.0) + now - self._last
        self._last, self._last_cpu = now, time.process_time()

    def step(self, loss: float | None = None) -> None:
        """The time since the last mark or step was a training step."""
        now, now_cpu = time.time(), time.process_time()
        self.steps_s.append(now - self._last)
        self.cpu_s.append(now_cpu - self._last_cpu)
        self._last, self._last_cpu = now, now_cpu
        if loss is not None:
            self.losses.append(loss)
        if len(self.steps_s) == 1:
            self.phases_s["first step"] = self.steps_s[0]

    def run(self, job: Job, step: Callable[[Tensor], float]) -> None:
        """All steps of the job; `step` takes a batch [B, S + 1] and returns the loss."""
        for batch in job.batches():
            self.step(step(batch))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def check_parameters(job: Job, count: int) -> None:
    """Raises ValueError where a contender's model is not the job's."""
    if count != job.num_parameters:
        raise ValueError(f"this contender's model has {count} parameters, the job's has {job.num_parameters}")
