"""What tools/bench/checkpoint.py saves and loads: a model's weights and Adam moments, as a rank holds them.

Ours holds them as DeepSpeed's ZeRO-3 does: flat memory with each rank's part of every weight. The others hold a tensor
a weight, as a plain PyTorch run does, on more ranks split by rows, as FSDP2 does. The bytes are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch

from bigtrain.checkpoint.hf_names import our_shapes
from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.schema import ModelConfig
from bigtrain.distributed.sharding import Shard

KINDS = ("weight", "exp_avg", "exp_avg_sq")
PAGE = 4096
WIDEST = ModelConfig(
    name="gpt_350m, 12 layers",
    num_layers=12,
    hidden_size=1024,
    num_attention_heads=16,
    num_query_groups=16,
    ffn_hidden_size=4096,
    vocab_size=50304,
    max_positions=2048,
    position="learned",
    norm="layernorm",
    activation="gelu",
    bias=True,
    tie_embeddings=True,
)
"""The preset gpt_350m at half its depth: 205 M parameters."""
_NOISE_ELEMENTS = 1 << 24


def shapes_for(num_parameters: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model with about so many parameters: WIDEST, narrower where that is too large."""
    model = WIDEST
    while _count(shapes := our_shapes(model)) > num_parameters and model.hidden_size > 32:
        width = model.hidden_size - 32
        vocabulary = -(-WIDEST.vocab_size * width // WIDEST.hidden_size // 128) * 128
        heads = {"num_attention_heads": width // 32, "num_query_groups": width // 32}
        model = replace(model, hidden_size=width, ffn_hidden_size=4 * width, vocab_size=vocabulary, **heads)
    return shapes


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))


@dataclass
class Part:
    """What a rank holds of one tensor: a flat run of its elements, from `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: torch.Tensor
    seed: int


@dataclass
class State:
    """Of one rank of `world`. Full of known numbers, or of zeros."""

    shapes: dict[str, tuple[int, ...]]
    rank: int
    world: int
    is_flat: bool
    """Ours, and the raw writes: one run of memory for each kind."""
    parts: list[Part] = field(default_factory=list)
    memory: list[torch.Tensor] = field(default_factory=list)
    """Where it is flat: of each kind, page-aligned."""

    def __post_init__(self) -> None:
        runs = {name: self._run(shape) for name, shape in self.shapes.items()}
        for kind_number, kind in enumerate(KINDS):
            flat, at = _aligned(sum(stop - start for start, stop in runs.values())) if self.is_flat else None, 0
            if flat is not None:
                self.memory.append(flat)
            for number, (name, shape) in enumerate(self.shapes.items()):
                start, stop = runs[name]
                mine = torch.zeros(stop - start) if flat is None else flat[at : at + stop - start]
                self.parts.append(Part(f"{kind}.{name}", shape, start, mine, 3 * number + kind_number))
                at += stop - start

    def _run(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the flattened weight: any elements where it is flat, whole rows otherwise."""
        row = 1 if self.is_flat else prod(shape[1:])
        size = -(-(prod(shape) // row) // self.world) * row
        return min(self.rank * size, prod(shape)), min((self.rank + 1) * size, prod(shape))

    @property
    def num_bytes(self) -> int:
        """Of this rank."""
        return sum(part.flat.nbytes for part in self.parts)

    def fill(self) -> State:
        """Every element has its own place's number, in any layout."""
        for part in self.parts:
            for piece, values in _pieces(part):
                piece.copy_(values)
        return self

    def clear(self) -> None:
        for part in self.parts:
            part.flat.zero_()

    def copy_to(self, target: torch.Tensor) -> None:
        """Everything, in the fewest copies that it lies in."""
        at = 0
        for flat in self.memory or [part.flat for part in self.parts]:
            target[at : at + len(flat)].copy_(flat)
            at += len(flat)

    def check(self) -> None:
        """Raises ValueError unless it is what `fill` makes."""
        for part in self.parts:
            if not all(torch.equal(piece, values) for piece, values in _pieces(part)):
                raise ValueError(f"{part.name} was not loaded as it was saved")

    def fragments(self) -> list[Fragment]:
        """As our store takes them."""
        parts = {part.name: part for part in self.parts}
        first = (parts[f"{KINDS[0]}.{name}"] for name in self.shapes)
        return [
            Fragment(Shard(name, shape), part.start, {kind: parts[f"{kind}.{name}"].flat for kind in KINDS}, owned=True)
            for (name, shape), part in zip(self.shapes.items(), first, strict=True)
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name: on several ranks this one's rows."""
        rows = [len(part.flat) // prod(part.shape[1:]) for part in self.parts]
        return {part.name: part.flat.view(n, *part.shape[1:]) for n, part in zip(rows, self.parts, strict=True)}

    def distributed(self) -> dict[str, Any]:
        """The same as torch.distributed.checkpoint wants them: on several ranks DTensors."""
        if self.world == 1:
            return dict(self.tensors())
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Rows

        mesh, rows, whole = init_device_mesh("cpu", (self.world,)), self.tensors(), {}
        for part in self.parts:
            stride = tuple(itertools.accumulate((1, *part.shape[:0:-1]), lambda a, b: a * b))[::-1]
            local = rows[part.name]
            whole[part.name] = DTensor.from_local(
                local, mesh, [Rows(0)], run_check=False, shape=torch.Size(part.shape), stride=stride
            )
        return whole


def _aligned(numel: int) -> torch.Tensor:
    """fp32 memory that begins on a page, as a direct write wants it."""
    memory = torch.zeros(numel * 4 + PAGE, dtype=torch.uint8)
    skip = -memory.data_ptr() % PAGE
    return memory[skip : skip + numel * 4].view(torch.float32)


_noise: list[torch.Tensor] = []


def _pieces(part: Part) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The runs of a part, each with the numbers that belong there."""
    if not _noise:
        _noise.append(torch.randn(_NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0)))
    noise, done, count = _noise[0], 0, part.flat.numel()
    while done < count:
        at = (part.seed * 1_000_003 + part.start + done) % len(noise)
        size = min(count - done, len(noise) - at)
        yield part.flat[done : done + size], noise[at : at + size]
        done += size


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.view(torch.uint8).numpy()))
