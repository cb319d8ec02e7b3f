"""The engine where the first oracle test does not look: bf16, dropout, clipping, evaluation, agreement of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch

from bigtrain.config.schema import Config, ModelConfig
from bigtrain.data.microbatch import Microbatch
from bigtrain.topology import Topology
from tests import oracle
from tests.distributed import small, test_oracle
from tests.distributed.harness import PoolFactory, RankError

STEPS, PERIOD = 5, 3
"""PERIOD: batches that come again and again, so that a few steps learn something."""
DROPOUT = replace(small.LLAMA, hidden_dropout=0.2)
DROPOUT_EVERYWHERE = replace(small.LLAMA, hidden_dropout=0.2, attention_dropout=0.2)


@dataclass(frozen=True)
class Trained:
    initial: Any
    losses: list[float]
    grad_norms: list[float]


def train(config: Config, steps: int) -> Trained:
    """On a rank: batches 0 to PERIOD - 1 in turn, at a constant learning rate."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    initial = small.pieces(state.fragments(engine), "weight")
    found, norms = [], []
    for step in range(steps):
        loss = engine.forward_backward(small.share_of(small.global_batch(step % PERIOD), engine.runtime.topology))
        norms.append(engine.optimizer_step(config.optim.lr))
        found.append(loss.mean.item())
    return Trained(initial, found, norms)


def losses(pool: PoolFactory, world: int, config: Config, steps: int = STEPS) -> list[float]:
    """Of each step; the same on all ranks."""
    ranks = pool(world).run(train, config, steps)
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    assert all(rank.grad_norms == ranks[0].grad_norms for rank in ranks)
    return ranks[0].losses


def reference(config: Config, initial: dict[str, torch.Tensor], steps: int, hf: Any = None) -> oracle.Trace:
    """What `train` does, in a bare loop over Transformers' model."""
    hf = hf or oracle.build(config.model)
    oracle.load(hf, initial, config.model)
    batches: Any = [small.global_batch(step % PERIOD) for step in range(steps)]
    lr = config.optim.lr
    return oracle.train(hf, batches, optim=config.optim, lr_of_step=lambda _: lr, grad_clip=config.train.grad_clip)


# bf16


@pytest.fixture(scope="module")
def exact(pool: PoolFactory) -> list[float]:
    """Losses in fp32, which no layout changes (test_oracle.py)."""
    return losses(pool, 1, small.config(zero_stage=1), 15)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {"zero_stage": 1}), (2, {"zero_stage": 0}), (2, {"zero_stage": 2}), (4, {"zero_stage": 3, "tensor": 2})],
    ids=["z1", "z0d2", "z2d2", "z3t2d2"],
)
def test_bf16_learns_what_fp32_learns(
    pool: PoolFactory, exact: list[float], world: int, layout: dict[str, Any]
) -> None:
    """bf16 has 8 bits: a rounding is 0.4 % at most, and the losses, means over hundreds of tokens, differ by less."""
    rounded = losses(pool, world, small.config(dtype="bf16", **layout), 15)
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != pytest.approx(exact, rel=1e-6)
    assert exact[0] - exact[-1] > 0.5, "what is learned is far more than the bound"


@dataclass(frozen=True)
class Masters:
    dtypes: set[torch.dtype]
    """Of the weights that the optimizer steps, and of its moments."""
    moved: float
    """Share of the matrices' master weights that the first steps changed."""
    largest_move: float
    low_moved: list[float]
    """Share of the bf16 weights that are not what they were, after each step."""
    low_is_rounded_master: bool


def train_slowly(config: Config, lr: float, steps: int) -> Masters:
    """On a rank: steps so small that no bf16 weight can show one of them."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))

    def masters() -> torch.Tensor:
        return torch.cat([f.tensors["weight"].clone() for f in state.fragments(engine)])

    def low() -> torch.Tensor:
        """The same elements as the forward sees them, in bf16."""
        found = []
        by_name = {shard.name: parameter for shard, parameter in engine.shards()}
        for fragment in state.fragments(engine):
            parameter: Any = by_name[fragment.shard.name]
            numel = fragment.tensors["weight"].numel()
            held = getattr(parameter, "ds_tensor", None)
            flat = parameter.data.view(-1)[fragment.start :] if held is None else held.data.view(-1)
            found.append(flat[:numel].clone())
        assert all(tensor.dtype == torch.bfloat16 for tensor in found)
        return torch.cat(found)

    before, low_before = masters(), low()
    dtypes = {tensor.dtype for fragment in state.fragments(engine) for tensor in fragment.tensors.values()}
    low_moved, moved, largest = [], 0.0, 0.0
    for step in range(steps):
        engine.forward_backward(small.share_of(small.global_batch(0), engine.runtime.topology))
        engine.optimizer_step(lr)
        if step == 0:
            change = (masters() - before).abs()
            moved, largest = (change > 0).float().mean().item(), change.max().item()
        low_moved.append((low() != low_before).float().mean().item())
    return Masters(dtypes, moved, largest, low_moved, torch.equal(masters().bfloat16(), low()))


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (2, 3), (2, 0)])
def test_fp32_masters_take_updates_that_bf16_cannot_show(pool: PoolFactory, world: int, zero: int) -> None:
    lr = 1e-6  # weights are about 0.02, where bf16 has steps of 6e-5 to 1.2e-4
    config = small.config(dtype="bf16", zero_stage=zero)
    for rank in pool(world).run(train_slowly, config, lr, 60):
        assert rank.dtypes == {torch.float32}
        assert rank.moved > 0.9 and rank.largest_move < 1.5 * lr
        assert rank.low_moved[0] < 0.03, "one step is lost in bf16"
        assert rank.low_moved[-1] > 10 * rank.low_moved[0], "and sixty of them are not"
        assert rank.low_is_rounded_master


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (2, 0), (2, 3)])
def test_bf16_gradients_are_summed_in_fp32(pool: PoolFactory, world: int, zero: int) -> None:
    """Over microbatches and data ranks; each term is a bf16 gradient."""
    configs = [small.without_clipping(small.config(dtype=dtype, zero_stage=zero)) for dtype in ("fp32", "bf16")]
    runs = [pool(world).run(small.train, config, 1) for config in configs]
    exact, rounded = (small.assemble([rank.gradients for rank in ranks]) for ranks in runs)
    for name, gradient in rounded.items():
        assert (gradient - exact[name]).norm() < 0.03 * exact[name].norm(), name
        assert gradient.dtype == torch.float32
    sums = torch.cat([gradient.flatten() for gradient in rounded.values()])
    assert not torch.equal(sums, sums.bfloat16().float()), "a sum that bf16 held would be a bf16 number"


# dropout


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {"zero_stage": 1}), (2, {"zero_stage": 3}), (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True})],
    ids=["z1", "z3d2", "t2", "t2s"],
)
def test_recompute_draws_the_same_dropout(
    pool: PoolFactory, world: int, layout: dict[str, Any], recompute: str
) -> None:
    plain = losses(pool, world, small.config(DROPOUT_EVERYWHERE, **layout))
    assert losses(pool, world, small.config(DROPOUT_EVERYWHERE, recompute=recompute, **layout)) == plain


def test_dropout_drops(pool: PoolFactory) -> None:
    without = losses(pool, 1, small.config(zero_stage=1))
    for model in (DROPOUT, replace(small.LLAMA, attention_dropout=0.2)):
        assert losses(pool, 1, small.config(model, zero_stage=1))[0] != without[0]


def test_the_same_seed_draws_the_same(pool: PoolFactory) -> None:
    config = small.config(DROPOUT_EVERYWHERE, zero_stage=1)
    assert losses(pool, 1, config) == losses(pool, 1, config)


@pytest.mark.parametrize("model", [DROPOUT, replace(small.GPT2, hidden_dropout=0.2)], ids=["llama", "gpt2"])
def test_tensor_peers_drop_the_same_where_activations_are_whole(pool: PoolFactory, model: ModelConfig) -> None:
    """With hidden dropout alone the masks are those of one rank, so the run is that of one rank."""
    one = losses(pool, 1, small.config(model, zero_stage=1))
    assert losses(pool, 2, small.config(model, zero_stage=1, tensor=2)) == pytest.approx(one, rel=1e-5)
    assert losses(pool, 4, small.config(model, zero_stage=1, tensor=4)) == pytest.approx(one, rel=1e-5)


def streams(seed: int, places: list[tuple[int, Topology]]) -> list[tuple[float, float, float]]:
    """On a rank: what each (step, place) draws first from the default, the replicated and the sharded stream."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from bigtrain.distributed.rng import REPLICATED, SHARDED, seed_step
    from bigtrain.distributed.start import start

    start(small.config())
    found = []
    for step, topology in places:
        seed_step(seed, step, topology)
        default = torch.rand(()).item()
        drawn = []
        for name in (REPLICATED, SHARDED):
            with get_cuda_rng_tracker().fork(name):  # type: ignore[union-attr]
                drawn.append(torch.rand(()).item())
        found.append((default, drawn[0], drawn[1]))
    return found


def test_streams(pool: PoolFactory) -> None:
    def at(rank: int, step: int = 0) -> tuple[int, Topology]:
        return step, Topology.of(world=8, tensor=2, pipeline=2, rank=rank)  # rank = (stage 2 + data) 2 + tensor

    ((first, again, peer, data, stage, later),) = pool(1).run(streams, 1, [at(0), at(0), at(1), at(2), at(4), at(0, 1)])
    assert first == again
    assert peer[:2] == first[:2] and peer[2] != first[2], "tensor peers: alike where replicated, apart where sharded"
    for other in (data, stage, later):
        assert all(one != two for one, two in zip(first, other, strict=True))
    assert len(set(first) | set(data) | set(stage) | set(later)) >= 8, "no stream is another's"
    ((other_seed,),) = pool(1).run(streams, 2, [at(0)])
    assert other_seed[0] != first[0]


def train_on_one_batch(config: Config, steps: int) -> list[float]:
    """On a rank: the same microbatch on all ranks and in all steps, without learning."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    found = []
    for _ in range(steps):
        found.append(engine.forward_backward(small.global_batch(0)[:1]).mean.item())
        engine.optimizer_step(0.0)
    return found


def test_steps_and_data_ranks_draw_differently(pool: PoolFactory) -> None:
    config = small.config(DROPOUT, zero_stage=1)
    alone = pool(1).run(train_on_one_batch, config, 3)[0]
    assert len(set(alone)) == 3, "each step"
    both = pool(2).run(train_on_one_batch, config, 3)[0]
    assert both[0] != pytest.approx(alone[0], rel=1e-6), "the second data rank had a mask of its own"
    plain = small.config(zero_stage=1)
    assert pool(2).run(train_on_one_batch, plain, 1)[0] == pytest.approx(pool(1).run(train_on_one_batch, plain, 1)[0])


# clipping


@pytest.mark.parametrize(("world", "layout"), [(1, {"zero_stage": 1}), (4, {"zero_stage": 3, "tensor": 2})])
def test_clipping_is_torchs(pool: PoolFactory, world: int, layout: dict[str, Any]) -> None:
    traces = {}
    for clip in (0.0, 0.2):
        config = small.config(**layout)
        config = replace(config, train=replace(config.train, grad_clip=clip))
        ranks = pool(world).run(train, config, 10)
        traces[clip] = reference(config, small.assemble([rank.initial for rank in ranks]), 10)
        assert ranks[0].losses == pytest.approx(traces[clip].losses, rel=2e-5)
        assert ranks[0].grad_norms == pytest.approx(traces[clip].grad_norms, rel=1e-3)
    assert traces[0.0].losses != pytest.approx(traces[0.2].losses, rel=5e-3), "clipping matters here"
    assert min(traces[0.2].grad_norms) > 0.2, "the norm that is reported is that before clipping"


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_gradients_that_tests_look_at_are_those_before_clipping(pool: PoolFactory, clip: float) -> None:
    config = small.config(zero_stage=3)
    config = replace(config, train=replace(config.train, grad_clip=clip))
    ranks = pool(2).run(small.train, config, 1)
    gradients = small.assemble([rank.gradients for rank in ranks])
    hf = oracle.build(config.model)
    trace = reference(config, small.assemble([rank.initial for rank in ranks]), 1, hf)
    for name, expected in oracle.from_hf(trace.gradients[0], config.model).items():
        assert (gradients[name] - expected).norm() < 1e-5 * expected.norm(), name


# evaluation


@dataclass(frozen=True)
class Evaluated:
    initial: Any
    losses: list[float]
    evaluations: list[float]
    """Before the first step and after each."""


def train_and_evaluate(config: Config, steps: int, evaluates: bool) -> Evaluated:
    """On a rank."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    initial = small.pieces(state.fragments(engine), "weight")
    found, evaluations = [], []

    def evaluate() -> None:
        if evaluates:
            held_out: Sequence[Microbatch] = small.share_of(small.global_batch(99), engine.runtime.topology)
            evaluations.append(engine.evaluate(held_out).mean.item())

    evaluate()
    for step in range(steps):
        loss = engine.forward_backward(small.share_of(small.global_batch(step % PERIOD), engine.runtime.topology))
        engine.optimizer_step(config.optim.lr)
        found.append(loss.mean.item())
        evaluate()
    return Evaluated(initial, found, evaluations)


EVALUATED: list[tuple[int, dict[str, Any]]] = [
    (1, {"zero_stage": 0}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3, "gather": "microbatch"}),
    (4, {"zero_stage": 3, "gather": "microbatch", "tensor": 2}),
    (4, {"zero_stage": 3, "gather": "step", "tensor": 2}),
    (4, {"zero_stage": 3, "gather": "step", "tensor": 2, "recompute": "full"}),
    (2, {"zero_stage": 1, "tensor": 2, "sequence": True}),
    (2, {"zero_stage": 1, "pipeline": 2}),
    (4, {"zero_stage": 3, "gather": "microbatch", "pipeline": 2, "tensor": 2}),
    (4, {"zero_stage": 3, "pipeline": 2, "virtual_pipeline": 2}),
    (8, {"zero_stage": 1, "pipeline": 4}),
]
"""The last: two microbatches for four stages."""


@pytest.mark.parametrize(("world", "layout"), EVALUATED)
def test_evaluation_is_the_oracles_and_changes_nothing(pool: PoolFactory, world: int, layout: dict[str, Any]) -> None:
    stages = layout.get("pipeline", 1) * layout.get("virtual_pipeline", 1)
    config = small.config(replace(small.LLAMA, num_layers=stages + 1 if stages > 1 else 2), **layout)
    ranks = pool(world).run(train_and_evaluate, config, 3, True)
    undisturbed = pool(world).run(train_and_evaluate, config, 3, False)
    initial = small.assemble([rank.initial for rank in ranks])
    expected = []
    for steps in range(4):
        hf = oracle.build(config.model)
        reference(config, initial, steps, hf)
        with torch.no_grad():
            nats = sum(oracle.loss_sum(hf.eval(), cast(Any, batch)).item() for batch in small.global_batch(99))
        expected.append(nats / sum(int(batch.loss_mask_BS.sum()) for batch in small.global_batch(99)))
    for rank, other in zip(ranks, undisturbed, strict=True):
        assert rank.evaluations == pytest.approx(expected, rel=1e-5)
        assert rank.losses == other.losses, "bit for bit as without evaluations"
    assert expected[3] != pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("sequence", [False, True])
def test_evaluation_drops_nothing(pool: PoolFactory, sequence: bool) -> None:
    layout = {"zero_stage": 3, "tensor": 2, "sequence": sequence}
    plain = pool(2).run(train_and_evaluate, small.config(**layout), 0, True)[0].evaluations
    dropping = small.config(DROPOUT_EVERYWHERE, **layout)
    assert pool(2).run(train_and_evaluate, dropping, 0, True)[0].evaluations == plain
    with_evaluations = pool(2).run(train_and_evaluate, dropping, 3, True)[0].losses
    assert with_evaluations == pool(2).run(train_and_evaluate, dropping, 3, False)[0].losses


# sequence parallelism


@pytest.mark.parametrize(("world", "zero"), [(2, 1), (4, 3)])
def test_sequence_parallel_with_biases_and_learned_positions(pool: PoolFactory, world: int, zero: int) -> None:
    """Norms, biases of row-parallel layers and positions each see a part of the sequence."""
    test_oracle.check(small.config(small.GPT2, zero_stage=zero, tensor=2, sequence=True), pool, world, "gpt2")


# agreement


def compare_in_group(ints: list[list[int]], tensor: int) -> None:
    """On a rank: DeepSpeed's check of the order of modules, as patched."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    from bigtrain.distributed.start import start
    from bigtrain.engine import deepspeed_patches

    runtime = start(small.config(tensor=tensor))
    deepspeed_patches.apply(runtime.groups.dp)
    coordinator.assert_ints_same_as_other_ranks(ints[runtime.topology.rank])


def test_modules_are_compared_among_the_ranks_that_share_parameters(pool: PoolFactory) -> None:
    pool(2).run(compare_in_group, [[1, 2], [1, 2]], 1)
    pool(2).run(compare_in_group, [[1, 2], [3]], 2)  # other modules, as other pipeline stages have
    for different in ([1, 3], [1, 2, 3], [2, 1]):
        with pytest.raises(RankError, match="ran their modules in different orders"):
            pool(2).run(compare_in_group, [[1, 2], different], 1)


def stop_one(who: int) -> tuple[bool, bool, str | None]:
    """On a rank: whether all agree to stop before and after rank `who` got a SIGTERM."""
    import os
    import signal

    from bigtrain.distributed.start import start
    from bigtrain.trainer.stopping import StopSignal

    runtime = start(small.config())
    stop = StopSignal(runtime)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    before = stop.agreed()
    if runtime.topology.rank == who:
        os.kill(os.getpid(), signal.SIGTERM)
    after = stop.agreed()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return before, after, stop.received


def test_all_ranks_stop_when_one_is_told(pool: PoolFactory) -> None:
    assert pool(2).run(stop_one, 1) == [(False, True, "SIGTERM")] * 2
