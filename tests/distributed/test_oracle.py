"""Every layout computes what Hugging Face Transformers computes in a bare PyTorch loop (tests/oracle.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.config.schema import Config, ModelConfig
from bigtrain.optim.schedule import share_of_peak
from tests import oracle
from tests.distributed import small
from tests.distributed.harness import PoolFactory

STEPS, FEW = 20, 8
"""FEW: where a layout has other cases that run all of them; the certificate (tools/layouts.py) does, for each."""
MODELS = {"llama": small.LLAMA, "gpt2": small.GPT2}
LAYOUTS = [(zero, tensor, data) for zero in (0, 1, 2, 3) for tensor in (1, 2) for data in (1, 2)]
LAYOUTS = [each for each in LAYOUTS if each[1:] != (1, 1) or each[0] == 1]  # on one rank the stages are one

_STATES: dict[str, dict[str, torch.Tensor]] = {}
_TRACES: dict[str, oracle.Trace] = {}


def check(config: Config, pool: PoolFactory, world: int, model: str, steps: int = FEW) -> None:
    ranks = pool(world).run(small.train, config, steps)
    initial = small.assemble([rank.initial for rank in ranks])
    if model not in _STATES:
        _STATES[model] = initial
        _TRACES[model] = _trace(MODELS[model], initial)
    for name, tensor in _STATES[model].items():
        assert torch.equal(initial[name], tensor), f"{name}: this layout starts from another model"

    trace = _TRACES[model]
    gradients = small.assemble([rank.gradients for rank in ranks])
    expected = oracle.from_hf(trace.gradients[0], MODELS[model])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        deviation = (gradient - expected[name]).norm() / expected[name].norm()
        assert deviation < 1e-5, f"{name}: gradient of the first step deviates by {deviation:.2e} of its norm"
    for rank in ranks:
        assert rank.losses == pytest.approx(trace.losses[:steps], rel=1e-5)
        assert rank.grad_norms == pytest.approx(trace.grad_norms[:steps], rel=1e-3)


def _trace(model: ModelConfig, initial: dict[str, torch.Tensor]) -> oracle.Trace:
    config = small.config(model)
    hf = oracle.build(model)
    oracle.load(hf, initial, model)
    steps: Any = [small.global_batch(step) for step in range(STEPS)]
    return oracle.train(
        hf,
        steps,
        optim=config.optim,
        lr_of_step=lambda step: config.optim.lr * share_of_peak(step, STEPS, config.schedule),
        grad_clip=config.train.grad_clip,
    )


@pytest.mark.parametrize(("zero", "tensor", "data"), LAYOUTS)
def test_llama(pool: PoolFactory, zero: int, tensor: int, data: int) -> None:
    check(
        small.config(zero_stage=zero, tensor=tensor), pool, tensor * data, "llama", STEPS if tensor * data == 4 else FEW
    )


@pytest.mark.parametrize(("zero", "tensor", "data"), [(1, 1, 1), (3, 2, 2)])
def test_gpt2(pool: PoolFactory, zero: int, tensor: int, data: int) -> None:
    """Learned positions, LayerNorm, GELU, biases, tied embeddings."""
    check(small.config(small.GPT2, zero_stage=zero, tensor=tensor), pool, tensor * data, "gpt2")


@pytest.mark.parametrize("zero", [1, 3])
def test_tensor_4(pool: PoolFactory, zero: int) -> None:
    check(small.config(zero_stage=zero, tensor=4), pool, 4, "llama")


def test_gathering_for_each_microbatch(pool: PoolFactory) -> None:
    """What `auto` does not choose here."""
    check(small.config(zero_stage=3, tensor=2, gather="microbatch"), pool, 4, "llama")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(pool: PoolFactory, recompute: str) -> None:
    check(small.config(zero_stage=3, tensor=2, recompute=recompute), pool, 4, "llama")


@pytest.mark.parametrize("zero", [0, 3])
def test_sequence_parallel(pool: PoolFactory, zero: int) -> None:
    check(small.config(zero_stage=zero, tensor=2, sequence=True), pool, 4, "llama")
