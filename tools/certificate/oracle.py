"""The run that every layout is held against: Transformers' model, torch's optimizer, one process, fp32."""

from __future__ import annotations

from typing import Any

from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, ModelConfig
from tests import oracle
from tests.distributed.small import Pieces, assemble
from tools.certificate.compare import Trajectory
from tools.certificate.ranks import global_batch


def build(model: ModelConfig) -> Any:
    """Transformers' model of that shape. Raises UserError where it has none."""
    try:
        return oracle.build(model)
    except ValueError as error:
        raise UserError(f"model: {error}. The certificate knows Llama's shape and GPT-2's.") from error


def expect(hf: Any, config: Config, initial: Pieces, steps: int, keep_gradients: int) -> Trajectory:
    """The oracle's run from the `initial` weights."""
    model = config.model
    oracle.load(hf, assemble([initial]), model)
    steps_of_batches: Any = (global_batch(config, step) for step in range(steps))
    trace = oracle.train(
        hf,
        steps_of_batches,
        optim=config.optim,
        lr_of_step=lambda _: config.optim.lr,
        grad_clip=config.train.grad_clip,
        keep_gradients=keep_gradients,
    )
    gradients = [oracle.from_hf(each, model) for each in trace.gradients]
    return Trajectory(trace.losses, trace.grad_norms, gradients, oracle.from_hf(trace.final_weights, model))
