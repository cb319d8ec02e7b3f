"""The Megatron model on real ranks: documents do not meet, parameters are those of the preset, building is frugal."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
import yaml

from bigtrain.config.compose import presets
from bigtrain.config.derive import count_parameters, parameter_count
from bigtrain.config.schema import Config, ModelConfig
from bigtrain.data.microbatch import Microbatch
from tests.distributed import small
from tests.distributed.harness import PoolFactory

LENGTH, SECOND = 24, 9
"""Tokens of a row, and where its second document begins."""
MODELS = {"llama": small.LLAMA, "gpt2": small.GPT2}
LAYOUTS = [(1, {}), (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True})]


def row(tokens: torch.Tensor, starts: list[int]) -> Microbatch:
    """One row of packed documents, made by the loader that training uses."""
    from bigtrain.data.loader import cut
    from bigtrain.data.rows import Rows

    (batch,) = cut(Rows(tokens.numpy()[None], [starts], [len(tokens)]), 1)
    return batch


class CountingOn(Microbatch):
    """Its positions know no documents."""

    positions_BS = torch.arange(LENGTH)[None]  # pyright: ignore[reportAssignmentType]


def logits(config: Config, batches: list[Microbatch], boundaries_of_rows: bool = False) -> list[torch.Tensor]:
    """On a rank: [B, S, V / tensor] of each microbatch. `boundaries_of_rows`: also where one document fills the row."""
    from bigtrain.distributed.rng import seed_step
    from bigtrain.distributed.start import start
    from bigtrain.model.attention import boundaries_of
    from bigtrain.model.build import build
    from bigtrain.model.initial import initialize

    runtime = start(config)
    (decoder,) = build(config, runtime)
    initialize(decoder, config.model, seed=3, topology=runtime.topology)
    seed_step(3, 0, runtime.topology)
    decoder.eval()
    found = []
    with torch.no_grad():
        for batch in batches:
            fast = batch.single_document and not boundaries_of_rows
            boundaries = None if fast else boundaries_of(batch.documents_BS)
            found.append(decoder(batch.tokens_BS, batch.positions_BS, boundaries))
    return found


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, small.LLAMA.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=["one", "tensor", "sequence"])
def test_documents_of_a_row_do_not_meet(pool: PoolFactory, model: str, world: int, layout: dict[str, Any]) -> None:
    before, after = tokens(1), tokens(1)
    after[:SECOND] = tokens(2)[:SECOND]
    rows = [row(before, [0, SECOND]), row(after, [0, SECOND]), row(before, [0]), row(after, [0])]
    for packed, changed, alone, alone_changed in pool(world).run(logits, small.config(MODELS[model], **layout), rows):
        assert torch.equal(packed[:, SECOND:], changed[:, SECOND:]), "bit for bit"
        assert not torch.equal(packed[:, :SECOND], changed[:, :SECOND])
        # in one document the change is seen: the test above can fail
        assert not torch.allclose(alone[:, SECOND:], alone_changed[:, SECOND:], atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_no_token_sees_the_next(pool: PoolFactory, model: str) -> None:
    before, after = tokens(1), tokens(1)
    after[SECOND:] = tokens(2)[SECOND:]
    for starts in ([0], [0, 3]):
        rows = [row(before, starts), row(after, starts)]
        first, second = pool(1).run(logits, small.config(MODELS[model]), rows)[0]
        torch.testing.assert_close(first[:, :SECOND], second[:, :SECOND], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(first[:, SECOND:], second[:, SECOND:], atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_the_path_without_boundaries_is_the_same(pool: PoolFactory, model: str) -> None:
    whole = row(tokens(1), [0])
    assert whole.single_document
    config = small.config(MODELS[model])
    fast, bounded = (pool(1).run(logits, config, [whole], flag)[0][0] for flag in (False, True))
    assert torch.equal(fast, bounded)


@pytest.mark.parametrize("model", MODELS)
def test_positions_begin_anew_with_each_document(pool: PoolFactory, model: str) -> None:
    """A document reads the same wherever it stands in its row."""
    packed = row(tokens(1), [0, SECOND])
    alone = row(tokens(1)[SECOND:], [0])
    counting_on = CountingOn(packed.tokens_BS, packed.targets_BS, packed.starts_B, packed.num_tokens_B)
    config = small.config(MODELS[model])
    first, second, third = pool(1).run(logits, config, [packed, alone, counting_on])[0]
    torch.testing.assert_close(first[:, SECOND:], second, atol=2e-6, rtol=2e-6)
    if model == "gpt2":  # learned positions are those that it is given
        assert not torch.allclose(third[:, SECOND:], second, atol=1e-4)


def shapes(models: list[ModelConfig], layout: dict[str, Any]) -> list[tuple[int, int, dict[str, tuple[int, ...]]]]:
    """On a rank, for each model: parameters of the whole, parameters of this rank, global shapes by name."""
    from bigtrain.distributed.start import start
    from bigtrain.model.build import build, shards_of

    found = []
    runtime = start(small.config(**layout))
    for model in models:
        (decoder,) = build(small.config(model, **layout), runtime)
        shards = list(shards_of(decoder, runtime.topology))
        assert all(shard.local_shape == parameter.shape for shard, parameter in shards)
        names = {shard.name: shard.global_shape for shard, _ in shards}
        assert len(names) == len(shards)
        found.append((sum(map(prod, names.values())), sum(p.numel() for _, p in shards), names))
    return found


def narrow(name: str) -> ModelConfig:
    """A preset with its heads, groups, biases, norms, positions, activation and tying, two layers and no width."""
    text = presets("model")[name].read_text(encoding="utf-8").replace("1e-5", "1.0e-5")
    model = ModelConfig(**yaml.safe_load(text))
    hidden = 4 * model.num_attention_heads
    ffn = 4 * (model.ffn_hidden_size * hidden // model.hidden_size // 4)
    return replace(model, num_layers=2, hidden_size=hidden, ffn_hidden_size=ffn, vocab_size=512, max_positions=32)


@pytest.mark.parametrize("tensor", [1, 2])
def test_every_preset_has_the_parameters_that_the_config_counts(pool: PoolFactory, tensor: int) -> None:
    models = [narrow(name) for name in presets("model")]
    assert len(models) >= 13
    for rank in pool(tensor).run(shapes, models, {"tensor": tensor}):
        for model, (total, on_rank, _) in zip(models, rank, strict=True):
            assert total == count_parameters(model), model.name
            assert on_rank == parameter_count(model).per_rank(tensor), model.name


def test_the_names_are_those_of_the_whole_model(pool: PoolFactory) -> None:
    ((_, _, names),) = pool(2).run(shapes, [small.GPT2], {"tensor": 2})[1]
    hidden, ffn = small.GPT2.hidden_size, small.GPT2.ffn_hidden_size
    assert names["decoder.layers.1.mlp.linear_fc1.weight"] == (ffn, hidden)
    assert names["decoder.layers.0.self_attention.linear_qkv.bias"] == (3 * hidden,)
    assert names["embedding.position_embeddings.weight"] == (small.GPT2.max_positions, hidden)
    assert "output_layer.weight" not in names, "tied"


def initial_weights(config: Config) -> list[tuple[str, torch.Size, tuple[int, ...], torch.Tensor]]:
    """On a rank: the pieces of the initial weights that it owns."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    return small.pieces(state.fragments(Engine(config, start(config))), "weight")


@pytest.mark.parametrize(("model", "zero"), [("llama", 3), ("gpt2", 1)])
def test_initial_weights(pool: PoolFactory, model: str, zero: int) -> None:
    config = small.config(replace(MODELS[model], init_std=0.04), zero_stage=zero, tensor=2)
    weights = small.assemble(pool(2).run(initial_weights, config))
    residual = 0.04 / (2 * config.model.num_layers) ** 0.5
    for name, tensor in weights.items():
        if name.endswith("bias"):
            assert bool((tensor == 0).all()), name
        elif name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
        else:
            is_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert tensor.std().item() == pytest.approx(residual if is_residual else 0.04, rel=0.05), name
    other = small.assemble(pool(2).run(initial_weights, replace(config, run=replace(config.run, seed=5))))
    assert all(torch.equal(other[name], tensor) == (tensor.dim() == 1) for name, tensor in weights.items())
    qkv = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert not torch.equal(weights[qkv.format(0)], weights[qkv.format(1)])


@dataclass(frozen=True)
class Memory:
    """Bytes that the process had allocated, above what it had before."""

    peak: int
    left: int
    whole: int
    """Of all parameters of this tensor rank, in fp32."""
    largest: int
    """Of its largest parameter."""


class HeapInfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


def allocated() -> int:
    """Bytes of malloc in use: of tensors, whoever holds them, and of Python's larger objects."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def memory_of_building(config: Config) -> Memory:
    """On a rank: build and fill the model as the engine does, looking at the heap after every operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    class Heap(TorchDispatchMode):
        peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.peak = max(self.peak, allocated())
            return out

    found: list[tuple[int, int]] = []

    class Measured(Engine):
        def _build_chunks(self, deepspeed: Any, settings: dict[str, Any]) -> Any:
            gc.collect()
            before = allocated()
            with Heap() as heap:
                decoder = super()._build_chunks(deepspeed, settings)
            gc.collect()
            found.append((heap.peak - before, allocated() - before))
            return decoder

    engine = Measured(config, start(config))
    ((peak, left),) = found
    sizes = [4 * shard.numel for shard, _ in engine.shards()]
    return Memory(peak, left, sum(sizes), max(sizes))


DEEP = replace(
    small.LLAMA, num_layers=24, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, num_query_groups=4
)
"""Many equal layers: none is more than 2 % of the whole."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("tensor", [1, 2])
def test_zero_3_builds_without_ever_holding_more_than_one_full_parameter(pool: PoolFactory, tensor: int) -> None:
    world = 2 * tensor
    objects = 0.05  # of Python, as a share of the model
    for rank in pool(world).run(memory_of_building, small.config(DEEP, zero_stage=3, tensor=tensor)):
        assert rank.largest < 0.02 * rank.whole
        assert rank.left < (0.5 + objects) * rank.whole, "its half, and nothing beside it"
        # one full parameter, and the copies of it that are made when it is cut and filled
        assert rank.peak < rank.left + 3 * rank.largest
    # the measure sees a model that is whole
    for rank in pool(world).run(memory_of_building, small.config(DEEP, zero_stage=1, tensor=tensor)):
        assert rank.peak >= rank.left >= rank.whole
